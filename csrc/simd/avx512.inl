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

SACCADE_INLINE __m512 load_half(const Half* from) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SACCADE_INLINE __m256i half_bits(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

SACCADE_INLINE __m512 repeat_four(const float* from) {
  return _mm512_broadcast_f32x4(_mm_loadu_ps(from));
}
SACCADE_INLINE __m512d repeat_four(const double* from) {
  return _mm512_broadcast_f64x4(_mm256_loadu_pd(from));
}

// A lane of the vector for each number of an index.
constexpr bool kPicks = true;
SACCADE_INLINE __m512 pick(__m512 v, const int32_t* index) {
  return _mm512_permutexvar_ps(_mm512_loadu_si512(index), v);
}
SACCADE_INLINE __m512d pick(__m512d v, const int32_t* index) {
  const __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index));
  return _mm512_permutexvar_pd(_mm512_cvtepi32_epi64(lanes), v);
}

// The first `count` numbers, fewer than a vector has: no others are touched.
constexpr std::size_t kMinMaskedBytes = 2;
SACCADE_INLINE __m512 load_masked(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps((1u << count) - 1, from);
}
SACCADE_INLINE __m512d load_masked(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd((1u << count) - 1, from);
}
SACCADE_INLINE __m256i load_masked(const uint16_t* from, int64_t count) {
  return _mm256_maskz_loadu_epi16((1u << count) - 1, from);
}
SACCADE_INLINE void store_masked(float* to, __m512 v, int64_t count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, v);
}
SACCADE_INLINE void store_masked(double* to, __m512d v, int64_t count) {
  _mm512_mask_storeu_pd(to, (1u << count) - 1, v);
}
SACCADE_INLINE void store_masked(uint16_t* to, __m256i v, int64_t count) {
  _mm256_mask_storeu_epi16(to, (1u << count) - 1, v);
}

template <std::size_t N>
using Bytes = std::integral_constant<std::size_t, N>;

SACCADE_INLINE void stream(void* to, const void* from, Bytes<64>) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
SACCADE_INLINE void stream(void* to, const void* from, Bytes<32>) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
SACCADE_INLINE void end_streams() { _mm_sfence(); }
