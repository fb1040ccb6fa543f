// From the arguments of the torch operators to a Problem.
//
// The Python functions have checked the arguments already, with better messages; what is checked
// here keeps a direct call of torch.ops.saccade.* from reading or writing outside its tensors.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "deformable_attention.h"

namespace saccade {

struct FreeString {
  void operator()(StringHandle handle) const { torch_delete_string(handle); }
};

// A string argument, read where torch keeps it. torch's own conversion to std::string (as of 2.13)
// never frees its copy.
struct Text {
  std::unique_ptr<std::remove_pointer_t<StringHandle>, FreeString> owner;
  std::string_view text;
};

}  // namespace saccade

template <>
struct torch::stable::detail::ToImpl<saccade::Text> {
  static saccade::Text call(StableIValue value, uint64_t, bool) {
    saccade::Text text{decltype(text.owner)(torch::stable::detail::to<StringHandle>(value)), {}};
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(text.owner.get(), &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(text.owner.get(), &data));
    text.text = std::string_view(data, length);
    return text;
  }
};

namespace saccade {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Sizes>
std::string text_of(const Sizes& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) {
    text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  }
  return text + "]";
}

inline void check_shape(const char* name, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name,
                  ": expected ", text_of(expected), ", got ", text_of(sizes));
}

inline Storage storage_of(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, name,
                  ": expected a tensor with memory, got one whose storage was freed");
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

template <class Option>
Option option(const char* name, const Text& given,
              std::initializer_list<std::pair<const char*, Option>> choices) {
  std::string names;
  for (const auto& choice : choices) {
    if (given.text == choice.first) {
      return choice.second;
    }
    names += (names.empty() ? "'" : ", '") + std::string(choice.first) + "'";
  }
  STD_TORCH_CHECK(false, name, ": expected one of ", names, ", got '", std::string(given.text),
                  "'");
}

struct Options {
  const std::vector<int64_t>& spatial_shapes;
  const std::vector<int64_t>& num_points;
  const Text& interpolation;
  const Text& padding;
  const Text& coordinates;
  // Without: [B, Q, ...], as many queries for each map; with: [1, T, ...], those of the first map
  // first.
  const std::optional<std::vector<int64_t>>& queries_per_map;
};

// What says where a call looks. Of a fused one offsets and logits, in place of locations and
// weights, and the reference points they start from.
struct PointTensors {
  const Tensor& locations;
  const Tensor& weights;
  const Tensor* reference_points = nullptr;
  const std::vector<int64_t>* reference_index = nullptr;

  bool fused() const { return reference_points != nullptr; }
  const char* locations_name() const { return fused() ? "sampling_offsets" : "sampling_locations"; }
  const char* weights_name() const { return fused() ? "attention_logits" : "attention_weights"; }
};

inline void understand_options(Problem& problem, const Options& options) {
  problem.interpolation = option<Interpolation>("interpolation", options.interpolation,
                                                {{"linear", Interpolation::linear},
                                                 {"nearest", Interpolation::nearest},
                                                 {"discrete", Interpolation::discrete}});
  problem.padding = option<Padding>("padding", options.padding,
                                    {{"zeros", Padding::zeros},
                                     {"border", Padding::border},
                                     {"border_height", Padding::border_height}});
  problem.coordinates =
      option<Coordinates>("coordinates", options.coordinates,
                          {{"normalized", Coordinates::normalized},
                           {"normalized_corners", Coordinates::normalized_corners},
                           {"pixel", Coordinates::pixel}});
}

inline void understand_levels(Problem& problem, const Options& options) {
  const int64_t axes = problem.spatial_dims;
  const std::vector<int64_t>& shapes = options.spatial_shapes;
  const std::vector<int64_t>& num_points = options.num_points;
  STD_TORCH_CHECK(!num_points.empty() && static_cast<int64_t>(shapes.size()) ==
                                             axes * static_cast<int64_t>(num_points.size()),
                  "spatial_shapes: expected ", axes, " for each of the ", num_points.size(),
                  " levels of num_points, as many as a location has coordinates, got ",
                  shapes.size(), " numbers");
  // Rows within a level and points within a chunk are kept in 32 bits; everything larger is counted
  // in 64.
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  for (size_t i = 0; i < num_points.size(); ++i) {
    int64_t sizes[3] = {1, 1, 1};  // depth, height, width
    const IntHeaderOnlyArrayRef given(&shapes[axes * i], axes);
    std::copy(given.begin(), given.end(), sizes + 3 - axes);
    int64_t positions = 1;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 1 && positions <= kMost / size,
                      "spatial_shapes: expected sizes of at least 1 and at most ", kMost,
                      " positions for each level, got ", text_of(given));
      positions *= size;
    }
    STD_TORCH_CHECK(num_points[i] >= 1 && num_points[i] <= kMost,
                    "num_points: expected at least 1 for each level, got ", num_points[i]);
    problem.levels.push_back(
        {sizes[0], sizes[1], sizes[2], problem.num_positions, problem.total_points, num_points[i]});
    problem.total_points += num_points[i];
    problem.num_positions += positions;
  }
  STD_TORCH_CHECK(problem.total_points <= kMost, "num_points: expected at most ", kMost,
                  " points in all, got ", problem.total_points);
}

inline void understand_queries(Problem& problem, const Tensor& locations, const char* name,
                               const std::optional<std::vector<int64_t>>& queries_per_map) {
  const int64_t given = locations.size(1);
  problem.first_queries.assign(1, 0);
  if (!queries_per_map) {
    for (int64_t batch = 1; batch <= problem.batch_size; ++batch) {
      problem.first_queries.push_back(batch * given);
    }
    return;
  }
  STD_TORCH_CHECK(static_cast<int64_t>(queries_per_map->size()) == problem.batch_size,
                  "queries_per_map: expected ", problem.batch_size,
                  " numbers, one for each map of value, got ", text_of(*queries_per_map));
  for (const int64_t count : *queries_per_map) {
    STD_TORCH_CHECK(count >= 0 && count <= given - problem.first_queries.back(),
                    "queries_per_map: expected numbers that sum to the ", given, " queries of ",
                    name, ", got ", text_of(*queries_per_map));
    problem.first_queries.push_back(problem.first_queries.back() + count);
  }
  STD_TORCH_CHECK(problem.total_queries() == given,
                  "queries_per_map: expected numbers that sum to the ", given, " queries of ", name,
                  ", got ", text_of(*queries_per_map));
}

inline void understand_references(Problem& problem, const PointTensors& points,
                                  int64_t batch_size) {
  const Tensor& references = *points.reference_points;
  const int64_t axes = problem.spatial_dims;
  storage_of("reference_points", references);
  STD_TORCH_CHECK(references.dim() == 4 && references.size(0) == batch_size &&
                      references.size(1) == points.locations.size(1) && references.size(2) >= 1 &&
                      (references.size(3) == axes || references.size(3) == 2 * axes),
                  "reference_points: expected [", batch_size, ", ", points.locations.size(1),
                  ", at least 1, ", axes, " or ", 2 * axes, "], got ", text_of(references.sizes()));
  // Where a coordinate is among those of a query is kept in 32 bits.
  constexpr int64_t kMost = ((int64_t(1) << 31) - 1) / 6;
  STD_TORCH_CHECK(references.size(2) <= kMost, "reference_points: expected at most ", kMost,
                  " for each query, got ", references.size(2));
  problem.num_references = references.size(2);
  problem.references_are_boxes = references.size(3) == 2 * axes;
  const std::vector<int64_t>& index = *points.reference_index;
  STD_TORCH_CHECK(static_cast<int64_t>(index.size()) == problem.total_points,
                  "reference_index: expected ", problem.total_points,
                  " numbers, one for each "
                  "point, got ",
                  index.size());
  for (const int64_t number : index) {
    STD_TORCH_CHECK(number >= 0 && number < problem.num_references,
                    "reference_index: expected numbers from 0 to ", problem.num_references - 1,
                    ", got ", number);
    problem.reference_index.push_back(static_cast<int32_t>(number));
  }
}

// Everything is checked here, before any parallel region: an exception inside one loses its
// message.
inline Problem understand(const Tensor& value, const PointTensors& points, const Options& options) {
  Problem problem;
  const Tensor& locations = points.locations;
  problem.storage = storage_of("value", value);
  storage_of(points.locations_name(), locations);
  storage_of(points.weights_name(), points.weights);
  understand_options(problem, options);
  STD_TORCH_CHECK(locations.dim() == 5 && locations.size(2) >= 1 && locations.size(4) >= 1 &&
                      locations.size(4) <= 3,
                  points.locations_name(),
                  ": expected [batch, queries, heads, points, 1, 2 or 3], got ",
                  text_of(locations.sizes()));
  problem.spatial_dims = locations.size(4);
  STD_TORCH_CHECK(
      problem.padding != Padding::border_height || problem.interpolation == Interpolation::discrete,
      "padding: expected 'zeros' or 'border', got 'border_height', which goes with "
      "interpolation 'discrete'");
  STD_TORCH_CHECK(problem.padding != Padding::border_height || problem.spatial_dims == 2,
                  "padding: expected 'zeros' or 'border' in ", problem.spatial_dims,
                  " dimensions, got 'border_height'");
  understand_levels(problem, options);
  STD_TORCH_CHECK(value.dim() == 4 && value.size(1) == problem.num_positions && value.size(3) >= 1,
                  "value: expected [batch, ", problem.num_positions,
                  ", heads or 1, head_dim] for these spatial_shapes, got ", text_of(value.sizes()));
  problem.batch_size = value.size(0);
  problem.value_heads = value.size(2);
  problem.head_dim = value.size(3);
  problem.num_heads = locations.size(2);
  STD_TORCH_CHECK(problem.value_heads == 1 || problem.value_heads == problem.num_heads,
                  "value: expected 1 or ", problem.num_heads, " heads, got ",
                  text_of(value.sizes()));
  const int64_t batch_size = options.queries_per_map ? 1 : problem.batch_size;
  check_shape(points.locations_name(), locations,
              {batch_size, locations.size(1), problem.num_heads, problem.total_points,
               problem.spatial_dims});
  check_shape(points.weights_name(), points.weights,
              {batch_size, locations.size(1), problem.num_heads, problem.total_points});
  understand_queries(problem, locations, points.locations_name(), options.queries_per_map);
  if (points.fused()) {
    understand_references(problem, points, batch_size);
  }
  problem.prepare(torch::stable::get_num_threads());
  return problem;
}

}  // namespace saccade
