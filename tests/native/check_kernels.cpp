// Random calls of every kernel that this processor runs, against loops in double, without torch: to
// be built for other processors and run under emulation, and with sanitizers. All tensors are their
// own allocations, so that a sanitizer sees the first byte read or written outside of one.
//
// Usage: check_kernels [number of calls]; prints the largest error of each kernel and storage type,
// exits with 1 if one is too large.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <random>
#include <type_traits>
#include <vector>

#include "deformable_attention.h"

namespace {

using saccade::BFloat16;
using saccade::Coordinates;
using saccade::Half;
using saccade::Interpolation;
using saccade::Padding;
using saccade::Problem;
using saccade::Storage;

std::mt19937 generator(0);

int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
double real(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

// Storage types: to and from double. 16-bit numbers are drawn as multiples of 1/8 up to 1, which
// both hold exactly; results are decoded only.
template <class S>
struct Stored;

// Memory that begins with a cache line, as torch's does: results may then go past the caches.
template <class T>
struct Aligned {
  typedef T value_type;
  Aligned() = default;
  template <class U>
  Aligned(const Aligned<U>&) {}
  T* allocate(std::size_t count) {
    return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(64)));
  }
  void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t(64)); }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};
template <class T>
using Lines = std::vector<T, Aligned<T>>;

template <>
struct Stored<float> {
  static constexpr Storage kind = Storage::float32;
  static constexpr const char* name = "float32";
  static constexpr double tolerance = 4e-6;
  static float encode(double number) { return static_cast<float>(number); }
  static double decode(float number) { return number; }
};
template <>
struct Stored<double> {
  static constexpr Storage kind = Storage::float64;
  static constexpr const char* name = "float64";
  static constexpr double tolerance = 2e-14;
  static double encode(double number) { return number; }
  static double decode(double number) { return number; }
};
uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}
template <>
struct Stored<BFloat16> {
  static constexpr Storage kind = Storage::bfloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double tolerance = 4e-3;
  static BFloat16 encode(double number) {
    return {static_cast<uint16_t>(bits_of(static_cast<float>(std::round(number * 8) / 8)) >> 16)};
  }
  static double decode(BFloat16 number) {
    const uint32_t bits = uint32_t(number.bits) << 16;
    float decoded;
    std::memcpy(&decoded, &bits, sizeof decoded);
    return decoded;
  }
};
template <>
struct Stored<Half> {
  static constexpr Storage kind = Storage::float16;
  static constexpr const char* name = "float16";
  static constexpr double tolerance = 6e-4;
  static Half encode(double number) {
    const uint32_t bits = bits_of(static_cast<float>(std::round(number * 8) / 8));
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13;
    return {static_cast<uint16_t>(bits >> 16 & 0x8000u | half)};
  }
  static double decode(Half number) {
    const int exponent = number.bits >> 10 & 0x1f, mantissa = number.bits & 0x3ff;
    const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                             : exponent == 31 ? std::numeric_limits<double>::quiet_NaN()
                                              : std::ldexp(1024 + mantissa, exponent - 25);
    return number.bits & 0x8000 ? -magnitude : magnitude;
  }
};

template <class S>
using Compute = typename std::conditional<std::is_same<S, double>::value, double, float>::type;

template <class S>
struct Call {
  typedef Compute<S> T;
  Problem problem;
  int64_t row_padding;  // numbers between the rows of the value that belong to nobody
  std::vector<S> value, grad_output;
  std::vector<T> locations, weights;

  int64_t row_stride() const { return problem.value_heads * problem.head_dim + row_padding; }
  int64_t row(int64_t batch, int64_t position, int64_t head) const {
    return (batch * problem.num_positions + position) * row_stride() +
           (problem.value_heads > 1 ? head : 0) * problem.head_dim;
  }
};

template <class S>
Call<S> draw() {
  typedef Compute<S> T;
  Call<S> call;
  Problem& problem = call.problem;
  problem.storage = Stored<S>::kind;
  problem.interpolation = integer(0, 3) ? Interpolation::linear : Interpolation::nearest;
  problem.padding = integer(0, 1) ? Padding::zeros : Padding::border;
  problem.coordinates = static_cast<Coordinates>(integer(0, 2));
  problem.spatial_dims = integer(0, 2) ? 2 : integer(1, 3);
  problem.batch_size = integer(0, 2);
  problem.num_queries = integer(0, 9) ? integer(0, 20) : integer(100, 300);
  problem.num_heads = integer(1, 3);
  problem.value_heads = integer(0, 2) ? problem.num_heads : 1;
  problem.head_dim = integer(0, 1) ? integer(1, 40) : 16 * integer(1, 6);
  const int64_t num_levels = integer(1, 4);
  for (int64_t i = 0; i < num_levels; ++i) {
    const int64_t depth = problem.spatial_dims > 2 ? integer(1, 4) : 1;
    const int64_t height = problem.spatial_dims > 1 ? integer(1, 7) : 1;
    const int64_t width = integer(1, problem.spatial_dims > 1 ? 7 : 30);
    const int64_t points = integer(0, 2) ? integer(1, 5) : 16;  // 16: whole vectors, whole lines
    problem.levels.push_back(
        {depth, height, width, problem.num_positions, problem.total_points, points});
    problem.num_positions += depth * height * width;
    problem.total_points += points;
  }
  problem.prepare(integer(1, 8));
  // Whatever the size.
  problem.stream_results = integer(0, 1);
  for (saccade::Level& level : problem.levels) {
    level.fetched_ahead = integer(0, 1);
  }
  call.row_padding = integer(0, 2) ? 0 : integer(1, 5);
  const int64_t rows = problem.batch_size * problem.num_positions;
  call.value.resize(rows > 0 ? rows * call.row_stride() - call.row_padding : 0);
  for (S& number : call.value) number = Stored<S>::encode(real(-1, 1));
  call.grad_output.resize(problem.batch_size * problem.num_queries * problem.num_heads *
                          problem.head_dim);
  for (S& number : call.grad_output) number = Stored<S>::encode(real(-1, 1));
  const int64_t points =
      problem.batch_size * problem.num_queries * problem.num_heads * problem.total_points;
  const double reach = problem.coordinates == Coordinates::pixel ? 8 : 1.4;
  call.weights.resize(points);
  for (T& weight : call.weights) weight = static_cast<T>(real(0, 1));
  call.locations.resize(problem.spatial_dims * points);
  const T extreme[] = {std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN(),
                       std::numeric_limits<T>::max(),
                       std::numeric_limits<T>::lowest(),
                       T(1e9),
                       T(-0.0),
                       T(3e15)};
  for (T& location : call.locations) {
    location = integer(0, 30) ? static_cast<T>(real(-0.4 * reach, reach)) : extreme[integer(0, 7)];
  }
  return call;
}

struct Results {
  std::vector<double> output, grad_value, grad_locations, grad_weights;
};

// One axis of a position: 1 - |position - cell| for the cells within 1 of it, and its slope.
struct Position {
  double at, slope;
};

template <class T>
Position position(T location, int64_t size, const Problem& problem) {
  const T scale = problem.coordinates == Coordinates::normalized           ? T(size)
                  : problem.coordinates == Coordinates::normalized_corners ? T(size - 1)
                                                                           : T(1);
  // Rounded to T as in the kernel: near a tie or an edge that decides.
  const volatile T product = location * scale;
  const T shifted = problem.coordinates == Coordinates::normalized ? product - T(0.5) : product;
  Position found = {shifted, scale};
  if (problem.padding == Padding::border) {
    if (!(found.at > 0 && found.at < size - 1)) found.slope = 0;
    found.at = std::fmin(std::fmax(found.at, 0), size - 1);
  }
  if (problem.interpolation == Interpolation::nearest) {
    found = {std::nearbyint(found.at), 0};
  }
  return found;
}

double share(Position p, int64_t cell) { return std::fmax(0, 1 - std::fabs(p.at - cell)); }
// The position's own cell is the one below it; the next gains what that one loses.
double slope(Position p, int64_t cell) {
  const double below = std::floor(p.at);
  return cell == below ? -p.slope : cell == below + 1 ? p.slope : 0;
}

template <class S>
Results naive(const Call<S>& call) {
  const Problem& p = call.problem;
  Results results;
  results.output.assign(call.grad_output.size(), 0);
  results.grad_value.assign(p.batch_size * p.num_positions * p.value_heads * p.head_dim, 0);
  results.grad_locations.assign(call.locations.size(), 0);
  results.grad_weights.assign(call.weights.size(), 0);
  for (int64_t b = 0; b < p.batch_size; ++b)
    for (int64_t q = 0; q < p.num_queries; ++q)
      for (int64_t m = 0; m < p.num_heads; ++m)
        for (const saccade::Level& level : p.levels)
          for (int64_t k = 0; k < level.num_points; ++k) {
            const int64_t query = (b * p.num_queries + q) * p.num_heads + m;
            const int64_t point = query * p.total_points + level.first_point + k;
            const int64_t axes = p.spatial_dims;
            const auto* location = &call.locations[axes * point];
            if (!std::all_of(location, location + axes, [](double n) { return std::isfinite(n); }))
              continue;
            // An axis that the map does not have is one cell, looked at squarely.
            const int64_t sizes[3] = {level.width, level.height, level.depth};
            Position at[3] = {};
            for (int64_t n = 0; n < axes; ++n) at[n] = position(location[n], sizes[n], p);
            const double attention = call.weights[point];
            for (int64_t cell = 0; cell < level.num_rows(); ++cell) {
              const int64_t cells[3] = {cell % level.width, cell / level.width % level.height,
                                        cell / level.width / level.height};
              const double x = share(at[0], cells[0]), y = share(at[1], cells[1]),
                           z = share(at[2], cells[2]);
              const double weight = x * y * z;
              const double slopes[3] = {slope(at[0], cells[0]) * y * z,
                                        slope(at[1], cells[1]) * x * z,
                                        slope(at[2], cells[2]) * x * y};
              if (weight == 0 && slopes[0] == 0 && slopes[1] == 0 && slopes[2] == 0) continue;
              const int64_t position = level.first_row + cell;
              const int64_t from = call.row(b, position, m);
              const int64_t to =
                  ((b * p.num_positions + position) * p.value_heads + (p.value_heads > 1 ? m : 0)) *
                  p.head_dim;
              double dot = 0;
              for (int64_t d = 0; d < p.head_dim; ++d) {
                const double value = Stored<S>::decode(call.value[from + d]);
                const double grad = Stored<S>::decode(call.grad_output[query * p.head_dim + d]);
                results.output[query * p.head_dim + d] += attention * weight * value;
                results.grad_value[to + d] += attention * weight * grad;
                dot += grad * value;
              }
              results.grad_weights[point] += weight * dot;
              for (int64_t n = 0; n < axes; ++n)
                results.grad_locations[axes * point + n] += attention * slopes[n] * dot;
            }
          }
  return results;
}

double decode(float number) { return number; }
double decode(double number) { return number; }
double decode(Half number) { return Stored<Half>::decode(number); }
double decode(BFloat16 number) { return Stored<BFloat16>::decode(number); }

// The largest difference relative to the largest expected number; NaN if one is NaN.
template <class S>
double difference(const Lines<S>& actual, const std::vector<double>& expected) {
  double largest = 0, scale = 1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(decode(actual[i]) - expected[i]);
    if (std::isnan(error)) return error;
    largest = std::max(largest, error);
    scale = std::max(scale, std::fabs(expected[i]));
  }
  return largest / scale;
}

// Work is given in pieces, as threads would take it.
template <class Work>
void in_pieces(int64_t units, Work work) {
  for (int64_t begin = 0; begin < units;) {
    const int64_t end = begin + integer(1, units - begin);
    work(begin, end);
    begin = end;
  }
}

template <class S>
double check(const Call<S>& call, const saccade::Kernels& kernels) {
  typedef Compute<S> T;
  const Problem& p = call.problem;
  const Results expected = naive(call);
  S poison;
  std::memset(&poison, 0xff, sizeof poison);  // NaN in every storage type
  const T no_number = std::numeric_limits<T>::quiet_NaN();
  Lines<S> output(expected.output.size(), poison);
  Lines<S> grad_value(expected.grad_value.size(), poison);
  Lines<T> grad_locations(call.locations.size(), no_number);
  Lines<T> grad_weights(call.weights.size(), no_number);
  const saccade::Value value = {call.value.data(), p.num_positions * call.row_stride(),
                                call.row_stride(), p.head_dim};
  in_pieces(p.forward_units(), [&](int64_t begin, int64_t end) {
    kernels.forward(p, value, call.locations.data(), call.weights.data(), output.data(), begin,
                    end);
  });
  if (p.adds_in_place()) {
    std::fill(grad_value.begin(), grad_value.end(), S{});
  }
  in_pieces(p.backward_value_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_value(p, call.grad_output.data(), call.locations.data(), call.weights.data(),
                           grad_value.data(), begin, end);
  });
  in_pieces(p.backward_points_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_points(p, value, call.grad_output.data(), call.locations.data(),
                            call.weights.data(), grad_locations.data(), grad_weights.data(), begin,
                            end);
  });
  double largest = 0;
  for (const double error :
       {difference(output, expected.output), difference(grad_value, expected.grad_value),
        difference(grad_locations, expected.grad_locations),
        difference(grad_weights, expected.grad_weights)}) {
    if (std::isnan(error)) return error;
    largest = std::max(largest, error);
  }
  return largest;
}

template <class S>
bool check_all(int64_t calls) {
  bool good = true;
  for (const std::string& name : saccade::available_kernels()) {
    saccade::set_active_kernels(name);
    generator.seed(7);
    double largest = 0;
    for (int64_t i = 0; i < calls; ++i) {
      const double error = check(draw<S>(), saccade::active_kernels());
      largest = std::isnan(error) || error > largest ? error : largest;
      if (std::isnan(error)) break;
    }
    std::printf("%s %s: largest relative error %.3g in %lld calls\n", name.c_str(), Stored<S>::name,
                largest, static_cast<long long>(calls));
    good = good && largest <= Stored<S>::tolerance;
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 300;
  const bool good[] = {check_all<float>(calls), check_all<double>(calls), check_all<Half>(calls),
                       check_all<BFloat16>(calls)};
  return std::all_of(std::begin(good), std::end(good), [](bool one) { return one; }) ? 0 : 1;
}
