// Random calls of the kernels, without torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "deformable_attention.h"
#include "stored.h"

using saccade::Coordinates;
using saccade::Interpolation;
using saccade::Padding;
using saccade::Problem;

inline std::mt19937 generator(0);

inline int64_t integer(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(generator);
}
inline double real(double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(generator);
}

template <class S>
struct Call {
  typedef Compute<S> T;
  Problem problem;
  int64_t row_padding;  // numbers between the rows of the value that belong to nobody
  std::vector<S> value, grad_output;
  // As the kernel is to find them; of a fused call references, offsets and logits make them.
  std::vector<T> locations, weights;
  std::vector<T> references, offsets, logits;

  saccade::PointInputs points() const {
    if (!problem.is_fused()) return {nullptr, locations.data(), weights.data()};
    return {references.data(), offsets.data(), logits.data()};
  }
  // What offset `i` of those of all points is multiplied by, without the size of its box.
  T step(int64_t i) const {
    const int64_t point = i / problem.spatial_dims % problem.total_points;
    const saccade::Level* level = &problem.levels[0];
    while (point >= level->first_point + level->num_points) ++level;
    if (problem.references_are_boxes) return static_cast<T>(0.5 / level->num_points);
    const int64_t sizes[] = {level->width, level->height, level->depth};
    const int64_t size = sizes[i % problem.spatial_dims];
    const int64_t pixels = problem.coordinates == Coordinates::normalized           ? size
                           : problem.coordinates == Coordinates::normalized_corners ? size - 1
                                                                                    : 1;
    return pixels > 0 ? T(1) / static_cast<T>(pixels) : T(0);
  }
  // Where the coordinate that offset `i` starts from is among all references.
  int64_t reference(int64_t i) const {
    const int64_t axes = problem.spatial_dims, point = i / axes;
    const int64_t query = point / problem.total_points / problem.num_heads;
    const int64_t number = problem.reference_index[point % problem.total_points];
    return (query * problem.num_references + number) * problem.reference_size() + i % axes;
  }

  int64_t row_stride() const { return problem.value_heads * problem.head_dim + row_padding; }
  int64_t row(int64_t batch, int64_t position, int64_t head) const {
    return (batch * problem.num_positions + position) * row_stride() +
           (problem.value_heads > 1 ? head : 0) * problem.head_dim;
  }
};

// Locations and weights of a fused call, rounded step by step as in the kernel.
template <class S>
void unfuse(Call<S>& call) {
  typedef Compute<S> T;
  const Problem& p = call.problem;
  for (size_t i = 0; i < call.offsets.size(); ++i) {
    const T* from = &call.references[call.reference(i)];
    volatile T moved = call.offsets[i] * call.step(i);
    if (p.references_are_boxes) moved = moved * from[p.spatial_dims];
    call.locations[i] = from[0] + moved;
  }
  for (size_t first = 0; first < call.logits.size(); first += p.total_points) {
    const T* logits = &call.logits[first];
    const double most = *std::max_element(logits, logits + p.total_points);
    double sum = 0;
    for (int64_t k = 0; k < p.total_points; ++k) sum += std::exp(logits[k] - most);
    for (int64_t k = 0; k < p.total_points; ++k)
      call.weights[first + k] = static_cast<T>(std::exp(logits[k] - most) / sum);
  }
}

template <class S>
void draw_points(Call<S>& call) {
  typedef Compute<S> T;
  const Problem& problem = call.problem;
  const T extreme[] = {std::numeric_limits<T>::infinity(),
                       -std::numeric_limits<T>::infinity(),
                       std::numeric_limits<T>::quiet_NaN(),
                       std::numeric_limits<T>::max(),
                       std::numeric_limits<T>::lowest(),
                       T(1e9),
                       T(-0.0),
                       T(3e15)};
  const auto fill = [&](std::vector<T>& numbers, int64_t count, double low, double high) {
    numbers.resize(count);
    for (T& number : numbers)
      number = integer(0, 30) ? static_cast<T>(real(low, high)) : extreme[integer(0, 7)];
  };
  const int64_t points = problem.total_queries() * problem.num_heads * problem.total_points;
  const double reach = problem.coordinates == Coordinates::pixel ? 8 : 1.4;
  call.weights.resize(points);
  for (T& weight : call.weights) weight = static_cast<T>(real(0, 1));
  fill(call.locations, problem.spatial_dims * points, -0.4 * reach, reach);
  if (!problem.is_fused()) return;
  fill(call.references, problem.total_queries() * problem.num_references * problem.reference_size(),
       -0.1 * reach, 0.8 * reach);
  fill(call.offsets, problem.spatial_dims * points, -3, 3);
  call.logits.resize(points);
  for (T& logit : call.logits) logit = static_cast<T>(real(-4, 4));
  unfuse(call);
}

template <class S>
Call<S> draw() {
  Call<S> call;
  Problem& problem = call.problem;
  problem.storage = Stored<S>::kind;
  const int64_t rule = integer(0, 5);
  problem.interpolation = rule > 1    ? Interpolation::linear
                          : rule == 1 ? Interpolation::nearest
                                      : Interpolation::discrete;
  problem.coordinates = static_cast<Coordinates>(integer(0, 2));
  problem.spatial_dims = integer(0, 2) ? 2 : integer(1, 3);
  const bool by_height = rule == 0 && problem.spatial_dims == 2 && integer(0, 1);
  problem.padding = by_height       ? Padding::border_height
                    : integer(0, 1) ? Padding::zeros
                                    : Padding::border;
  problem.batch_size = integer(0, 2);
  problem.first_queries = {0};
  const int64_t num_queries = integer(0, 9) ? integer(0, 20) : integer(100, 300);
  const bool ragged = integer(0, 1);
  for (int64_t batch = 0; batch < problem.batch_size; ++batch) {
    problem.first_queries.push_back(problem.first_queries.back() +
                                    (ragged ? integer(0, num_queries) : num_queries));
  }
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
  if (integer(0, 1)) {
    problem.num_references = integer(1, 5);
    problem.references_are_boxes = integer(0, 1);
    for (int64_t k = 0; k < problem.total_points; ++k) {
      problem.reference_index.push_back(integer(0, problem.num_references - 1));
    }
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
  call.grad_output.resize(problem.total_queries() * problem.num_heads * problem.head_dim);
  for (S& number : call.grad_output) number = Stored<S>::encode(real(-1, 1));
  draw_points(call);
  return call;
}
