// Vectors of T over the compiler's vector extensions (GCC, Clang): arithmetic, comparison and
// selection come from the compiler for any instruction set. What the extensions lack is in the file
// of each instruction set, included before this one:
//   kFloatWidth, kDoubleWidth; fma, floor, round_even for both; load_half, half_bits (float16);
//   kManyRegisters: whether there are 32 vector registers rather than 16;
//   repeat_four: four elements, repeated to fill a vector;
//   kPicks: whether there is pick, a permutation of lanes by an index in memory;
//   kMinMaskedBytes: the smallest element that load_masked and store_masked take;
//   stream, end_streams: stores past the caches.

template <class T, int W>
struct VectorType {
  typedef T type __attribute__((vector_size(W * sizeof(T)), may_alias));
  typedef T unaligned __attribute__((vector_size(W * sizeof(T)), may_alias, aligned(alignof(T))));
};

template <class T>
constexpr int kWidth = sizeof(T) == sizeof(float) ? kFloatWidth : kDoubleWidth;

template <class T>
using Vector = typename VectorType<T, kWidth<T>>::type;
template <class T>
using Unaligned = typename VectorType<T, kWidth<T>>::unaligned;

template <class T>
SACCADE_INLINE Vector<T> splat(T element) {
  return element - Vector<T>{};
}

template <class T>
SACCADE_INLINE Vector<T> load(const T* source) {
  return *reinterpret_cast<const Unaligned<T>*>(source);
}

template <class T>
SACCADE_INLINE void store(T* target, Vector<T> vector) {
  *reinterpret_cast<Unaligned<T>*>(target) = vector;
}

// Loads and stores by storage type: the compute type itself, 16 bits through a conversion.
SACCADE_INLINE Vector<float> load_as_compute(const float* source) { return load(source); }
SACCADE_INLINE Vector<double> load_as_compute(const double* source) { return load(source); }
SACCADE_INLINE Vector<float> load_as_compute(const Half* source) { return load_half(source); }
SACCADE_INLINE Vector<float> load_as_compute(const BFloat16* source) {
  typedef typename VectorType<uint16_t, kFloatWidth>::unaligned Bits;
  typedef typename VectorType<uint32_t, kFloatWidth>::type Wide;
  const Wide wide = __builtin_convertvector(*reinterpret_cast<const Bits*>(source), Wide) << 16;
  return (Vector<float>)wide;
}

// The elements of two neighbouring vectors as two vectors, in an order that depends on the storage
// type: one after the other, but for bfloat16 the elements of even index, then those of odd index,
// which takes one load, one shift and one mask. Sums do not depend on the order, and
// store_interleaved restores it.
template <class S, class T>
SACCADE_INLINE Vector<T> load_interleaved(const S* source, int odd) {
  return load_as_compute(source + odd * kWidth<T>);
}
template <>
SACCADE_INLINE Vector<float> load_interleaved<BFloat16, float>(const BFloat16* source, int odd) {
  typedef typename VectorType<uint32_t, kFloatWidth>::type Wide;
  Wide both;
  std::memcpy(&both, source, sizeof(both));
  return (Vector<float>)(odd ? both & 0xffff0000u : both << 16);
}

// A vector in the storage type.
typedef typename VectorType<uint16_t, kFloatWidth>::type Bits16;

SACCADE_INLINE Vector<float> to_stored(const float*, Vector<float> vector) { return vector; }
SACCADE_INLINE Vector<double> to_stored(const double*, Vector<double> vector) { return vector; }
SACCADE_INLINE Bits16 to_stored(const Half*, Vector<float> vector) {
  return (Bits16)half_bits(vector);
}
// The bits of bfloat16 elements in the upper halves; the lower halves hold leftovers of the floats.
SACCADE_INLINE typename VectorType<uint32_t, kFloatWidth>::type round_to_bfloat16(
    Vector<float> vector) {
  typedef typename VectorType<uint32_t, kFloatWidth>::type Wide;
  const Wide wide = (Wide)vector;
  const Wide rounded = wide + 0x7fff + ((wide >> 16) & 1);  // half to even
  const Wide quiet = wide | 0x400000;                       // a NaN stays one
  return (Wide)(vector == vector) ? rounded : quiet;
}
SACCADE_INLINE Bits16 to_stored(const BFloat16*, Vector<float> vector) {
  return __builtin_convertvector(round_to_bfloat16(vector) >> 16, Bits16);
}

template <class S, class V>
SACCADE_INLINE void store_from_compute(S* target, V vector) {
  const auto stored = to_stored(target, vector);
  std::memcpy(target, &stored, sizeof(stored));
}

// Past the caches; `target` must be aligned to the size of the stored vector.
template <class S, class V>
SACCADE_INLINE void stream_from_compute(S* target, V vector) {
  const auto stored = to_stored(target, vector);
  stream(target, &stored, std::integral_constant<std::size_t, sizeof(stored)>{});
}

// The reverse of load_interleaved.
template <class S, class T>
SACCADE_INLINE void store_interleaved(S* target, Vector<T> first, Vector<T> second, bool streams) {
  if (streams) {
    stream_from_compute(target, first);
    stream_from_compute(target + kWidth<T>, second);
  } else {
    store_from_compute(target, first);
    store_from_compute(target + kWidth<T>, second);
  }
}
template <>
SACCADE_INLINE void store_interleaved<BFloat16, float>(BFloat16* target, Vector<float> even,
                                                       Vector<float> odd, bool streams) {
  const auto both = (round_to_bfloat16(odd) & 0xffff0000u) | (round_to_bfloat16(even) >> 16);
  if (streams) {
    stream(target, &both, std::integral_constant<std::size_t, sizeof(both)>{});
  } else {
    std::memcpy(target, &both, sizeof(both));
  }
}

// The type by which load_masked and store_masked take a storage type.
template <class S>
using Masked = typename std::conditional<sizeof(S) == 2, uint16_t, S>::type;

// The first `count` elements, fewer than a vector has; the rest is zero.
template <class S, class T>
SACCADE_INLINE Vector<T> load_partial(const S* source, int64_t count) {
  S padded[kWidth<T>] = {};
  if constexpr (sizeof(S) >= kMinMaskedBytes) {
    const auto loaded = load_masked(reinterpret_cast<const Masked<S>*>(source), count);
    std::memcpy(padded, &loaded, sizeof(padded));
  } else {
    for (int64_t i = 0; i < count; ++i) {
      padded[i] = source[i];
    }
  }
  return load_as_compute(padded);
}

template <class S, class T>
SACCADE_INLINE void store_partial(S* target, Vector<T> vector, int64_t count) {
  const auto stored = to_stored(target, vector);
  if constexpr (sizeof(S) >= kMinMaskedBytes) {
    store_masked(reinterpret_cast<Masked<S>*>(target),
                 (decltype(load_masked(reinterpret_cast<Masked<S>*>(target), 0)))stored, count);
  } else {
    S padded[kWidth<T>];
    std::memcpy(padded, &stored, sizeof(padded));
    for (int64_t i = 0; i < count; ++i) {
      target[i] = padded[i];
    }
  }
}

template <class T>
SACCADE_INLINE Vector<T> maximum(Vector<T> a, Vector<T> b) {
  return a > b ? a : b;  // b where a is NaN
}

template <class T>
SACCADE_INLINE Vector<T> minimum(Vector<T> a, Vector<T> b) {
  return a < b ? a : b;  // b where a is NaN
}

// Indices of rows of the value: 32 bits for each lane.
template <class T>
using RowIndices = typename VectorType<int32_t, kWidth<T>>::type;

template <class T>
SACCADE_INLINE RowIndices<T> load_rows(const int32_t* source) {
  return *reinterpret_cast<const typename VectorType<int32_t, kWidth<T>>::unaligned*>(source);
}
template <class T>
SACCADE_INLINE void store_rows(int32_t* target, RowIndices<T> rows) {
  *reinterpret_cast<typename VectorType<int32_t, kWidth<T>>::unaligned*>(target) = rows;
}
// `vector` must hold whole numbers.
template <class T>
SACCADE_INLINE RowIndices<T> to_rows(Vector<T> vector) {
  return __builtin_convertvector(vector, RowIndices<T>);
}

template <class M>
SACCADE_INLINE bool any(M mask) {
  bool result = false;
  for (unsigned i = 0; i < sizeof(mask) / sizeof(mask[0]); ++i) {
    result |= mask[i] != 0;
  }
  return result;
}

// Whether one of `count` elements is NaN (all are finite); `count` is a multiple of the width.
template <class T>
SACCADE_INLINE bool has_nan(const T* elements, int64_t count) {
  auto result = load(elements) != load(elements);
  for (int64_t i = kWidth<T>; i < count; i += kWidth<T>) {
    const Vector<T> vector = load(elements + i);
    result |= vector != vector;
  }
  return any(result);
}
template <class T>
SACCADE_INLINE bool all_finite(const T* elements, int64_t count) {
  Vector<T> zero_or_nan = {};
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    const Vector<T> vector = load(elements + i);
    zero_or_nan += vector - vector;
  }
  return !any(zero_or_nan != zero_or_nan);
}

template <class T, int... I>
SACCADE_INLINE Vector<T> shuffle(Vector<T> a, Vector<T> b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  typedef decltype(a == b) Mask;
  return __builtin_shuffle(a, b, Mask{I...});
#endif
}

template <class T, int... I>
SACCADE_INLINE Vector<T> select_evens(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, 2 * I...>(a, b);
}
template <class T, int... I>
SACCADE_INLINE Vector<T> select_odds(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, 2 * I + 1 ...>(a, b);
}

// The elements of even (odd) index of a and b, joined.
template <class T>
SACCADE_INLINE Vector<T> evens(Vector<T> a, Vector<T> b) {
  return select_evens<T>(a, b, std::make_integer_sequence<int, kWidth<T>>{});
}
template <class T>
SACCADE_INLINE Vector<T> odds(Vector<T> a, Vector<T> b) {
  return select_odds<T>(a, b, std::make_integer_sequence<int, kWidth<T>>{});
}

template <class T, int... I>
SACCADE_INLINE Vector<T> zip_low(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 2 + I % 2 * kWidth<T>)...>(a, b);
}
template <class T, int... I>
SACCADE_INLINE Vector<T> zip_high(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, ((kWidth<T> + I) / 2 + I % 2 * kWidth<T>)...>(a, b);
}

template <class T, int Lane, int... I>
SACCADE_INLINE Vector<T> splat_lane(Vector<T> quads, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 4 * 4 + Lane)...>(quads, quads);
}

// Four elements, each in all lanes of a vector. One load and four shuffles: four loads would wait
// for the loads of rows, which keep the load units busy.
template <class T>
struct Quad {
  Vector<T> splats[4];

  SACCADE_INLINE explicit Quad(const T* source) {
    constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
    const Vector<T> quads = (Vector<T>)repeat_four(source);
    splats[0] = splat_lane<T, 0>(quads, lanes);
    splats[1] = splat_lane<T, 1>(quads, lanes);
    splats[2] = splat_lane<T, 2>(quads, lanes);
    splats[3] = splat_lane<T, 3>(quads, lanes);
  }
  SACCADE_INLINE Vector<T> operator[](int lane) const { return splats[lane]; }
};

// a[0], b[0], a[1], b[1], ...
template <class T>
SACCADE_INLINE void store_zipped(T* target, Vector<T> a, Vector<T> b) {
  constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
  store(target, zip_low<T>(a, b, lanes));
  store(target + kWidth<T>, zip_high<T>(a, b, lanes));
}

// Every third element of a, b and c, joined, from element `First` on.
template <class T, int First, int... I>
SACCADE_INLINE Vector<T> thirds(Vector<T> a, Vector<T> b, Vector<T> c,
                                std::integer_sequence<int, I...>) {
  constexpr int W = kWidth<T>;
  const Vector<T> ab = shuffle<T, (3 * I + First < 2 * W ? 3 * I + First : 0)...>(a, b);
  return shuffle<T, (3 * I + First < 2 * W ? I : 3 * I + First - W)...>(ab, c);
}

// Vector `Number` of a[0], b[0], c[0], a[1], ...
template <class T, int Index, int... I>
SACCADE_INLINE Vector<T> triples(Vector<T> a, Vector<T> b, Vector<T> c,
                                 std::integer_sequence<int, I...>) {
  constexpr int W = kWidth<T>, first = Index * W;
  const Vector<T> ab = shuffle<T, ((first + I) / 3 + (first + I) % 3 % 2 * W)...>(a, b);
  return shuffle<T, ((first + I) % 3 < 2 ? I : W + (first + I) / 3)...>(ab, c);
}

// The coordinates of a vector of points, which lie point after point, by axis; and back.
template <class T, int N>
SACCADE_INLINE void load_by_axis(const T* source, Vector<T>* axes) {
  constexpr int W = kWidth<T>;
  constexpr std::make_integer_sequence<int, W> lanes{};
  const Vector<T> first = load(source);
  if constexpr (N == 1) {
    axes[0] = first;
  } else if constexpr (N == 2) {
    const Vector<T> second = load(source + W);
    axes[0] = evens<T>(first, second);
    axes[1] = odds<T>(first, second);
  } else {
    const Vector<T> second = load(source + W), third = load(source + 2 * W);
    axes[0] = thirds<T, 0>(first, second, third, lanes);
    axes[1] = thirds<T, 1>(first, second, third, lanes);
    axes[2] = thirds<T, 2>(first, second, third, lanes);
  }
}
template <class T, int N>
SACCADE_INLINE void store_by_axis(T* target, const Vector<T>* axes) {
  constexpr int W = kWidth<T>;
  constexpr std::make_integer_sequence<int, W> lanes{};
  if constexpr (N == 1) {
    store(target, axes[0]);
  } else if constexpr (N == 2) {
    store_zipped<T>(target, axes[0], axes[1]);
  } else {
    store(target, triples<T, 0>(axes[0], axes[1], axes[2], lanes));
    store(target + W, triples<T, 1>(axes[0], axes[1], axes[2], lanes));
    store(target + 2 * W, triples<T, 2>(axes[0], axes[1], axes[2], lanes));
  }
}

// a[0], b[0], c[0], d[0], a[1], ...
template <class T>
SACCADE_INLINE void store_quads(T* target, Vector<T> a, Vector<T> b, Vector<T> c, Vector<T> d) {
  constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
  store_zipped<T>(target, zip_low<T>(a, c, lanes), zip_low<T>(b, d, lanes));
  store_zipped<T>(target + 2 * kWidth<T>, zip_high<T>(a, c, lanes), zip_high<T>(b, d, lanes));
}

// Lanes 0, 1 (2, 3) of each four, of a and b in turns; and the first (second) halves of each four.
template <class T, int... I>
SACCADE_INLINE Vector<T> low_turns(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 4 * 4 + I % 4 / 2 + I % 2 * kWidth<T>)...>(a, b);
}
template <class T, int... I>
SACCADE_INLINE Vector<T> high_turns(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 4 * 4 + 2 + I % 4 / 2 + I % 2 * kWidth<T>)...>(a, b);
}
template <class T, int... I>
SACCADE_INLINE Vector<T> first_halves(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 4 * 4 + I % 2 + I % 4 / 2 * kWidth<T>)...>(a, b);
}
template <class T, int... I>
SACCADE_INLINE Vector<T> second_halves(Vector<T> a, Vector<T> b, std::integer_sequence<int, I...>) {
  return shuffle<T, (I / 4 * 4 + 2 + I % 2 + I % 4 / 2 * kWidth<T>)...>(a, b);
}
template <class T, int By, int... I>
SACCADE_INLINE Vector<T> rotate(Vector<T> a, std::integer_sequence<int, I...>) {
  return shuffle<T, ((I + By) % kWidth<T>)...>(a, a);
}

// Stores the sums of the lanes of four vectors.
template <class T>
SACCADE_INLINE void store_sums(T* target, Vector<T> a, Vector<T> b, Vector<T> c, Vector<T> d) {
  constexpr int W = kWidth<T>;
  constexpr std::make_integer_sequence<int, W> lanes{};
  const Vector<T> ab = low_turns<T>(a, b, lanes) + high_turns<T>(a, b, lanes);
  const Vector<T> cd = low_turns<T>(c, d, lanes) + high_turns<T>(c, d, lanes);
  Vector<T> abcd = first_halves<T>(ab, cd, lanes) + second_halves<T>(ab, cd, lanes);
  if (W > 8) {
    abcd += rotate<T, 8>(abcd, lanes);
  }
  if (W > 4) {
    abcd += rotate<T, 4>(abcd, lanes);
  }
  std::memcpy(target, &abcd, 4 * sizeof(T));
}
