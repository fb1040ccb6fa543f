// What every isa_*.cpp includes before it opens its target region: nothing of these headers may be
// compiled for an instruction set that the processor may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#include <utility>

#include "kernels.h"

#define SACCADE_INLINE inline __attribute__((always_inline))
#define SACCADE_INLINE_LAMBDA __attribute__((always_inline))

namespace saccade {
extern const Kernels kScalarKernels;
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kNeonKernels;
}  // namespace saccade
