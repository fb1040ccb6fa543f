// AVX2 with FMA and F16C (x86-64-v3).

constexpr int kFloatWidth = 8;
constexpr int kDoubleWidth = 4;
constexpr bool kManyRegisters = false;

SACCADE_INLINE __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
SACCADE_INLINE __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }

SACCADE_INLINE __m256 floor(__m256 v) { return _mm256_floor_ps(v); }
SACCADE_INLINE __m256d floor(__m256d v) { return _mm256_floor_pd(v); }

SACCADE_INLINE __m256 round_even(__m256 v) {
  return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SACCADE_INLINE __m256d round_even(__m256d v) {
  return _mm256_round_pd(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

SACCADE_INLINE __m256 load_half(const Half* source) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
SACCADE_INLINE __m128i half_bits(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

SACCADE_INLINE __m256 repeat_four(const float* source) {
  return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(source));
}
SACCADE_INLINE __m256d repeat_four(const double* source) { return _mm256_loadu_pd(source); }

// The lanes of v that the index names.
constexpr bool kPicks = true;
SACCADE_INLINE __m256 pick(__m256 v, const int32_t* index) {
  return _mm256_permutevar8x32_ps(v, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)));
}
SACCADE_INLINE __m256d pick(__m256d v, const int32_t* index) {
  // By halves of doubles: lane i consists of halves 2 i and 2 i + 1.
  const __m128i lanes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(index));
  const __m256i low = _mm256_slli_epi64(_mm256_cvtepu32_epi64(lanes), 1);
  const __m256i high = _mm256_slli_epi64(_mm256_add_epi64(low, _mm256_set1_epi64x(1)), 32);
  return _mm256_castps_pd(
      _mm256_permutevar8x32_ps(_mm256_castpd_ps(v), _mm256_or_si256(low, high)));
}

// The first `count` elements, fewer than a vector has: no others are touched. There is no such
// instruction for 16 bits.
constexpr std::size_t kMinMaskedBytes = 4;
SACCADE_INLINE __m256i mask32(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
SACCADE_INLINE __m256i mask64(int64_t count) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(count), _mm256_setr_epi64x(0, 1, 2, 3));
}
SACCADE_INLINE __m256 load_masked(const float* source, int64_t count) {
  return _mm256_maskload_ps(source, mask32(count));
}
SACCADE_INLINE __m256d load_masked(const double* source, int64_t count) {
  return _mm256_maskload_pd(source, mask64(count));
}
SACCADE_INLINE void store_masked(float* target, __m256 v, int64_t count) {
  _mm256_maskstore_ps(target, mask32(count), v);
}
SACCADE_INLINE void store_masked(double* target, __m256d v, int64_t count) {
  _mm256_maskstore_pd(target, mask64(count), v);
}

template <std::size_t N>
using Bytes = std::integral_constant<std::size_t, N>;

SACCADE_INLINE void stream(void* target, const void* source, Bytes<32>) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(target),
                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
}
SACCADE_INLINE void stream(void* target, const void* source, Bytes<16>) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(target),
                   _mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
}
SACCADE_INLINE void end_streams() { _mm_sfence(); }
