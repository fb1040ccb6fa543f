#include "isa_begin.h"

namespace saccade {
namespace scalar {
#include "simd/scalar.inl"
// clang-format off: after the file of the instruction set
#include "kernels.inl"
// clang-format on
}  // namespace scalar

const Kernels kScalarKernels = {"scalar", scalar::run_forward, scalar::run_backward_points,
                                scalar::run_backward_value};
}  // namespace saccade
