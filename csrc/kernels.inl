// The algorithm, once: included by every isa_*.cpp inside its own namespace and target region.
// clang-format off: the order matters
#include "simd/vector.inl"
#include "support.inl"
#include "point_reader.inl"
#include "softmax.inl"
#include "prepared_points.inl"
#include "corners.inl"
#include "band.inl"
#include "exact.inl"
#include "forward.inl"
#include "backward_points.inl"
#include "backward_value.inl"
// clang-format on

// Memory that a thread keeps from call to call. Passed as an argument rather than looked up where
// it is used: the compiler would find its address again and again.
template <class Scratch>
Scratch& get_thread_scratch() {
  thread_local Scratch scratch;
  return scratch;
}

// Calls run(S{}) with the storage type S of the call.
template <class Run>
void with_storage(const Plan& plan, Run run) {
  switch (plan.call.storage) {
    case Storage::float32:
      return run(float{});
    case Storage::float64:
      return run(double{});
    case Storage::float16:
      return run(Half{});
    case Storage::bfloat16:
      return run(BFloat16{});
  }
}

inline void run_forward(const Plan& plan, const Value& value, const PointInputs& inputs,
                        void* output, int64_t begin, int64_t end) {
  with_storage(plan, [&](auto storage) {
    typedef decltype(storage) S;
    forward<S>(plan, value, inputs, output, begin, end, get_thread_scratch<ForwardScratch<S>>());
  });
}

inline void run_backward_points(const Plan& plan, const Value& value, const void* grad_output,
                                const PointInputs& inputs, const PointGradients& gradients,
                                int64_t begin, int64_t end) {
  with_storage(plan, [&](auto storage) {
    typedef decltype(storage) S;
    backward_points<S>(plan, value, grad_output, inputs, gradients, begin, end,
                       get_thread_scratch<BackwardPointsScratch<S>>());
  });
}

inline void run_backward_value(const Plan& plan, const void* grad_output, const PointInputs& inputs,
                               void* grad_value, int64_t begin, int64_t end) {
  with_storage(plan, [&](auto storage) {
    typedef decltype(storage) S;
    backward_value<S>(plan, grad_output, inputs, grad_value, begin, end,
                      get_thread_scratch<BackwardValueScratch<S>>());
  });
}
