#include "isa_begin.h"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace saccade {
namespace avx2 {
#include "simd/avx2.inl"
// clang-format off: after the file of the instruction set
#include "kernels.inl"
// clang-format on
}  // namespace avx2

const Kernels kAvx2Kernels = {"avx2", avx2::run_forward, avx2::run_backward_points,
                              avx2::run_backward_value};
}  // namespace saccade

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
