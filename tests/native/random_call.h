// Random calls of the kernels, without torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "guarded.h"
#include "kernels.h"
#include "stored.h"

using saccade::Call;
using saccade::Coordinates;
using saccade::Interpolation;
using saccade::Level;
using saccade::Padding;
using saccade::Plan;

inline std::mt19937 generator(0);

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline double real(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

template <class S>
struct RandomCall {
  typedef Compute<S> T;
  Plan plan;
  int64_t row_padding;  // unused elements between the rows of the value
  Guarded<S> value, grad_output;
  // What the kernel must arrive at, and the tensors that it starts from where these differ.
  Guarded<T> locations, weights;
  Guarded<T> references, offsets, logits;

  const Call& call() const { return plan.call; }
  saccade::PointInputs inputs() const {
    return {call().has_references() ? references.data() : nullptr,
            call().has_references() ? offsets.data() : locations.data(),
            call().softmax ? logits.data() : weights.data()};
  }
  saccade::Value described_value() const {
    return {value.data(), call().num_positions * row_stride(), row_stride(), call().head_dim};
  }

  // The factor of offset `i`, without the size of its box.
  T offset_step(int64_t i) const {
    const int64_t point = i / call().spatial_dims % call().total_points;
    const Level* level = &call().levels[0];
    while (point >= level->first_point + level->num_points) ++level;
    if (call().references_are_boxes) return static_cast<T>(0.5 / level->num_points);
    const int64_t sizes[] = {level->width, level->height, level->depth};
    const int64_t size = sizes[i % call().spatial_dims];
    const int64_t pixels = call().coordinates == Coordinates::normalized           ? size
                           : call().coordinates == Coordinates::normalized_corners ? size - 1
                                                                                   : 1;
    return pixels > 0 ? T(1) / static_cast<T>(pixels) : T(0);
  }
  // The index in `references` of the coordinate that offset `i` starts from.
  int64_t reference_element(int64_t i) const {
    const int64_t axes = call().spatial_dims, point = i / axes;
    const int64_t query = point / call().total_points / call().num_heads;
    const int64_t reference = call().reference_index[point % call().total_points];
    return (query * call().num_references + reference) * call().reference_size() + i % axes;
  }

  int64_t row_stride() const { return call().value_heads * call().head_dim + row_padding; }
  int64_t row(int64_t batch_index, int64_t position, int64_t head) const {
    return (batch_index * call().num_positions + position) * row_stride() +
           (call().value_heads > 1 ? head : 0) * call().head_dim;
  }
};

// Rounded step by step, as in the kernel.
template <class S>
void compute_locations(RandomCall<S>& random) {
  typedef Compute<S> T;
  const Call& call = random.call();
  for (size_t i = 0; i < random.offsets.size(); ++i) {
    const T* reference = &random.references[random.reference_element(i)];
    volatile T moved = random.offsets[i] * random.offset_step(i);
    if (call.references_are_boxes) moved = moved * reference[call.spatial_dims];
    random.locations[i] = reference[0] + moved;
  }
}

template <class S>
void compute_weights(RandomCall<S>& random) {
  typedef Compute<S> T;
  const int64_t total_points = random.call().total_points;
  for (size_t first = 0; first < random.logits.size(); first += total_points) {
    const T* logits = &random.logits[first];
    const double max = *std::max_element(logits, logits + total_points);
    double sum = 0;
    for (int64_t k = 0; k < total_points; ++k) sum += std::exp(logits[k] - max);
    for (int64_t k = 0; k < total_points; ++k)
      random.weights[first + k] = static_cast<T>(std::exp(logits[k] - max) / sum);
  }
}

template <class S>
void draw_points(RandomCall<S>& random) {
  typedef Compute<S> T;
  const Call& call = random.call();
  const T extreme[] = {std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN(),
                       std::numeric_limits<T>::max(),
                       std::numeric_limits<T>::lowest(),
                       T(1e9),
                       T(-0.0),
                       T(3e15)};
  const auto fill = [&](Guarded<T>& elements, int64_t count, double low, double high) {
    elements.resize(count);
    for (T& element : elements)
      element = integer(0, 30) ? static_cast<T>(real(low, high)) : extreme[integer(0, 7)];
  };
  const int64_t points = call.total_queries() * call.num_heads * call.total_points;
  const double reach = call.coordinates == Coordinates::pixel ? 8 : 1.4;
  random.weights.resize(points);
  for (T& weight : random.weights) weight = static_cast<T>(real(0, 1));
  fill(random.locations, call.spatial_dims * points, -0.4 * reach, reach);
  if (call.has_references()) {
    fill(random.references, call.total_queries() * call.num_references * call.reference_size(),
         -0.1 * reach, 0.8 * reach);
    fill(random.offsets, call.spatial_dims * points, -3, 3);
    compute_locations(random);
  }
  if (call.softmax) {
    random.logits.resize(points);
    for (T& logit : random.logits) logit = static_cast<T>(real(-4, 4));
    compute_weights(random);
  }
}

template <class S>
RandomCall<S> draw() {
  Call call;
  call.storage = Stored<S>::kind;
  const int64_t rule = integer(0, 5);
  call.interpolation = rule > 1    ? Interpolation::linear
                       : rule == 1 ? Interpolation::nearest
                                   : Interpolation::discrete;
  call.coordinates = static_cast<Coordinates>(integer(0, 2));
  call.spatial_dims = integer(0, 2) ? 2 : integer(1, 3);
  const bool by_height = rule == 0 && call.spatial_dims == 2 && integer(0, 1);
  call.padding = by_height       ? Padding::border_height
                 : integer(0, 1) ? Padding::zeros
                                 : Padding::border;
  call.batch_size = integer(0, 2);
  call.first_queries = {0};
  const int64_t num_queries = integer(0, 9) ? integer(0, 20) : integer(100, 300);
  const bool ragged = integer(0, 1);
  for (int64_t batch_index = 0; batch_index < call.batch_size; ++batch_index) {
    call.first_queries.push_back(call.first_queries.back() +
                                 (ragged ? integer(0, num_queries) : num_queries));
  }
  call.num_heads = integer(1, 3);
  call.value_heads = integer(0, 2) ? call.num_heads : 1;
  call.head_dim = integer(0, 1) ? integer(1, 40) : 16 * integer(1, 6);
  const int64_t num_levels = integer(1, 4);
  for (int64_t i = 0; i < num_levels; ++i) {
    const int64_t depth = call.spatial_dims > 2 ? integer(1, 4) : 1;
    const int64_t height = call.spatial_dims > 1 ? integer(1, 7) : 1;
    const int64_t width = integer(1, call.spatial_dims > 1 ? 7 : 30);
    const int64_t points = integer(0, 2) ? integer(1, 5) : 16;  // 16: whole vectors, whole lines
    call.levels.push_back({depth, height, width, call.num_positions, call.total_points, points});
    call.num_positions += depth * height * width;
    call.total_points += points;
  }
  if (integer(0, 1)) {
    call.num_references = integer(1, 5);
    call.references_are_boxes = integer(0, 1);
    for (int64_t k = 0; k < call.total_points; ++k) {
      call.reference_index.push_back(integer(0, call.num_references - 1));
    }
  }
  call.softmax = integer(0, 1);
  RandomCall<S> random;
  random.plan = saccade::make_plan(std::move(call), integer(1, 8));
  // Whatever the size.
  random.plan.streams_results = integer(0, 1);
  for (saccade::PlannedLevel& level : random.plan.levels) {
    level.fetched_ahead = integer(0, 1);
  }
  random.row_padding = integer(0, 2) ? 0 : integer(1, 5);
  const int64_t rows = random.call().batch_size * random.call().num_positions;
  random.value.resize(rows > 0 ? rows * random.row_stride() - random.row_padding : 0);
  for (S& element : random.value) element = Stored<S>::encode(real(-1, 1));
  random.grad_output.resize(random.call().total_queries() * random.call().num_heads *
                            random.call().head_dim);
  for (S& element : random.grad_output) element = Stored<S>::encode(real(-1, 1));
  draw_points(random);
  return random;
}
