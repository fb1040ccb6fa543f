#include "isa_begin.h"
#if defined(__aarch64__)
#include <arm_neon.h>

namespace saccade {
namespace neon {
#include "simd/neon.inl"
// clang-format off: after the file of the instruction set
#include "kernels.inl"
// clang-format on
}  // namespace neon

const Kernels kNeonKernels = {"neon", neon::run_forward, neon::run_backward_points,
                              neon::run_backward_value};
}  // namespace saccade
#endif  // 64-bit Arm
