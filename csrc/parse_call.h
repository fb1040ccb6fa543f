// From the arguments of the torch operators to a Call.
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
#include <array>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "call.h"

namespace saccade {

struct FreeString {
  void operator()(StringHandle handle) const { torch_delete_string(handle); }
};

// A string argument, read where torch keeps it. torch's own conversion to std::string (as of 2.13)
// never frees its copy.
struct StringArgument {
  std::unique_ptr<std::remove_pointer_t<StringHandle>, FreeString> owner;
  std::string_view view;
};

}  // namespace saccade

template <>
struct torch::stable::detail::ToImpl<saccade::StringArgument> {
  static saccade::StringArgument call(StableIValue value, uint64_t, bool) {
    typedef decltype(saccade::StringArgument::owner) Owner;
    saccade::StringArgument argument{Owner(torch::stable::detail::to<StringHandle>(value)), {}};
    size_t length = 0;
    const char* data = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(argument.owner.get(), &length));
    STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(argument.owner.get(), &data));
    argument.view = std::string_view(data, length);
    return argument;
  }
};

namespace saccade {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;

// The operator's arguments, in the schema's order.
struct Arguments {
  const Tensor& value;
  const Ints& spatial_shapes;
  const Tensor& points;
  const Tensor& weights;
  const std::optional<Tensor>& reference_points;
  const std::optional<Ints>& reference_index;
  bool softmax;
  const Ints& num_points;
  const StringArgument& interpolation;
  const StringArgument& padding;
  const StringArgument& coordinates;
  // Without: [B, Q, ...], as many queries for each map; with: [1, T, ...], those of the first map
  // first.
  const std::optional<Ints>& queries_per_map;

  const char* points_name() const {
    return reference_points ? "sampling_offsets" : "sampling_locations";
  }
  const char* weights_name() const { return softmax ? "attention_logits" : "attention_weights"; }
};

// The same as the schema has them. An option is added here and in src/saccade/ops/schema.py.
#define SACCADE_ARGUMENTS                                                              \
  "Tensor value, SymInt[] spatial_shapes, Tensor points, Tensor weights, "             \
  "Tensor? reference_points, int[]? reference_index, bool softmax, int[] num_points, " \
  "str interpolation, str padding, str coordinates, SymInt[]? queries_per_map"

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// In torch_binding.cpp, which needs to know only that there are such arguments.
Tensor run_forward(const Arguments& arguments);
Gradients run_backward(const Tensor& grad_output, const Arguments& arguments,
                       const std::vector<bool>& output_mask);

// What torch calls, with the arguments one by one.
inline Tensor deformable_attention(const Tensor& value, const Ints& spatial_shapes,
                                   const Tensor& points, const Tensor& weights,
                                   const std::optional<Tensor>& reference_points,
                                   const std::optional<Ints>& reference_index, bool softmax,
                                   const Ints& num_points, const StringArgument& interpolation,
                                   const StringArgument& padding, const StringArgument& coordinates,
                                   const std::optional<Ints>& queries_per_map) {
  return run_forward({value, spatial_shapes, points, weights, reference_points, reference_index,
                      softmax, num_points, interpolation, padding, coordinates, queries_per_map});
}

inline Gradients deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& spatial_shapes,
    const Tensor& points, const Tensor& weights, const std::optional<Tensor>& reference_points,
    const std::optional<Ints>& reference_index, bool softmax, const Ints& num_points,
    const StringArgument& interpolation, const StringArgument& padding,
    const StringArgument& coordinates, const std::optional<Ints>& queries_per_map,
    const std::vector<bool>& output_mask) {
  return run_backward(grad_output,
                      {value, spatial_shapes, points, weights, reference_points, reference_index,
                       softmax, num_points, interpolation, padding, coordinates, queries_per_map},
                      output_mask);
}

template <class Sizes>
std::string format_list(const Sizes& sizes) {
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
                  ": expected ", format_list(expected), ", got ", format_list(sizes));
}

// The largest number of elements of a tensor: their bytes, and products with the small factors that
// plans multiply by, are counted in 64 bits.
constexpr int64_t kMaxElements = (int64_t(1) << 60) - 1;

// Whether a tensor of these sizes can be counted. A size of 0 counts as 1, since the strides of an
// empty tensor are products of its other sizes.
template <class Sizes>
bool can_be_counted(const Sizes& sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) {
    if (size > kMaxElements / elements) {
      return false;
    }
    elements *= std::max<int64_t>(size, 1);
  }
  return true;
}

inline void check_elements(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(can_be_counted(tensor.sizes()), name, ": expected at most ", kMaxElements,
                  " elements, a size of 0 counted as 1, got ", format_list(tensor.sizes()));
}

// The storage type of a tensor, which is checked to be one that the kernels can read.
inline Storage parse_storage(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor, got one on ",
                  tensor.is_cuda() ? "a GPU" : "another device");
  check_elements(name, tensor);
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
Option parse_option(const char* name, const StringArgument& argument,
                    std::initializer_list<std::pair<const char*, Option>> choices) {
  for (const auto& choice : choices) {
    if (argument.view == choice.first) {
      return choice.second;
    }
  }
  std::string names;
  for (const auto& choice : choices) {
    names += (names.empty() ? "'" : ", '") + std::string(choice.first) + "'";
  }
  STD_TORCH_CHECK(false, name, ": expected one of ", names, ", got '", std::string(argument.view),
                  "'");
}

inline void parse_options(Call& call, const Arguments& arguments) {
  call.softmax = arguments.softmax;
  call.interpolation = parse_option<Interpolation>("interpolation", arguments.interpolation,
                                                   {{"linear", Interpolation::linear},
                                                    {"nearest", Interpolation::nearest},
                                                    {"discrete", Interpolation::discrete}});
  call.padding = parse_option<Padding>("padding", arguments.padding,
                                       {{"zeros", Padding::zeros},
                                        {"border", Padding::border},
                                        {"border_height", Padding::border_height}});
  call.coordinates =
      parse_option<Coordinates>("coordinates", arguments.coordinates,
                                {{"normalized", Coordinates::normalized},
                                 {"normalized_corners", Coordinates::normalized_corners},
                                 {"pixel", Coordinates::pixel}});
  STD_TORCH_CHECK(
      call.padding != Padding::border_height || call.interpolation == Interpolation::discrete,
      "padding: expected 'zeros' or 'border', got 'border_height', which goes with "
      "interpolation 'discrete'");
  STD_TORCH_CHECK(call.padding != Padding::border_height || call.spatial_dims == 2,
                  "padding: expected 'zeros' or 'border' in ", call.spatial_dims,
                  " dimensions, got 'border_height'");
}

inline void parse_levels(Call& call, const Arguments& arguments) {
  const int64_t axes = call.spatial_dims;
  const Ints& shapes = arguments.spatial_shapes;
  const Ints& num_points = arguments.num_points;
  STD_TORCH_CHECK(!num_points.empty() && static_cast<int64_t>(shapes.size()) ==
                                             axes * static_cast<int64_t>(num_points.size()),
                  "spatial_shapes: expected ", axes, " for each of the ", num_points.size(),
                  " levels of num_points, as many as a location has coordinates, got ",
                  shapes.size(), " numbers");
  // Rows within a level and points within a chunk are kept in 32 bits; everything larger is counted
  // in 64.
  constexpr int64_t kMax = (int64_t(1) << 31) - 1;
  call.levels.reserve(num_points.size());
  for (size_t i = 0; i < num_points.size(); ++i) {
    int64_t sizes[3] = {1, 1, 1};  // depth, height, width
    const IntHeaderOnlyArrayRef shape(&shapes[axes * i], axes);
    std::copy(shape.begin(), shape.end(), sizes + 3 - axes);
    int64_t positions = 1;
    for (const int64_t size : sizes) {
      STD_TORCH_CHECK(size >= 1 && positions <= kMax / size,
                      "spatial_shapes: expected sizes of at least 1 and at most ", kMax,
                      " positions for each level, got ", format_list(shape));
      positions *= size;
    }
    STD_TORCH_CHECK(num_points[i] >= 1 && num_points[i] <= kMax, "num_points: expected 1 to ", kMax,
                    " for each level, got ", num_points[i]);
    call.levels.push_back(
        {sizes[0], sizes[1], sizes[2], call.num_positions, call.total_points, num_points[i]});
    call.total_points += num_points[i];
    call.num_positions += positions;
  }
  STD_TORCH_CHECK(call.total_points <= kMax, "num_points: expected at most ", kMax,
                  " points in all, got ", call.total_points);
}

inline void parse_queries(Call& call, const Arguments& arguments) {
  const int64_t num_queries = arguments.points.size(1);
  const std::optional<Ints>& counts = arguments.queries_per_map;
  call.first_queries.push_back(0);
  if (!counts) {
    if (num_queries == 0) {
      return;  // nothing is computed, and there may be as many maps as can be counted
    }
    call.first_queries.reserve(call.batch_size + 1);
    for (int64_t batch_index = 1; batch_index <= call.batch_size; ++batch_index) {
      call.first_queries.push_back(batch_index * num_queries);
    }
    return;
  }
  STD_TORCH_CHECK(static_cast<int64_t>(counts->size()) == call.batch_size,
                  "queries_per_map: expected ", call.batch_size,
                  " numbers, one for each map of value, got ", format_list(*counts));
  call.first_queries.reserve(call.batch_size + 1);
  const auto check_sum = [&](bool condition) {
    STD_TORCH_CHECK(condition, "queries_per_map: expected numbers that sum to the ", num_queries,
                    " queries of ", arguments.points_name(), ", got ", format_list(*counts));
  };
  for (const int64_t count : *counts) {
    check_sum(count >= 0 && count <= num_queries - call.first_queries.back());
    call.first_queries.push_back(call.first_queries.back() + count);
  }
  check_sum(call.total_queries() == num_queries);
}

inline void parse_references(Call& call, const Arguments& arguments, int64_t batch_size) {
  STD_TORCH_CHECK(arguments.reference_points.has_value() == arguments.reference_index.has_value(),
                  "reference_index: expected ",
                  arguments.reference_points ? "a list of numbers with" : "None without",
                  " reference_points, got ", arguments.reference_index ? "a list" : "None");
  if (!arguments.reference_points) {
    return;
  }
  const Tensor& references = *arguments.reference_points;
  const int64_t axes = call.spatial_dims, num_queries = arguments.points.size(1);
  parse_storage("reference_points", references);
  STD_TORCH_CHECK(references.dim() == 4 && references.size(0) == batch_size &&
                      references.size(1) == num_queries && references.size(2) >= 1 &&
                      (references.size(3) == axes || references.size(3) == 2 * axes),
                  "reference_points: expected [", batch_size, ", ", num_queries, ", at least 1, ",
                  axes, " or ", 2 * axes, "], got ", format_list(references.sizes()));
  // The index of an element among those of a query is kept in 32 bits.
  constexpr int64_t kMax = ((int64_t(1) << 31) - 1) / 6;
  STD_TORCH_CHECK(references.size(2) <= kMax, "reference_points: expected at most ", kMax,
                  " for each query, got ", references.size(2));
  call.num_references = references.size(2);
  call.references_are_boxes = references.size(3) == 2 * axes;
  const Ints& indices = *arguments.reference_index;
  STD_TORCH_CHECK(static_cast<int64_t>(indices.size()) == call.total_points,
                  "reference_index: expected ", call.total_points,
                  " numbers, one for each point, got ", indices.size());
  call.reference_index.reserve(indices.size());
  for (const int64_t index : indices) {
    STD_TORCH_CHECK(index >= 0 && index < call.num_references,
                    "reference_index: expected numbers from 0 to ", call.num_references - 1,
                    ", got ", index);
    call.reference_index.push_back(static_cast<int32_t>(index));
  }
}

// [batch, queries, heads, head_dim]: the output, whose last two axes are one.
inline std::array<int64_t, 4> output_sizes(const Arguments& arguments) {
  const Tensor& points = arguments.points;
  return {points.size(0), points.size(1), points.size(2), arguments.value.size(3)};
}

// Everything is checked here, before any parallel region: an exception inside one loses its
// message.
inline Call parse_call(const Arguments& arguments) {
  Call call;
  const Tensor& value = arguments.value;
  const Tensor& points = arguments.points;
  call.storage = parse_storage("value", value);
  parse_storage(arguments.points_name(), points);
  parse_storage(arguments.weights_name(), arguments.weights);
  STD_TORCH_CHECK(
      points.dim() == 5 && points.size(2) >= 1 && points.size(4) >= 1 && points.size(4) <= 3,
      arguments.points_name(), ": expected [batch, queries, heads, points, 1, 2 or 3], got ",
      format_list(points.sizes()));
  call.spatial_dims = points.size(4);
  parse_options(call, arguments);
  parse_levels(call, arguments);
  STD_TORCH_CHECK(value.dim() == 4 && value.size(1) == call.num_positions && value.size(3) >= 1,
                  "value: expected [batch, ", call.num_positions,
                  ", heads or 1, head_dim] for these spatial_shapes, got ",
                  format_list(value.sizes()));
  call.batch_size = value.size(0);
  call.value_heads = value.size(2);
  call.head_dim = value.size(3);
  call.num_heads = points.size(2);
  STD_TORCH_CHECK(can_be_counted(output_sizes(arguments)), "value: expected an output [batch, ",
                  "queries, heads * head_dim] of at most ", kMaxElements,
                  " elements, a size of 0 counted as 1, got ", format_list(value.sizes()), " with ",
                  call.num_heads, " heads of ", arguments.points_name(), " ",
                  format_list(points.sizes()));
  STD_TORCH_CHECK(call.value_heads == 1 || call.value_heads == call.num_heads,
                  "value: expected 1 or ", call.num_heads, " heads, got ",
                  format_list(value.sizes()));
  const int64_t batch_size = arguments.queries_per_map ? 1 : call.batch_size;
  check_shape(arguments.points_name(), points,
              {batch_size, points.size(1), call.num_heads, call.total_points, call.spatial_dims});
  check_shape(arguments.weights_name(), arguments.weights,
              {batch_size, points.size(1), call.num_heads, call.total_points});
  parse_queries(call, arguments);
  parse_references(call, arguments, batch_size);
  return call;
}

}  // namespace saccade
