// Random calls of every kernel that this processor runs, against loops in double, without torch: to
// be built for other processors and run under emulation, and with sanitizers. All tensors are their
// own allocations, so that a sanitizer sees the first byte read or written outside of one.
//
// Usage: check_kernels [number of calls]; prints the largest error of each kernel, exits with 1 if
// it is too large.

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "deformable_attention.h"

namespace {

using saccade::Coordinates;
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

// A call with everything in T (float or double) and the same numbers in double.
template <class T>
struct Call {
  Problem problem;
  std::vector<T> value, locations, weights, grad_output;
};

template <class T>
Call<T> draw() {
  Call<T> call;
  Problem& problem = call.problem;
  problem.storage = sizeof(T) == sizeof(float) ? Storage::float32 : Storage::float64;
  problem.interpolation = integer(0, 3) ? Interpolation::linear : Interpolation::nearest;
  problem.padding = integer(0, 1) ? Padding::zeros : Padding::border;
  problem.coordinates = static_cast<Coordinates>(integer(0, 2));
  problem.batch_size = integer(0, 2);
  problem.num_queries = integer(0, 9) ? integer(0, 20) : integer(100, 300);
  problem.num_heads = integer(1, 3);
  problem.value_heads = integer(0, 2) ? problem.num_heads : 1;
  problem.head_dim = integer(0, 1) ? integer(1, 40) : 16 * integer(1, 6);
  const int64_t num_levels = integer(1, 4);
  for (int64_t i = 0; i < num_levels; ++i) {
    const int64_t height = integer(1, 7), width = integer(1, 7), points = integer(1, 5);
    problem.levels.push_back({height, width, problem.num_positions, problem.total_points, points});
    problem.num_positions += height * width;
    problem.total_points += points;
  }
  problem.prepare(integer(1, 8));
  const auto fill = [](std::vector<T>& numbers, int64_t count, double low, double high) {
    numbers.resize(count);
    for (T& number : numbers) {
      number = static_cast<T>(real(low, high));
    }
  };
  const int64_t points =
      problem.batch_size * problem.num_queries * problem.num_heads * problem.total_points;
  const double reach = problem.coordinates == Coordinates::pixel ? 8 : 1.4;
  fill(call.value,
       problem.batch_size * problem.num_positions * problem.value_heads * problem.head_dim, -1, 1);
  fill(call.locations, 2 * points, -0.4 * reach, reach);
  fill(call.weights, points, 0, 1);
  fill(call.grad_output,
       problem.batch_size * problem.num_queries * problem.num_heads * problem.head_dim, -1, 1);
  const T extreme[] = {std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN(),
                       std::numeric_limits<T>::max(),
                       std::numeric_limits<T>::lowest(),
                       T(1e9),
                       T(-0.0),
                       T(3e15)};
  for (T& location : call.locations) {
    if (integer(0, 30) == 0) {
      location = extreme[integer(0, 7)];
    }
  }
  return call;
}

double to_pixel(double location, int64_t size, const Problem& problem) {
  switch (problem.coordinates) {
    case Coordinates::normalized:
      return location * size - 0.5;
    case Coordinates::normalized_corners:
      return location * (size - 1);
    default:
      return location;
  }
}

// Output and gradient of the value; the gradients of locations and weights are left to the Python
// tests, here they must only stay inside their memory and be finite.
template <class T>
void naive(const Call<T>& call, std::vector<double>& output, std::vector<double>& grad_value) {
  const Problem& p = call.problem;
  output.assign(call.grad_output.size(), 0);
  grad_value.assign(call.value.size(), 0);
  for (int64_t b = 0; b < p.batch_size; ++b)
    for (int64_t q = 0; q < p.num_queries; ++q)
      for (int64_t m = 0; m < p.num_heads; ++m)
        for (const saccade::Level& level : p.levels)
          for (int64_t k = 0; k < level.num_points; ++k) {
            const int64_t row = (b * p.num_queries + q) * p.num_heads + m;
            const int64_t point = row * p.total_points + level.first_point + k;
            const double given_x = call.locations[2 * point];
            const double given_y = call.locations[2 * point + 1];
            if (!std::isfinite(given_x) || !std::isfinite(given_y)) continue;
            double x = to_pixel(given_x, level.width, p), y = to_pixel(given_y, level.height, p);
            // The kernel's position is rounded to T; near a tie or an edge that decides.
            x = static_cast<T>(x);
            y = static_cast<T>(y);
            if (p.padding == Padding::border) {
              x = std::fmin(std::fmax(x, 0), level.width - 1);
              y = std::fmin(std::fmax(y, 0), level.height - 1);
            }
            if (p.interpolation == Interpolation::nearest) {
              x = std::nearbyint(x);
              y = std::nearbyint(y);
            }
            for (int64_t row_y = 0; row_y < level.height; ++row_y)
              for (int64_t column = 0; column < level.width; ++column) {
                const double share = std::fmax(0, 1 - std::fabs(x - column)) *
                                     std::fmax(0, 1 - std::fabs(y - row_y)) * call.weights[point];
                if (share == 0) continue;
                const int64_t from =
                    ((b * p.num_positions + level.first_row + row_y * level.width + column) *
                         p.value_heads +
                     (p.value_heads > 1 ? m : 0)) *
                    p.head_dim;
                for (int64_t d = 0; d < p.head_dim; ++d) {
                  output[row * p.head_dim + d] += share * call.value[from + d];
                  grad_value[from + d] += share * call.grad_output[row * p.head_dim + d];
                }
              }
          }
}

template <class T>
double largest_difference(const std::vector<T>& actual, const std::vector<double>& expected) {
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double difference = std::fabs(actual[i] - expected[i]);
    largest = difference > largest || std::isnan(difference) ? difference : largest;
    if (std::isnan(difference)) return difference;
  }
  return largest;
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

template <class T>
double check(const Call<T>& call, const saccade::Kernels& kernels) {
  const Problem& p = call.problem;
  std::vector<double> expected, expected_grad_value;
  naive(call, expected, expected_grad_value);
  const T poison = std::numeric_limits<T>::quiet_NaN();
  std::vector<T> output(call.grad_output.size(), poison), grad_value(call.value.size(), poison),
      grad_locations(call.locations.size(), poison), grad_weights(call.weights.size(), poison);
  const int64_t row_stride = p.value_heads * p.head_dim;
  const saccade::Value value = {call.value.data(), p.num_positions * row_stride, row_stride,
                                p.head_dim};
  in_pieces(p.forward_units(), [&](int64_t begin, int64_t end) {
    kernels.forward(p, value, call.locations.data(), call.weights.data(), output.data(), begin,
                    end);
  });
  in_pieces(p.backward_value_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_value(p, call.grad_output.data(), call.locations.data(), call.weights.data(),
                           grad_value.data(), begin, end);
  });
  in_pieces(p.backward_points_units(), [&](int64_t begin, int64_t end) {
    kernels.backward_points(p, value, call.grad_output.data(), call.locations.data(),
                            call.weights.data(), grad_locations.data(), grad_weights.data(), begin,
                            end);
  });
  for (const auto* gradients : {&grad_locations, &grad_weights}) {
    for (T gradient : *gradients) {
      if (!std::isfinite(gradient)) return poison;
    }
  }
  return std::fmax(largest_difference(output, expected),
                   largest_difference(grad_value, expected_grad_value));
}

template <class T>
bool check_all(int64_t calls, double allowed, const char* type) {
  bool good = true;
  for (const std::string& name : saccade::available_kernels()) {
    saccade::set_active_kernels(name);
    generator.seed(7);
    double largest = 0;
    for (int64_t i = 0; i < calls; ++i) {
      const double error = check(draw<T>(), saccade::active_kernels());
      largest = std::isnan(error) || error > largest ? error : largest;
      if (std::isnan(error)) break;
    }
    std::printf("%s %s: largest error %.3g in %lld calls\n", name.c_str(), type, largest,
                static_cast<long long>(calls));
    good = good && largest <= allowed;
  }
  return good;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t calls = argc > 1 ? std::atoll(argv[1]) : 300;
  const bool floats = check_all<float>(calls, 5e-5, "float32");
  const bool doubles = check_all<double>(calls, 1e-12, "float64");
  return floats && doubles ? 0 : 1;
}
