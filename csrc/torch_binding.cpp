// The only file that knows torch: schemas, checks, memory, threads. Compiled against PyTorch's
// stable ABI, so one binary serves torch 2.10 and everything later.
//
// The Python functions have checked the arguments already, with better messages; what is checked
// here keeps a direct call of torch.ops.saccade.* from reading or writing outside its tensors.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
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
namespace {

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

void check_shape(const char* name, const Tensor& tensor, std::initializer_list<int64_t> expected) {
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()), name,
                  ": expected ", text_of(expected), ", got ", text_of(sizes));
}

Storage storage_of(const char* name, const Tensor& tensor) {
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
};

// Everything is checked here, before any parallel region: an exception inside one loses its
// message.
Problem understand(const Tensor& value, const Tensor& sampling_locations,
                   const Tensor& attention_weights, const Options& options) {
  Problem problem;
  problem.storage = storage_of("value", value);
  storage_of("sampling_locations", sampling_locations);
  storage_of("attention_weights", attention_weights);
  problem.interpolation = option<Interpolation>(
      "interpolation", options.interpolation,
      {{"linear", Interpolation::linear}, {"nearest", Interpolation::nearest}});
  problem.padding = option<Padding>("padding", options.padding,
                                    {{"zeros", Padding::zeros}, {"border", Padding::border}});
  problem.coordinates =
      option<Coordinates>("coordinates", options.coordinates,
                          {{"normalized", Coordinates::normalized},
                           {"normalized_corners", Coordinates::normalized_corners},
                           {"pixel", Coordinates::pixel}});

  STD_TORCH_CHECK(sampling_locations.dim() == 5 && sampling_locations.size(2) >= 1 &&
                      sampling_locations.size(4) >= 1 && sampling_locations.size(4) <= 3,
                  "sampling_locations: expected [batch, queries, heads, points, 1, 2 or 3], got ",
                  text_of(sampling_locations.sizes()));
  problem.spatial_dims = sampling_locations.size(4);
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

  STD_TORCH_CHECK(value.dim() == 4 && value.size(1) == problem.num_positions && value.size(3) >= 1,
                  "value: expected [batch, ", problem.num_positions,
                  ", heads or 1, head_dim] for these spatial_shapes, got ", text_of(value.sizes()));
  problem.batch_size = value.size(0);
  problem.value_heads = value.size(2);
  problem.head_dim = value.size(3);
  problem.num_queries = sampling_locations.size(1);
  problem.num_heads = sampling_locations.size(2);
  STD_TORCH_CHECK(problem.value_heads == 1 || problem.value_heads == problem.num_heads,
                  "value: expected 1 or ", problem.num_heads, " heads, got ",
                  text_of(value.sizes()));
  check_shape(
      "sampling_locations", sampling_locations,
      {problem.batch_size, problem.num_queries, problem.num_heads, problem.total_points, axes});
  check_shape("attention_weights", attention_weights,
              {problem.batch_size, problem.num_queries, problem.num_heads, problem.total_points});
  problem.prepare(torch::stable::get_num_threads());
  return problem;
}

ScalarType compute_type(const Problem& problem) {
  return problem.storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself if it is contiguous and of that type already.
Tensor contiguous_as(const Tensor& tensor, ScalarType type) {
  Tensor same_type = tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
  return same_type.is_contiguous() ? same_type : torch::stable::contiguous(same_type);
}

// The first touch of fresh memory costs more than the work on it, the less the larger its pages
// are: 44 against 10 ms for 82 MB. Only where the system leaves the choice to the program; a hint,
// so that a refusal changes nothing.
void ask_for_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kHugePage = int64_t(1) << 21;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (begin + bytes) / kHugePage * kHugePage;
  if (first < end) {
    madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
}

// A contiguous tensor with memory that holds anything. Not `new_empty`, which looks its operator up
// by name, boxes six arguments and dispatches: a microsecond.
Tensor empty(IntHeaderOnlyArrayRef sizes, ScalarType type) {
  int64_t strides[5];  // no tensor here has more axes
  int64_t stride = 1;
  for (size_t axis = sizes.size(); axis-- > 0;) {
    strides[axis] = stride;
    stride *= std::max<int64_t>(sizes[axis], 1);
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides,
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), -1, &handle));
  Tensor tensor(handle);
  ask_for_huge_pages(tensor.mutable_data_ptr(), tensor.numel() * tensor.element_size());
  return tensor;
}

Value describe(const Tensor& value) {
  return {value.const_data_ptr(), value.stride(0), value.stride(1), value.stride(2)};
}

Tensor with_contiguous_channels(const Tensor& value) {
  return value.size(3) == 1 || value.stride(3) == 1 ? value : torch::stable::contiguous(value);
}

template <class Work>
void in_parallel(int64_t units, int64_t unit_cost, const Work& work) {
  // A thread is worth waking for some tens of microseconds of gathers.
  constexpr int64_t kThreadCost = 1 << 16;
  const int64_t grain = std::max<int64_t>(1, kThreadCost / std::max<int64_t>(1, unit_cost));
  if (units > 0) {
    torch::stable::parallel_for(0, units, grain, work);
  }
}

// By all threads: one alone cannot keep the memory busy.
void fill_with_zeros(const Tensor& tensor) {
  constexpr int64_t kPiece = int64_t(1) << 20;  // worth waking a thread for
  const int64_t bytes = tensor.numel() * tensor.element_size();
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  in_parallel((bytes + kPiece - 1) / kPiece, kPiece, [&](int64_t begin, int64_t end) {
    std::memset(data + begin * kPiece, 0, std::min(end * kPiece, bytes) - begin * kPiece);
  });
}

Tensor deformable_attention(const Tensor& value, const std::vector<int64_t>& spatial_shapes,
                            const Tensor& sampling_locations, const Tensor& attention_weights,
                            const std::vector<int64_t>& num_points, const Text& interpolation,
                            const Text& padding, const Text& coordinates) {
  const Problem problem =
      understand(value, sampling_locations, attention_weights,
                 {spatial_shapes, num_points, interpolation, padding, coordinates});
  const Kernels& kernels = active_kernels();
  const Tensor rows = with_contiguous_channels(value);
  const Tensor locations = contiguous_as(sampling_locations, compute_type(problem));
  const Tensor weights = contiguous_as(attention_weights, compute_type(problem));
  Tensor output =
      empty({problem.batch_size, problem.num_queries, problem.num_heads * problem.head_dim},
            value.scalar_type());
  const Value described = describe(rows);
  const void* location_data = locations.const_data_ptr();
  const void* weight_data = weights.const_data_ptr();
  void* output_data = output.mutable_data_ptr();
  in_parallel(problem.forward_units(), problem.unit_cost(), [&](int64_t begin, int64_t end) {
    kernels.forward(problem, described, location_data, weight_data, output_data, begin, end);
  });
  return output;
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const std::vector<int64_t>& spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights,
    const std::vector<int64_t>& num_points, const Text& interpolation, const Text& padding,
    const Text& coordinates, const std::vector<bool>& output_mask) {
  const Problem problem =
      understand(value, sampling_locations, attention_weights,
                 {spatial_shapes, num_points, interpolation, padding, coordinates});
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask: expected 3 entries, got ",
                  output_mask.size());
  STD_TORCH_CHECK(storage_of("grad_output", grad_output) == problem.storage,
                  "grad_output: expected the dtype of value");
  check_shape("grad_output", grad_output,
              {problem.batch_size, problem.num_queries, problem.num_heads * problem.head_dim});
  const Kernels& kernels = active_kernels();
  const ScalarType type = compute_type(problem);
  const Tensor grad = contiguous_as(grad_output, value.scalar_type());
  const Tensor locations = contiguous_as(sampling_locations, type);
  const Tensor weights = contiguous_as(attention_weights, type);
  const void* grad_data = grad.const_data_ptr();
  const void* location_data = locations.const_data_ptr();
  const void* weight_data = weights.const_data_ptr();
  const auto unwanted = [](const Tensor& like) { return empty({0}, like.scalar_type()); };

  Tensor grad_value = unwanted(value);
  if (output_mask[0]) {
    grad_value = empty(value.sizes(), value.scalar_type());
    void* to = grad_value.mutable_data_ptr();
    if (problem.adds_in_place()) {
      fill_with_zeros(grad_value);
    }
    const int64_t cost = problem.num_chunks * problem.unit_cost() +
                         problem.num_positions * problem.head_dim / problem.num_bands;
    in_parallel(problem.backward_value_units(), cost, [&](int64_t begin, int64_t end) {
      kernels.backward_value(problem, grad_data, location_data, weight_data, to, begin, end);
    });
  }

  Tensor grad_locations = unwanted(sampling_locations);
  Tensor grad_weights = unwanted(attention_weights);
  if (output_mask[1] || output_mask[2]) {
    // Both come from the same dot products, so both are written, and one is dropped if unwanted.
    const Tensor rows = with_contiguous_channels(value);
    const Value described = describe(rows);
    const Tensor both_locations = empty(sampling_locations.sizes(), type);
    const Tensor both_weights = empty(attention_weights.sizes(), type);
    void* to_locations = both_locations.mutable_data_ptr();
    void* to_weights = both_weights.mutable_data_ptr();
    in_parallel(problem.backward_points_units(), problem.unit_cost(),
                [&](int64_t begin, int64_t end) {
                  kernels.backward_points(problem, described, grad_data, location_data, weight_data,
                                          to_locations, to_weights, begin, end);
                });
    if (output_mask[1]) {
      grad_locations = contiguous_as(both_locations, sampling_locations.scalar_type());
    }
    if (output_mask[2]) {
      grad_weights = contiguous_as(both_weights, attention_weights.scalar_type());
    }
  }
  return {grad_value, grad_locations, grad_weights};
}

std::string cpu_isa() { return active_kernels().name; }

std::string cpu_isas() {
  std::string names;
  for (const std::string& name : available_kernels()) {
    names += (names.empty() ? "" : ",") + name;
  }
  return names;
}

void set_cpu_isa(const Text& name) { set_active_kernels(std::string(name.text)); }

}  // namespace
}  // namespace saccade

// A test holds these schemas equal to those of src/saccade/ops/registration.py.
STABLE_TORCH_LIBRARY(saccade, library) {
  library.def(
      "deformable_attention(Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, "
      "Tensor attention_weights, int[] num_points, str interpolation, str padding, "
      "str coordinates) -> Tensor");
  library.def(
      "deformable_attention_backward(Tensor grad_output, Tensor value, SymInt[] spatial_shapes, "
      "Tensor sampling_locations, Tensor attention_weights, int[] num_points, str interpolation, "
      "str padding, str coordinates, bool[] output_mask) -> (Tensor, Tensor, Tensor)");
  library.def("_cpu_isa() -> str");
  library.def("_cpu_isas() -> str");
  library.def("_set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, library) {
  library.impl("deformable_attention", TORCH_BOX(&saccade::deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&saccade::deformable_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(saccade, CompositeExplicitAutograd, library) {
  library.impl("_cpu_isa", TORCH_BOX(&saccade::cpu_isa));
  library.impl("_cpu_isas", TORCH_BOX(&saccade::cpu_isas));
  library.impl("_set_cpu_isa", TORCH_BOX(&saccade::set_cpu_isa));
}
