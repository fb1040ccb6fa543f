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

// 16-bit values are drawn as multiples of 1/8 up to 1, which both 16-bit types hold exactly;
// results are only decoded.
template <class S>
struct Stored;

template <>
struct Stored<float> {
  static constexpr Storage kind = Storage::float32;
  static constexpr const char* name = "float32";
  static constexpr double tolerance = 4e-6;
  static float encode(double value) { return static_cast<float>(value); }
  static double decode(float value) { return value; }
};
template <>
struct Stored<double> {
  static constexpr Storage kind = Storage::float64;
  static constexpr const char* name = "float64";
  static constexpr double tolerance = 2e-14;
  static double encode(double value) { return value; }
  static double decode(double value) { return value; }
};
inline uint32_t get_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}
template <>
struct Stored<BFloat16> {
  static constexpr Storage kind = Storage::bfloat16;
  static constexpr const char* name = "bfloat16";
  static constexpr double tolerance = 4e-3;
  static BFloat16 encode(double value) {
    return {static_cast<uint16_t>(get_bits(static_cast<float>(std::round(value * 8) / 8)) >> 16)};
  }
  static double decode(BFloat16 value) {
    const uint32_t bits = uint32_t(value.bits) << 16;
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
  static Half encode(double value) {
    const uint32_t bits = get_bits(static_cast<float>(std::round(value * 8) / 8));
    const uint32_t magnitude = bits & 0x7fffffff;
    const uint32_t half = magnitude == 0 ? 0 : (magnitude - (112u << 23)) >> 13;
    return {static_cast<uint16_t>((bits >> 16 & 0x8000u) | half)};
  }
  static double decode(Half value) {
    const int exponent = value.bits >> 10 & 0x1f, mantissa = value.bits & 0x3ff;
    const double magnitude = exponent == 0    ? std::ldexp(mantissa, -24)
                             : exponent == 31 ? std::numeric_limits<double>::quiet_NaN()
                                              : std::ldexp(1024 + mantissa, exponent - 25);
    return value.bits & 0x8000 ? -magnitude : magnitude;
  }
};

template <class S>
using Compute = typename std::conditional<std::is_same<S, double>::value, double, float>::type;
