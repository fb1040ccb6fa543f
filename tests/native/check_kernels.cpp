// Random calls of every kernel that this processor runs, compared with loops in double, without
// torch: to be built for other processors and run under emulation, with other compilers and with
// sanitizers. All tensors lie between guard pages (see guarded.h).
//
// Usage: check_kernels [number of calls [instruction set]]; prints the largest error of each kernel
// and storage type, exits with 1 if one is too large.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "guarded.h"
#include "kernels.h"
#include "random_call.h"
#include "stored.h"

namespace {

struct Results {
  std::vector<double> output, grad_value, grad_references, grad_points, grad_weights;
};

// One axis of a position: 1 - |position - cell| for the cells within 1 of it, and its slope.
struct Position {
  double pixel, slope;
};

template <class T>
Position find_position(T location, int64_t size, int64_t height, const Call& call) {
  const T scale = call.coordinates == Coordinates::normalized           ? T(size)
                  : call.coordinates == Coordinates::normalized_corners ? T(size - 1)
                                                                        : T(1);
  // Rounded to T as in the kernel: near a tie or an edge that decides.
  const volatile T product = location * scale;
  const bool discrete = call.interpolation == Interpolation::discrete;
  const T shift = (call.coordinates == Coordinates::normalized ? -0.5 : 0) + (discrete ? 1 : 0);
  const T shifted = product + shift;
  Position position = {shifted, scale};
  if (call.padding != Padding::zeros) {
    const int64_t last =
        (call.padding == Padding::border_height ? std::min(size, height) : size) - 1;
    if (!(position.pixel > 0 && position.pixel < last)) position.slope = 0;
    position.pixel = std::fmin(std::fmax(position.pixel, 0), last);
  }
  if (discrete) {
    position = {std::floor(position.pixel), 0};
  }
  if (call.interpolation == Interpolation::nearest) {
    position = {std::nearbyint(position.pixel), 0};
  }
  return position;
}

double cell_weight(Position p, int64_t cell) { return std::fmax(0, 1 - std::fabs(p.pixel - cell)); }
// The position's own cell is the one below it; the next gains what that one loses.
double cell_slope(Position p, int64_t cell) {
  const double below = std::floor(p.pixel);
  return cell == below ? -p.slope : cell == below + 1 ? p.slope : 0;
}

// From the gradients of locations to those of the offsets and reference points.
template <class S>
void chain_references(const RandomCall<S>& random, Results& results) {
  const Call& call = random.call();
  results.grad_references.assign(random.references.size(), 0);
  for (size_t i = 0; i < random.offsets.size(); ++i) {
    double& grad = results.grad_points[i];
    if (grad == 0) continue;  // also of a point without a finite location
    const int64_t element = random.reference_element(i);
    results.grad_references[element] += grad;
    const double step = random.offset_step(i);
    if (call.references_are_boxes) {
      results.grad_references[element + call.spatial_dims] += grad * random.offsets[i] * step;
      grad *= random.references[element + call.spatial_dims];
    }
    grad *= step;
  }
}

// From the gradients of attention weights to those of logits.
template <class S>
void chain_softmax(const RandomCall<S>& random, Results& results) {
  const size_t total_points = random.call().total_points;
  for (size_t first = 0; first < random.logits.size(); first += total_points) {
    double sum = 0;
    for (size_t k = first; k < first + total_points; ++k)
      sum += random.weights[k] * results.grad_weights[k];
    for (size_t k = first; k < first + total_points; ++k)
      results.grad_weights[k] = random.weights[k] * (results.grad_weights[k] - sum);
  }
}

// Adds what one point contributes to all results.
template <class S>
void add_point(const RandomCall<S>& random, int64_t batch_index, int64_t pair, int64_t head,
               const Level& level, int64_t point, Results& results) {
  const Call& call = random.call();
  const int64_t axes = call.spatial_dims;
  const auto* location = &random.locations[axes * point];
  if (!std::all_of(location, location + axes, [](double x) { return std::isfinite(x); })) return;
  // An axis that the map does not have is a single cell, with the position at its centre.
  const int64_t sizes[3] = {level.width, level.height, level.depth};
  Position positions[3] = {};
  for (int64_t n = 0; n < axes; ++n)
    positions[n] = find_position(location[n], sizes[n], level.height, call);
  const double attention = random.weights[point];
  for (int64_t cell = 0; cell < level.num_rows(); ++cell) {
    const int64_t cells[3] = {cell % level.width, cell / level.width % level.height,
                              cell / level.width / level.height};
    double weight = 1, slopes[3] = {1, 1, 1};
    for (int64_t n = 0; n < 3; ++n) {
      const double share = cell_weight(positions[n], cells[n]);
      weight *= share;
      for (int64_t by = 0; by < 3; ++by)
        slopes[by] *= by == n ? cell_slope(positions[n], cells[n]) : share;
    }
    if (weight == 0 && slopes[0] == 0 && slopes[1] == 0 && slopes[2] == 0) continue;
    const int64_t position = level.first_row + cell;
    const int64_t row = random.row(batch_index, position, head);
    const int64_t value_head = call.value_heads > 1 ? head : 0;
    const int64_t grad_row = (batch_index * call.num_positions + position) * call.value_heads;
    double* grad_value = &results.grad_value[(grad_row + value_head) * call.head_dim];
    double dot = 0;
    for (int64_t d = 0; d < call.head_dim; ++d) {
      const double value = Stored<S>::decode(random.value[row + d]);
      const double grad = Stored<S>::decode(random.grad_output[pair * call.head_dim + d]);
      results.output[pair * call.head_dim + d] += attention * weight * value;
      grad_value[d] += attention * weight * grad;
      dot += grad * value;
    }
    results.grad_weights[point] += weight * dot;
    for (int64_t n = 0; n < axes; ++n)
      results.grad_points[axes * point + n] += attention * slopes[n] * dot;
  }
}

template <class S>
Results compute_naively(const RandomCall<S>& random) {
  const Call& call = random.call();
  Results results;
  results.output.assign(random.grad_output.size(), 0);
  results.grad_value.assign(call.batch_size * call.num_positions * call.value_heads * call.head_dim,
                            0);
  results.grad_points.assign(random.locations.size(), 0);
  results.grad_weights.assign(random.weights.size(), 0);
  for (int64_t b = 0; b < call.batch_size; ++b)
    for (int64_t q = call.first_queries[b]; q < call.first_queries[b + 1]; ++q)
      for (int64_t m = 0; m < call.num_heads; ++m)
        for (const Level& level : call.levels)
          for (int64_t k = 0; k < level.num_points; ++k) {
            const int64_t pair = q * call.num_heads + m;
            const int64_t point = pair * call.total_points + level.first_point + k;
            add_point(random, b, pair, m, level, point, results);
          }
  if (call.has_references()) chain_references(random, results);
  if (call.softmax) chain_softmax(random, results);
  return results;
}

double decode(float element) { return element; }
double decode(double element) { return element; }
double decode(Half element) { return Stored<Half>::decode(element); }
double decode(BFloat16 element) { return Stored<BFloat16>::decode(element); }

// The largest difference relative to the largest expected element; NaN if one is NaN.
template <class S>
double difference(const Guarded<S>& actual, const std::vector<double>& expected) {
  double max_error = 0, scale = 1;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double error = std::fabs(decode(actual[i]) - expected[i]);
    if (std::isnan(error)) return error;
    max_error = std::max(max_error, error);
    scale = std::max(scale, std::fabs(expected[i]));
  }
  return max_error / scale;
}

// Work comes in pieces, as threads would take it.
template <class Work>
void in_pieces(int64_t count, Work work) {
  for (int64_t begin = 0; begin < count;) {
    const int64_t end = begin + integer(1, count - begin);
    work(begin, end);
    begin = end;
  }
}

template <class S>
double check(const RandomCall<S>& random, const saccade::Kernels& kernels) {
  typedef Compute<S> T;
  const Plan& plan = random.plan;
  const Call& call = plan.call;
  const saccade::PointInputs inputs = random.inputs();
  const Results expected = compute_naively(random);
  S poison;
  std::memset(&poison, 0xff, sizeof poison);  // NaN in every storage type
  const T nan = std::numeric_limits<T>::quiet_NaN();
  Guarded<S> output(expected.output.size(), poison);
  Guarded<S> grad_value(expected.grad_value.size(), poison);
  Guarded<T> grad_points(random.locations.size(), nan);
  Guarded<T> grad_weights(random.weights.size(), nan);
  Guarded<T> grad_references_per_head(expected.grad_references.size() * call.num_heads, nan);
  const saccade::PointGradients gradients = {
      call.has_references() ? grad_references_per_head.data() : nullptr, grad_points.data(),
      grad_weights.data()};
  const saccade::Value value = random.described_value();
  in_pieces(plan.num_tiles(), [&](int64_t begin, int64_t end) {
    kernels.forward(plan, value, inputs, output.data(), begin, end);
  });
  if (plan.adds_in_place()) {
    std::fill(grad_value.begin(), grad_value.end(), S{});
  }
  in_pieces(plan.num_value_tasks(), [&](int64_t begin, int64_t end) {
    kernels.backward_value(plan, random.grad_output.data(), inputs, grad_value.data(), begin, end);
  });
  in_pieces(plan.num_tiles(), [&](int64_t begin, int64_t end) {
    kernels.backward_points(plan, value, random.grad_output.data(), inputs, gradients, begin, end);
  });
  // The caller of the kernels sums over heads.
  Guarded<T> grad_references(expected.grad_references.size(), 0);
  const int64_t elements_per_query = call.num_references * call.reference_size();
  for (size_t i = 0; i < grad_references_per_head.size(); ++i) {
    const int64_t query = i / (elements_per_query * call.num_heads);
    grad_references[query * elements_per_query + i % elements_per_query] +=
        grad_references_per_head[i];
  }
  double max_error = 0;
  for (const double error :
       {difference(output, expected.output), difference(grad_value, expected.grad_value),
        difference(grad_references, expected.grad_references),
        difference(grad_points, expected.grad_points),
        difference(grad_weights, expected.grad_weights)}) {
    if (std::isnan(error)) return error;
    max_error = std::max(max_error, error);
  }
  return max_error;
}

template <class S>
bool check_all(const std::vector<std::string>& isas, int64_t num_calls) {
  bool passed = true;
  for (const std::string& isa : isas) {
    saccade::set_active_kernels(isa);
    generator.seed(7);
    double max_error = 0;
    for (int64_t i = 0; i < num_calls; ++i) {
      const double error = check(draw<S>(), saccade::active_kernels());
      max_error = std::isnan(error) || error > max_error ? error : max_error;
      if (std::isnan(error)) break;
    }
    std::printf("%s %s: largest relative error %.3g in %lld calls\n", isa.c_str(), Stored<S>::name,
                max_error, static_cast<long long>(num_calls));
    std::fflush(stdout);
    passed = passed && max_error <= Stored<S>::tolerance;
  }
  return passed;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t num_calls = argc > 1 ? std::atoll(argv[1]) : 300;
  const std::vector<std::string> isas =
      argc > 2 ? std::vector<std::string>{argv[2]} : saccade::available_kernels();
  const bool passed[] = {check_all<float>(isas, num_calls), check_all<double>(isas, num_calls),
                         check_all<Half>(isas, num_calls), check_all<BFloat16>(isas, num_calls)};
  return std::all_of(std::begin(passed), std::end(passed), [](bool one) { return one; }) ? 0 : 1;
}
