// NEON, which every 64-bit Arm processor has.

constexpr int kFloatWidth = 4;
constexpr int kDoubleWidth = 4;
constexpr bool kManyRegisters = true;

typedef double DoubleVector __attribute__((vector_size(32), may_alias));

// NEON vectors hold two doubles; four at a time keeps the algorithm's group of four corners whole.
template <class F>
SACCADE_INLINE DoubleVector halves(DoubleVector v, F function) {
  const float64x2_t low = function(float64x2_t{v[0], v[1]});
  const float64x2_t high = function(float64x2_t{v[2], v[3]});
  return DoubleVector{low[0], low[1], high[0], high[1]};
}

SACCADE_INLINE float32x4_t fma(float32x4_t a, float32x4_t b, float32x4_t c) {
  return vfmaq_f32(c, a, b);
}
SACCADE_INLINE DoubleVector fma(DoubleVector a, DoubleVector b, DoubleVector c) {
  return a * b + c;
}

SACCADE_INLINE float32x4_t floor(float32x4_t v) { return vrndmq_f32(v); }
SACCADE_INLINE DoubleVector floor(DoubleVector v) {
  return halves(v, [](float64x2_t half) { return vrndmq_f64(half); });
}
SACCADE_INLINE float32x4_t round_even(float32x4_t v) { return vrndnq_f32(v); }
SACCADE_INLINE DoubleVector round_even(DoubleVector v) {
  return halves(v, [](float64x2_t half) { return vrndnq_f64(half); });
}

SACCADE_INLINE float32x4_t load_half(const Half* source) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(source))));
}
SACCADE_INLINE uint16x4_t half_bits(float32x4_t v) { return vreinterpret_u16_f16(vcvt_f16_f32(v)); }

SACCADE_INLINE float32x4_t repeat_four(const float* source) {
  return float32x4_t{source[0], source[1], source[2], source[3]};
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
