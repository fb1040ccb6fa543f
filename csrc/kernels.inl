// The algorithm, once: included by every isa_*.cpp inside its own namespace and target region.
// clang-format off: the order matters
#include "simd/vector.inl"
#include "support.inl"
#include "given.inl"
#include "softmax.inl"
#include "fused.inl"
#include "points.inl"
#include "band.inl"
#include "exact.inl"
#include "forward.inl"
#include "backward_points.inl"
#include "backward_value.inl"
// clang-format on

// Handed over rather than used in place: the compiler would look its address up again and again.
template <class Scratch>
Scratch& of_this_thread() {
  thread_local Scratch scratch;
  return scratch;
}

// Calls run(S{}) with the storage type S of the problem.
template <class Run>
void with_storage(const Problem& problem, Run run) {
  switch (problem.storage) {
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

inline void any_forward(const Problem& problem, const Value& value, const PointInputs& points,
                        void* output, int64_t begin, int64_t end) {
  with_storage(problem, [&](auto storage) {
    typedef decltype(storage) S;
    forward<S>(problem, value, points, output, begin, end, of_this_thread<ForwardScratch<S>>());
  });
}

inline void any_backward_points(const Problem& problem, const Value& value, const void* grad_output,
                                const PointInputs& points, const PointGradients& gradients,
                                int64_t begin, int64_t end) {
  with_storage(problem, [&](auto storage) {
    typedef decltype(storage) S;
    backward_points<S>(problem, value, grad_output, points, gradients, begin, end,
                       of_this_thread<BackwardPointsScratch<S>>());
  });
}

inline void any_backward_value(const Problem& problem, const void* grad_output,
                               const PointInputs& points, void* grad_value, int64_t begin,
                               int64_t end) {
  with_storage(problem, [&](auto storage) {
    typedef decltype(storage) S;
    backward_value<S>(problem, grad_output, points, grad_value, begin, end,
                      of_this_thread<BackwardValueScratch<S>>());
  });
}
