// No particular instruction set: four elements at a time, with the compiler's default target.

constexpr int kFloatWidth = 4;
constexpr int kDoubleWidth = 4;
constexpr bool kManyRegisters = false;

typedef float FloatVector __attribute__((vector_size(16), may_alias));
typedef double DoubleVector __attribute__((vector_size(32), may_alias));

SACCADE_INLINE FloatVector fma(FloatVector a, FloatVector b, FloatVector c) { return a * b + c; }
SACCADE_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) {
  return a * b + c;
}

template <class V, class F>
SACCADE_INLINE V each(V vector, F function) {
  for (int i = 0; i < 4; ++i) {
    vector[i] = function(vector[i]);
  }
  return vector;
}

SACCADE_INLINE FloatVector floor(FloatVector v) {
  return each(v, [](float x) { return std::floor(x); });
}
SACCADE_INLINE DoubleVector floor(DoubleVector v) {
  return each(v, [](double x) { return std::floor(x); });
}
SACCADE_INLINE FloatVector round_even(FloatVector v) {
  return each(v, [](float x) { return std::nearbyint(x); });
}
SACCADE_INLINE DoubleVector round_even(DoubleVector v) {
  return each(v, [](double x) { return std::nearbyint(x); });
}

SACCADE_INLINE float half_to_float(Half half) {
  const uint32_t sign = uint32_t(half.bits & 0x8000) << 16;
  const uint32_t magnitude = half.bits & 0x7fff;
  uint32_t bits;
  if (magnitude >= 0x7c00) {  // infinity, NaN
    bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
  } else if (magnitude >= 0x0400) {
    bits = (magnitude << 13) + ((127 - 15) << 23);
  } else {  // subnormal: a multiple of 2^-24
    const float value = float(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
  }
  bits |= sign;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

SACCADE_INLINE Half float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {  // NaN
    half = 0x7e00 | (bits >> 13 & 0x3ff);
  } else if (bits >= 0x477ff000) {  // rounds to infinity
    half = 0x7c00;
  } else if (bits >= 0x38800000) {
    bits += 0xfff + (bits >> 13 & 1);
    half = (bits - ((127 - 15) << 23)) >> 13;
  } else {  // subnormal: adding 0.5 aligns the multiple of 2^-24 with the lowest bits
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, sizeof bits);
    half = bits - 0x3f000000;
  }
  return Half{uint16_t(sign | half)};
}

SACCADE_INLINE FloatVector load_half(const Half* source) {
  return FloatVector{half_to_float(source[0]), half_to_float(source[1]), half_to_float(source[2]),
                     half_to_float(source[3])};
}

typedef uint16_t HalfBits __attribute__((vector_size(8)));

SACCADE_INLINE HalfBits half_bits(FloatVector v) {
  return HalfBits{float_to_half(v[0]).bits, float_to_half(v[1]).bits, float_to_half(v[2]).bits,
                  float_to_half(v[3]).bits};
}

SACCADE_INLINE FloatVector repeat_four(const float* source) {
  return FloatVector{source[0], source[1], source[2], source[3]};
}
SACCADE_INLINE DoubleVector repeat_four(const double* source) {
  return DoubleVector{source[0], source[1], source[2], source[3]};
}

constexpr bool kPicks = false;

constexpr std::size_t kMinMaskedBytes = 64;  // no masked loads and stores

// Nothing goes past the caches here.
template <class N>
SACCADE_INLINE void stream(void* target, const void* source, N) {
  std::memcpy(target, source, N::value);
}
SACCADE_INLINE void end_streams() {}
