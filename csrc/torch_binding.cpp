// The torch operators: memory, threads, registration. With parse_call.h the only file that knows
// torch; compiled against PyTorch's stable ABI, so one binary serves torch 2.10 and everything
// later.

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstring>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#include "parse_call.h"

namespace saccade {
namespace {

ScalarType compute_type(const Call& call) {
  return call.storage == Storage::float64 ? ScalarType::Double : ScalarType::Float;
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
    stride *= std::max<int64_t>(sizes[axis], 1);  // checked by can_be_counted()
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

Value describe_value(const Tensor& value) {
  return {value.const_data_ptr(), value.stride(0), value.stride(1), value.stride(2)};
}

Tensor with_contiguous_channels(const Tensor& value) {
  return value.size(3) == 1 || value.stride(3) == 1 ? value : torch::stable::contiguous(value);
}

template <class Work>
void in_parallel(int64_t count, double cost, const Work& work) {
  // Waking a thread pays from some tens of microseconds of gathers on.
  constexpr double kThreadCost = 1 << 16;
  const int64_t grain =
      std::max<int64_t>(1, static_cast<int64_t>(kThreadCost / std::max(1.0, cost)));
  if (count > 0) {
    torch::stable::parallel_for(0, count, grain, work);
  }
}

// By all threads: one alone cannot keep the memory busy.
void fill_with_zeros(const Tensor& tensor) {
  constexpr int64_t kPiece = int64_t(1) << 20;  // bytes, worth waking a thread for
  const int64_t bytes = tensor.numel() * tensor.element_size();
  char* const data = static_cast<char*>(tensor.mutable_data_ptr());
  in_parallel((bytes + kPiece - 1) / kPiece, kPiece, [&](int64_t begin, int64_t end) {
    std::memset(data + begin * kPiece, 0, std::min(end * kPiece, bytes) - begin * kPiece);
  });
}

// The tensors of points, contiguous and in the compute type, kept while a kernel reads them.
class ContiguousPoints {
 public:
  ContiguousPoints(const Arguments& arguments, ScalarType type)
      : points_(contiguous_as(arguments.points, type)),
        weights_(contiguous_as(arguments.weights, type)),
        references_(arguments.reference_points ? contiguous_as(*arguments.reference_points, type)
                                               : weights_),
        inputs_{arguments.reference_points ? references_.const_data_ptr() : nullptr,
                points_.const_data_ptr(), weights_.const_data_ptr()} {}

  const PointInputs& inputs() const { return inputs_; }

 private:
  Tensor points_, weights_, references_;
  PointInputs inputs_;
};

}  // namespace

Tensor run_forward(const Arguments& arguments) {
  Call call = parse_call(arguments);
  Tensor output =
      empty({arguments.points.size(0), arguments.points.size(1), call.num_heads * call.head_dim},
            arguments.value.scalar_type());
  if (call.total_queries() == 0) {
    return output;
  }
  const std::shared_ptr<const Plan> plan_owner =
      find_plan(std::move(call), torch::stable::get_num_threads());
  const Plan& plan = *plan_owner;
  const Kernels& kernels = active_kernels();
  const Tensor rows = with_contiguous_channels(arguments.value);
  const ContiguousPoints points(arguments, compute_type(plan.call));
  const Value value = describe_value(rows);
  void* const output_data = output.mutable_data_ptr();
  in_parallel(plan.num_tiles(), plan.tile_cost(), [&](int64_t begin, int64_t end) {
    kernels.forward(plan, value, points.inputs(), output_data, begin, end);
  });
  return output;
}

namespace {

// What stands for a gradient that is not needed.
Tensor make_empty_gradient(const Tensor& tensor) { return empty({0}, tensor.scalar_type()); }

Tensor run_backward_value(const Plan& plan, const Tensor& value, const void* grad_output,
                          const PointInputs& inputs) {
  Tensor grad_value = empty(value.sizes(), value.scalar_type());
  void* const grad_data = grad_value.mutable_data_ptr();
  if (plan.adds_in_place()) {
    fill_with_zeros(grad_value);
  }
  const int64_t chunks_per_map =
      plan.first_chunks.back() / std::max<int64_t>(plan.call.batch_size, 1);
  const double cost =
      static_cast<double>(chunks_per_map) * plan.tile_cost() +
      static_cast<double>(plan.call.num_positions * plan.call.head_dim / plan.num_bands);
  const Kernels& kernels = active_kernels();
  in_parallel(plan.num_value_tasks(), cost, [&](int64_t begin, int64_t end) {
    kernels.backward_value(plan, grad_output, inputs, grad_data, begin, end);
  });
  return grad_value;
}

// From gradients [T, M, n] of the reference points, one per head, to their sums [T, n].
template <class T>
void sum_heads(const Call& call, const T* per_head, T* sums) {
  const int64_t elements_per_query = call.num_references * call.reference_size();
  const int64_t stride = call.num_heads * elements_per_query;
  in_parallel(call.total_queries(), static_cast<double>(stride), [&](int64_t begin, int64_t end) {
    for (int64_t query = begin; query < end; ++query) {
      T* const sum = sums + query * elements_per_query;
      std::fill_n(sum, elements_per_query, T(0));
      const T* source = per_head + query * stride;
      for (int64_t i = 0; i < stride; ++i) {
        sum[i % elements_per_query] += source[i];
      }
    }
  });
}

struct PointGradientTensors {
  Tensor points, weights, reference_points;
};

// In the compute type. Those of points and weights come from the same dot products; that of the
// reference points is computed only if it is needed.
PointGradientTensors run_backward_points(const Plan& plan, const Arguments& arguments,
                                         const void* grad_output, const PointInputs& inputs,
                                         bool needs_references) {
  const Call& call = plan.call;
  const ScalarType type = compute_type(call);
  const Tensor rows = with_contiguous_channels(arguments.value);
  const Value value = describe_value(rows);
  const Tensor points = empty(arguments.points.sizes(), type);
  const Tensor weights = empty(arguments.weights.sizes(), type);
  Tensor references = make_empty_gradient(weights);
  Tensor references_per_head = references;
  if (needs_references) {
    STD_TORCH_CHECK(
        can_be_counted(std::array<int64_t, 4>{call.total_queries(), call.num_heads,
                                              call.num_references, call.reference_size()}),
        "reference_points: expected at most ", kMaxElements,
        " elements for all heads together, got ", format_list(arguments.reference_points->sizes()),
        " for ", call.num_heads, " heads");
    references = empty(arguments.reference_points->sizes(), type);
    references_per_head = empty(
        {call.total_queries(), call.num_heads, call.num_references, call.reference_size()}, type);
  }
  const PointGradients gradients = {
      needs_references ? references_per_head.mutable_data_ptr() : nullptr,
      points.mutable_data_ptr(), weights.mutable_data_ptr()};
  const Kernels& kernels = active_kernels();
  in_parallel(plan.num_tiles(), plan.tile_cost(), [&](int64_t begin, int64_t end) {
    kernels.backward_points(plan, value, grad_output, inputs, gradients, begin, end);
  });
  if (needs_references && type == ScalarType::Double) {
    sum_heads(call, static_cast<const double*>(gradients.reference_points),
              static_cast<double*>(references.mutable_data_ptr()));
  } else if (needs_references) {
    sum_heads(call, static_cast<const float*>(gradients.reference_points),
              static_cast<float*>(references.mutable_data_ptr()));
  }
  return {points, weights, references};
}

}  // namespace

Gradients run_backward(const Tensor& grad_output, const Arguments& arguments,
                       const std::vector<bool>& output_mask) {
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries, got ",
                  output_mask.size());
  const bool needs_value = output_mask[0], needs_points = output_mask[1];
  const bool needs_weights = output_mask[2], needs_references = output_mask[3];
  STD_TORCH_CHECK(!needs_references || arguments.reference_points,
                  "output_mask: expected False for the gradient of reference_points in a call "
                  "without reference_points, got True");
  const Tensor& value = arguments.value;
  Call call = parse_call(arguments);
  STD_TORCH_CHECK(parse_storage("grad_output", grad_output) == call.storage,
                  "grad_output: expected the dtype of value, ",
                  torch::headeronly::toString(value.scalar_type()), ", got ",
                  torch::headeronly::toString(grad_output.scalar_type()));
  check_shape("grad_output", grad_output,
              {arguments.points.size(0), arguments.points.size(1), call.num_heads * call.head_dim});
  const Tensor& references =
      arguments.reference_points ? *arguments.reference_points : arguments.points;
  if (call.total_queries() == 0) {
    const auto zeros = [](bool needed, const Tensor& tensor) {
      const Tensor gradient =
          needed ? empty(tensor.sizes(), tensor.scalar_type()) : make_empty_gradient(tensor);
      fill_with_zeros(gradient);
      return gradient;
    };
    return {zeros(needs_value, value), zeros(needs_points, arguments.points),
            zeros(needs_weights, arguments.weights), zeros(needs_references, references)};
  }
  const std::shared_ptr<const Plan> plan_owner =
      find_plan(std::move(call), torch::stable::get_num_threads());
  const Plan& plan = *plan_owner;
  const Tensor grad = contiguous_as(grad_output, value.scalar_type());
  const void* const grad_data = grad.const_data_ptr();
  const ContiguousPoints points(arguments, compute_type(plan.call));
  Gradients gradients = {make_empty_gradient(value), make_empty_gradient(arguments.points),
                         make_empty_gradient(arguments.weights), make_empty_gradient(references)};
  if (needs_value) {
    std::get<0>(gradients) = run_backward_value(plan, value, grad_data, points.inputs());
  }
  if (needs_points || needs_weights || needs_references) {
    const PointGradientTensors computed =
        run_backward_points(plan, arguments, grad_data, points.inputs(), needs_references);
    if (needs_points) {
      std::get<1>(gradients) = contiguous_as(computed.points, arguments.points.scalar_type());
    }
    if (needs_weights) {
      std::get<2>(gradients) = contiguous_as(computed.weights, arguments.weights.scalar_type());
    }
    if (needs_references) {
      std::get<3>(gradients) = contiguous_as(computed.reference_points, references.scalar_type());
    }
  }
  return gradients;
}

namespace {

std::string cpu_isa() { return active_kernels().name; }

std::string cpu_isas() {
  std::string names;
  for (const std::string& name : available_kernels()) {
    names += (names.empty() ? "" : ",") + name;
  }
  return names;
}

void set_cpu_isa(const StringArgument& name) { set_active_kernels(std::string(name.view)); }

}  // namespace
}  // namespace saccade

// A test holds these schemas equal to those of src/saccade/ops/schema.py.
STABLE_TORCH_LIBRARY(saccade, library) {
  library.def("deformable_attention(" SACCADE_ARGUMENTS ") -> Tensor");
  library.def("deformable_attention_backward(Tensor grad_output, " SACCADE_ARGUMENTS
              ", bool[] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
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
