// AVX-512 F, BW, DQ, VL (x86-64-v4).

constexpr int kFloatWidth = 16;
constexpr int kDoubleWidth = 8;
constexpr bool kManyRegisters = true;

SACCADE_INLINE __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
SACCADE_INLINE __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }

SACCADE_INLINE __m512 floor(__m512 v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
SACCADE_INLINE __m512d floor(__m512d v) {
  return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}

SACCADE_INLINE __m512 round_even(__m512 v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SACCADE_INLINE __m512d round_even(__m512d v) {
  return _mm512_roundscale_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SACCADE_INLINE __m512 load_half(const Half* source) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
SACCADE_INLINE __m256i half_bits(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

SACCADE_INLINE __m512 repeat_four(const float* source) {
  return _mm512_broadcast_f32x4(_mm_loadu_ps(source));
}
SACCADE_INLINE __m512d repeat_four(const double* source) {
  return _mm512_broadcast_f64x4(_mm256_loadu_pd(source));
}

// The lanes of v that the index names.
constexpr bool kPicks = true;
SACCADE_INLINE __m512 pick(__m512 v, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), v);
}
SACCADE_INLINE __m512d pick(__m512d v, const int32_t* index) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return _mm512_permutexvar_pd(_mm512_cvtepi32_epi64(lanes), v);
}

// The first `count` elements, fewer than a vector has: no others are touched.
constexpr std::size_t kMinMaskedBytes = 2;
SACCADE_INLINE __m512 load_masked(const float* source, int64_t count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, source);
}
SACCADE_INLINE __m512d load_masked(const double* source, int64_t count) {
  return _mm512_maskz_loadu_pd((1u << count) - 1, source);
}
SACCADE_INLINE __m256i load_masked(const uint16_t* source, int64_t count) {
  return _mm256_maskz_loadu_epi16((1u << count) - 1, source);
}
SACCADE_INLINE void store_masked(float* target, __m512 v, int64_t count) {
  _mm512_mask_storeu_ps(target, (1u << count) - 1, v);
}
SACCADE_INLINE void store_masked(double* target, __m512d v, int64_t count) {
  _mm512_mask_storeu_pd(target, (1u << count) - 1, v);
}
SACCADE_INLINE void store_masked(uint16_t* target, __m256i v, int64_t count) {
  _mm256_mask_storeu_epi16(target, (1u << count) - 1, v);
}

template <std::size_t N>
using Bytes = std::integral_constant<std::size_t, N>;

SACCADE_INLINE void stream(void* target, const void* source, Bytes<64>) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(target), _mm512_loadu_si512(source));
}
SACCADE_INLINE void stream(void* target, const void* source, Bytes<32>) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
SACCADE_INLINE void end_streams() { _mm_sfence(); }
