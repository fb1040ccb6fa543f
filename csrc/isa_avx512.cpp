#include "isa_begin.h"
#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace saccade {
namespace avx512 {
#include "simd/avx512.inl"
// clang-format off: after the file of the instruction set
#include "kernels.inl"
// clang-format on
}  // namespace avx512

const Kernels kAvx512Kernels = {"avx512", avx512::run_forward, avx512::run_backward_points,
                                avx512::run_backward_value};
}  // namespace saccade

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif  // x86-64
