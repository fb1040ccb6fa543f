// The torch operators: schemas, memory, threads. With torch_arguments.h the only file that knows
// torch; compiled against PyTorch's stable ABI, so one binary serves torch 2.10 and everything
// later.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "torch_arguments.h"

namespace saccade {
namespace {

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

// The points in the compute type, held while a kernel reads them.
class GivenTensors {
 public:
  GivenTensors(const PointTensors& points, ScalarType type)
      : locations_(contiguous_as(points.locations, type)),
        weights_(contiguous_as(points.weights, type)),
        references_(points.fused() ? contiguous_as(*points.reference_points, type) : weights_),
        inputs_{points.fused() ? references_.const_data_ptr() : nullptr,
                locations_.const_data_ptr(), weights_.const_data_ptr()} {}

  const PointInputs& inputs() const { return inputs_; }

 private:
  Tensor locations_, weights_, references_;
  PointInputs inputs_;
};

Tensor run_forward(const Tensor& value, const PointTensors& points, const Options& options) {
  const Problem problem = understand(value, points, options);
  const Kernels& kernels = active_kernels();
  const Tensor rows = with_contiguous_channels(value);
  const GivenTensors given(points, compute_type(problem));
  Tensor output = empty(
      {points.locations.size(0), points.locations.size(1), problem.num_heads * problem.head_dim},
      value.scalar_type());
  const Value described = describe(rows);
  void* to = output.mutable_data_ptr();
  in_parallel(problem.forward_units(), problem.unit_cost(), [&](int64_t begin, int64_t end) {
    kernels.forward(problem, described, given.inputs(), to, begin, end);
  });
  return output;
}

// What the gradient of a tensor is that nobody wants.
Tensor unwanted(const Tensor& like) { return empty({0}, like.scalar_type()); }

Tensor run_backward_value(const Problem& problem, const Tensor& value, const void* grad_output,
                          const PointInputs& inputs) {
  Tensor grad_value = empty(value.sizes(), value.scalar_type());
  void* to = grad_value.mutable_data_ptr();
  if (problem.adds_in_place()) {
    fill_with_zeros(grad_value);
  }
  const int64_t chunks_of_map =
      problem.first_chunks.back() / std::max<int64_t>(problem.batch_size, 1);
  const int64_t cost = chunks_of_map * problem.unit_cost() +
                       problem.num_positions * problem.head_dim / problem.num_bands;
  const Kernels& kernels = active_kernels();
  in_parallel(problem.backward_value_units(), cost, [&](int64_t begin, int64_t end) {
    kernels.backward_value(problem, grad_output, inputs, to, begin, end);
  });
  return grad_value;
}

// From the gradients [T, M, n] of the reference points, head by head, to their sums [T, n].
template <class T>
void sum_heads(const Problem& problem, const T* of_heads, T* sums) {
  const int64_t of_query = problem.num_references * problem.reference_size();
  in_parallel(problem.total_queries(), problem.num_heads * of_query,
              [&](int64_t begin, int64_t end) {
                for (int64_t query = begin; query < end; ++query) {
                  T* const sum = sums + query * of_query;
                  std::fill_n(sum, of_query, T(0));
                  const T* from = of_heads + query * problem.num_heads * of_query;
                  for (int64_t i = 0; i < problem.num_heads * of_query; ++i) {
                    sum[i % of_query] += from[i];
                  }
                }
              });
}

struct PointGradientTensors {
  Tensor reference_points, locations, weights;
};

// In the compute type; all of them but that of the reference points, which may be unwanted, come
// from the same dot products.
PointGradientTensors run_backward_points(const Problem& problem, const Tensor& value,
                                         const void* grad_output, const PointTensors& points,
                                         const PointInputs& inputs, bool reference_wanted) {
  const ScalarType type = compute_type(problem);
  const Tensor rows = with_contiguous_channels(value);
  const Value described = describe(rows);
  const Tensor locations = empty(points.locations.sizes(), type);
  const Tensor weights = empty(points.weights.sizes(), type);
  Tensor references = unwanted(weights);
  Tensor of_heads = references;
  if (reference_wanted) {
    references = empty(points.reference_points->sizes(), type);
    of_heads = empty({problem.total_queries(), problem.num_heads, problem.num_references,
                      problem.reference_size()},
                     type);
  }
  const PointGradients to = {reference_wanted ? of_heads.mutable_data_ptr() : nullptr,
                             locations.mutable_data_ptr(), weights.mutable_data_ptr()};
  const Kernels& kernels = active_kernels();
  in_parallel(problem.backward_points_units(), problem.unit_cost(),
              [&](int64_t begin, int64_t end) {
                kernels.backward_points(problem, described, grad_output, inputs, to, begin, end);
              });
  if (reference_wanted) {
    if (type == ScalarType::Double) {
      sum_heads(problem, static_cast<const double*>(to.reference_points),
                static_cast<double*>(references.mutable_data_ptr()));
    } else {
      sum_heads(problem, static_cast<const float*>(to.reference_points),
                static_cast<float*>(references.mutable_data_ptr()));
    }
  }
  return {references, locations, weights};
}

// The gradients of the value, the reference points (of a fused call), the locations (offsets) and
// the weights (logits), where the mask says so.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_backward(
    const Tensor& grad_output, const Tensor& value, const PointTensors& points,
    const Options& options, bool value_wanted, bool references_wanted, bool locations_wanted,
    bool weights_wanted) {
  const Problem problem = understand(value, points, options);
  STD_TORCH_CHECK(storage_of("grad_output", grad_output) == problem.storage,
                  "grad_output: expected the dtype of value");
  check_shape(
      "grad_output", grad_output,
      {points.locations.size(0), points.locations.size(1), problem.num_heads * problem.head_dim});
  const Tensor grad = contiguous_as(grad_output, value.scalar_type());
  const GivenTensors given(points, compute_type(problem));
  const void* grad_data = grad.const_data_ptr();
  const Tensor& references = points.fused() ? *points.reference_points : points.locations;
  std::tuple<Tensor, Tensor, Tensor, Tensor> found = {
      unwanted(value), unwanted(references), unwanted(points.locations), unwanted(points.weights)};
  if (value_wanted) {
    std::get<0>(found) = run_backward_value(problem, value, grad_data, given.inputs());
  }
  if (references_wanted || locations_wanted || weights_wanted) {
    const PointGradientTensors gradients =
        run_backward_points(problem, value, grad_data, points, given.inputs(), references_wanted);
    if (references_wanted) {
      std::get<1>(found) = contiguous_as(gradients.reference_points, references.scalar_type());
    }
    if (locations_wanted) {
      std::get<2>(found) = contiguous_as(gradients.locations, points.locations.scalar_type());
    }
    if (weights_wanted) {
      std::get<3>(found) = contiguous_as(gradients.weights, points.weights.scalar_type());
    }
  }
  return found;
}

using Ints = std::vector<int64_t>;

void check_mask(const std::vector<bool>& output_mask, size_t expected) {
  STD_TORCH_CHECK(output_mask.size() == expected, "output_mask: expected ", expected,
                  " entries, got ", output_mask.size());
}

Tensor deformable_attention(const Tensor& value, const Ints& spatial_shapes,
                            const Tensor& sampling_locations, const Tensor& attention_weights,
                            const Ints& num_points, const Text& interpolation, const Text& padding,
                            const Text& coordinates, const std::optional<Ints>& queries_per_map) {
  return run_forward(
      value, {sampling_locations, attention_weights},
      {spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map});
}

std::tuple<Tensor, Tensor, Tensor> deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& spatial_shapes,
    const Tensor& sampling_locations, const Tensor& attention_weights, const Ints& num_points,
    const Text& interpolation, const Text& padding, const Text& coordinates,
    const std::optional<Ints>& queries_per_map, const std::vector<bool>& output_mask) {
  check_mask(output_mask, 3);
  auto [of_value, of_references, of_locations, of_weights] = run_backward(
      grad_output, value, {sampling_locations, attention_weights},
      {spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map},
      output_mask[0], false, output_mask[1], output_mask[2]);
  return {of_value, of_locations, of_weights};
}

Tensor fused_deformable_attention(const Tensor& value, const Ints& spatial_shapes,
                                  const Tensor& reference_points, const Tensor& sampling_offsets,
                                  const Tensor& attention_logits, const Ints& reference_index,
                                  const Ints& num_points, const Text& interpolation,
                                  const Text& padding, const Text& coordinates,
                                  const std::optional<Ints>& queries_per_map) {
  return run_forward(
      value, {sampling_offsets, attention_logits, &reference_points, &reference_index},
      {spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> fused_deformable_attention_backward(
    const Tensor& grad_output, const Tensor& value, const Ints& spatial_shapes,
    const Tensor& reference_points, const Tensor& sampling_offsets, const Tensor& attention_logits,
    const Ints& reference_index, const Ints& num_points, const Text& interpolation,
    const Text& padding, const Text& coordinates, const std::optional<Ints>& queries_per_map,
    const std::vector<bool>& output_mask) {
  check_mask(output_mask, 4);
  return run_backward(
      grad_output, value, {sampling_offsets, attention_logits, &reference_points, &reference_index},
      {spatial_shapes, num_points, interpolation, padding, coordinates, queries_per_map},
      output_mask[0], output_mask[1], output_mask[2], output_mask[3]);
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

// A test holds these schemas equal to those of src/saccade/ops/contract.py.
#define SACCADE_OPTIONS                                                 \
  "int[] num_points, str interpolation, str padding, str coordinates, " \
  "SymInt[]? queries_per_map"
#define SACCADE_POINTS                                                        \
  "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor " \
  "attention_weights, " SACCADE_OPTIONS
#define SACCADE_FUSED_POINTS                                         \
  "Tensor value, SymInt[] spatial_shapes, Tensor reference_points, " \
  "Tensor sampling_offsets, Tensor attention_logits, int[] reference_index, " SACCADE_OPTIONS

STABLE_TORCH_LIBRARY(saccade, library) {
  library.def("deformable_attention(" SACCADE_POINTS ") -> Tensor");
  library.def("deformable_attention_backward(Tensor grad_output, " SACCADE_POINTS
              ", bool[] output_mask) -> (Tensor, Tensor, Tensor)");
  library.def("fused_deformable_attention(" SACCADE_FUSED_POINTS ") -> Tensor");
  library.def("fused_deformable_attention_backward(Tensor grad_output, " SACCADE_FUSED_POINTS
              ", bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
  library.def("_cpu_isa() -> str");
  library.def("_cpu_isas() -> str");
  library.def("_set_cpu_isa(str name) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(saccade, CPU, library) {
  library.impl("deformable_attention", TORCH_BOX(&saccade::deformable_attention));
  library.impl("deformable_attention_backward", TORCH_BOX(&saccade::deformable_attention_backward));
  library.impl("fused_deformable_attention", TORCH_BOX(&saccade::fused_deformable_attention));
  library.impl("fused_deformable_attention_backward",
               TORCH_BOX(&saccade::fused_deformable_attention_backward));
}

STABLE_TORCH_LIBRARY_IMPL(saccade, CompositeExplicitAutograd, library) {
  library.impl("_cpu_isa", TORCH_BOX(&saccade::cpu_isa));
  library.impl("_cpu_isas", TORCH_BOX(&saccade::cpu_isas));
  library.impl("_set_cpu_isa", TORCH_BOX(&saccade::set_cpu_isa));
}
