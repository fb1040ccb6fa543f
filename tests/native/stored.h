// Storage types of the kernels, to and from double.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels.h"

using saccade::BFloat16;
using saccade::Half;
using saccade::Storage;

// 16-bit numbers are drawn as multiples of 1/8 up to 1, which
// both hold exactly; results are decoded only.
template <class S>
struct Stored;

template <>
struct Stored<float> {
  static constexpr Storage kind = Storage::float32;
  static constexpr const char* name = "float32";
  static constexpr double tolerance = 4e-6;
  static float encode(double number) { return static_cast<float>(number); }
  static double decode(float number) { return number; }
};
template <>
struct Stored<double> {
  static constexpr Storage kind = Storage::float64;
  static constexpr const char* name = "float64";
  static constexpr double tolerance = 2e-14;
  static double encode(double number) { return number; }
  static double decode(double number) { return number; }
};
inline uint32_t bits_of(float number) {
  uint32_t bits;
  std::memcpy(&bits, &number, sizeof bits);
  return bits;
}
template <>
struct Stored<BFloat16> {
  static constexpr Storage kind = Storage::bfloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double tolerance = 4e-3;
  static BFloat16 encode(double number) {
    return {static_cast<uint16_t>(bits_of(static_cast<float>(std::round(number * 8) / 8)) >> 16)};
  }
  static double decode(BFloat16 number) {
    const uint32_t bits = uint32_t(number.bits) << 16;
    float decoded;
    std::memcpy(&decoded, &bits, sizeof decoded);
    return decoded;
  }
};
template <>
struct Stored<Half> {
  static constexpr Storage kind = Storage::float16;
  static constexpr const char* name = "float16";
  static constexpr double tolerance = 6e-4;
  static Half encode(double number) {
    const uint32_t bits = bits_of(static_cast<float>(std::round(number * 8) / 8));
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13;
    return {static_cast<uint16_t>(bits >> 16 & 0x8000u | half)};
  }
  static double decode(Half number) {
    const int exponent = number.bits >> 10 & 0x1f, mantissa = number.bits & 0x3ff;
    const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                             : exponent == 31 ? std::numeric_limits<double>::quiet_NaN()
                                              : std::ldexp(1024 + mantissa, exponent - 25);
    return number.bits & 0x8000 ? -magnitude : magnitude;
  }
};

template <class S>
using Compute = typename std::conditional<std::is_same<S, double>::value, double, float>::type;
