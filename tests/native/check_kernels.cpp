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
#include "random_call.h"
#include "stored.h"

namespace {

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

struct Results {
  std::vector<double> output, grad_value, grad_references, grad_locations, grad_weights;
};

// One axis of a position: 1 - |position - cell| for the cells within 1 of it, and its slope.
struct Position {
  double at, slope;
};

template <class T>
Position position(T location, int64_t size, int64_t height, const Problem& problem) {
  const T scale = problem.coordinates == Coordinates::normalized           ? T(size)
                  : problem.coordinates == Coordinates::normalized_corners ? T(size - 1)
                                                                           : T(1);
  // Rounded to T as in the kernel: near a tie or an edge that decides.
  const volatile T product = location * scale;
  const bool discrete = problem.interpolation == Interpolation::discrete;
  const T shift = (problem.coordinates == Coordinates::normalized ? -0.5 : 0) + (discrete ? 1 : 0);
  const T shifted = product + shift;
  Position found = {shifted, scale};
  if (problem.padding != Padding::zeros) {
    const int64_t last =
        (problem.padding == Padding::border_height ? std::min(size, height) : size) - 1;
    if (!(found.at > 0 && found.at < last)) found.slope = 0;
    found.at = std::fmin(std::fmax(found.at, 0), last);
  }
  if (discrete) {
    found = {std::floor(found.at), 0};
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

// From the gradients of locations and weights to those of what they are made of.
template <class S>
void chain(const Call<S>& call, Results& results) {
  const Problem& p = call.problem;
  results.grad_references.assign(call.references.size(), 0);
  for (size_t i = 0; i < call.offsets.size(); ++i) {
    double& grad = results.grad_locations[i];
    if (grad == 0) continue;  // also of a point without a finite location
    const int64_t from = call.reference(i);
    results.grad_references[from] += grad;
    const double step = call.step(i);
    if (p.references_are_boxes) {
      results.grad_references[from + p.spatial_dims] += grad * call.offsets[i] * step;
      grad *= call.references[from + p.spatial_dims];
    }
    grad *= step;
  }
  for (size_t first = 0; first < call.logits.size(); first += p.total_points) {
    double sum = 0;
    for (size_t k = first; k < first + p.total_points; ++k)
      sum += call.weights[k] * results.grad_weights[k];
    for (size_t k = first; k < first + p.total_points; ++k)
      results.grad_weights[k] = call.weights[k] * (results.grad_weights[k] - sum);
  }
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
    for (int64_t q = p.first_queries[b]; q < p.first_queries[b + 1]; ++q)
      for (int64_t m = 0; m < p.num_heads; ++m)
        for (const saccade::Level& level : p.levels)
          for (int64_t k = 0; k < level.num_points; ++k) {
            const int64_t query = q * p.num_heads + m;
            const int64_t point = query * p.total_points + level.first_point + k;
            const int64_t axes = p.spatial_dims;
            const auto* location = &call.locations[axes * point];
            if (!std::all_of(location, location + axes, [](double n) { return std::isfinite(n); }))
              continue;
            // An axis that the map does not have is one cell, looked at squarely.
            const int64_t sizes[3] = {level.width, level.height, level.depth};
            Position at[3] = {};
            for (int64_t n = 0; n < axes; ++n)
              at[n] = position(location[n], sizes[n], level.height, p);
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
  if (p.is_fused()) chain(call, results);
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
  Lines<T> of_heads(expected.grad_references.size() * p.num_heads, no_number);
  const saccade::PointGradients to = {p.is_fused() ? of_heads.data() : nullptr,
                                      grad_locations.data(), grad_weights.data()};
  const saccade::Value value = {call.value.data(), p.num_positions * call.row_stride(),
                                call.row_stride(), p.head_dim};
  in_pieces(p.forward_units(), [&](int64_t begin, int64_t end) {
    kernels.forward(p, value, call.points(), output.data(), begin, end);
  });
  if (p.adds_in_place()) {
    std::fill(grad_value.begin(), grad_value.end(), S{});
  }
  in_pieces(p.backward_value_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_value(p, call.grad_output.data(), call.points(), grad_value.data(), begin,
                           end);
  });
  in_pieces(p.backward_points_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_points(p, value, call.grad_output.data(), call.points(), to, begin, end);
  });
  // Of every head by itself: summed by whoever asked.
  Lines<T> grad_references(expected.grad_references.size(), 0);
  const int64_t of_query = p.num_references * p.reference_size();
  for (size_t i = 0; i < of_heads.size(); ++i) {
    grad_references[i / (of_query * p.num_heads) * of_query + i % of_query] += of_heads[i];
  }
  double largest = 0;
  for (const double error :
       {difference(output, expected.output), difference(grad_value, expected.grad_value),
        difference(grad_references, expected.grad_references),
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
