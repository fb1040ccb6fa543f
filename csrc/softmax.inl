// The softmax over the points of a (query, head) pair, and its reverse. Pairs lie one after the
// other, [pairs, P].
//
// If P is a power of two and not above the width of a vector, a vector holds whole pairs, and sums
// go from lane to lane within each; else a pair has a number of vectors of its own, the last of
// which reaches into the next pair.

// Constants of the exponential: bits of the fraction, bias of the exponent, terms of the series,
// ln 2 in two parts (a small multiple of the first is exact), and the smallest argument whose
// result is not 0.
template <class T>
struct Exponential {
  typedef uint32_t Bits;
  static constexpr int kFraction = 23, kBias = 127, kTerms = 7;
  static constexpr T kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f, kMinArgument = -87.0f;
};
template <>
struct Exponential<double> {
  typedef uint64_t Bits;
  static constexpr int kFraction = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLn2High = 0x1.62e42p-1, kLn2Low = 0x1.fdf473de6af28p-22,
                          kMinArgument = -708.0;
};

template <class T>
constexpr T inverse_factorial(int n) {
  double factorial = 1;
  for (int i = 2; i <= n; ++i) {
    factorial *= i;
  }
  return static_cast<T>(1 / factorial);
}

// e to the power of x, which must not be above 0. Results too small to have all their digits (below
// e^-87 = 2e-38, for double e^-708 = 3e-308) are 0.
template <class T>
SACCADE_INLINE Vector<T> exp_nonpositive(Vector<T> x) {
  typedef Vector<T> V;
  typedef Exponential<T> E;
  typedef typename E::Bits Bits;
  typedef typename VectorType<Bits, kWidth<T>>::type BitsVector;
  // x = n ln 2 + r. The sum with 1.5 * 2^fraction is rounded to a whole number, which is then in
  // its lowest bits.
  const V magic = splat<T>(T(3) * static_cast<T>(Bits(1) << (E::kFraction - 1)));
  const V shifted = (V)fma(x, splat<T>(T(0x1.71547652b82fep0)), magic);
  const V n = shifted - magic;
  const V high = (V)fma(n, splat<T>(-E::kLn2High), x);
  const V r = (V)fma(n, splat<T>(-E::kLn2Low), high);
  V sum = splat<T>(inverse_factorial<T>(E::kTerms));
#pragma GCC unroll 13
  for (int term = E::kTerms - 1; term >= 0; --term) {
    sum = (V)fma(sum, r, splat<T>(inverse_factorial<T>(term)));
  }
  const V power = (V)(((BitsVector)shifted + Bits(E::kBias)) << E::kFraction);  // 2^n
  return x < splat<T>(E::kMinArgument) ? V{} : sum * power;
}

template <class T, int By, int... I>
SACCADE_INLINE Vector<T> exchange(Vector<T> a, std::integer_sequence<int, I...>) {
  return shuffle<T, (I ^ By)...>(a, a);
}

// Combines the lanes of each group (of a power of two); every lane gets the result.
template <class T, int Group, class Combine>
SACCADE_INLINE Vector<T> across(Vector<T> v, Combine combine) {
  constexpr std::make_integer_sequence<int, kWidth<T>> lanes{};
  if constexpr (Group > 1) {
    v = combine(v, exchange<T, 1>(v, lanes));
  }
  if constexpr (Group > 2) {
    v = combine(v, exchange<T, 2>(v, lanes));
  }
  if constexpr (Group > 4) {
    v = combine(v, exchange<T, 4>(v, lanes));
  }
  if constexpr (Group > 8) {
    v = combine(v, exchange<T, 8>(v, lanes));
  }
  return v;
}
template <class T, int Group>
SACCADE_INLINE Vector<T> maximum_across(Vector<T> v) {
  return across<T, Group>(v, [](Vector<T> a, Vector<T> b) { return maximum<T>(a, b); });
}
template <class T, int Group>
SACCADE_INLINE Vector<T> sum_across(Vector<T> v) {
  return across<T, Group>(v, [](Vector<T> a, Vector<T> b) { return a + b; });
}

// Calls run(group) if a vector holds a whole number of groups of P lanes; else returns false.
template <class T, class Run>
SACCADE_INLINE bool in_groups(int64_t total_points, Run run) {
  constexpr int W = kWidth<T>;
  const auto try_group = [&](auto group) SACCADE_INLINE_LAMBDA {
    if constexpr (decltype(group)::value <= W) {
      if (total_points == decltype(group)::value) {
        run(group);
        return true;
      }
    }
    return false;
  };
  return try_group(std::integral_constant<int, 1>{}) ||
         try_group(std::integral_constant<int, 2>{}) ||
         try_group(std::integral_constant<int, 4>{}) ||
         try_group(std::integral_constant<int, 8>{}) ||
         try_group(std::integral_constant<int, 16>{});
}

// The lanes of v, which is a vector from element `offset` of a row of `count` on, and those of
// `rest` beyond the end of the row.
template <class T>
SACCADE_INLINE Vector<T> select_within_row(Vector<T> v, int64_t offset, int64_t count,
                                           Vector<T> rest) {
  static const T kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (offset + kWidth<T> <= count) {
    return v;
  }
  return load(kLanes) < splat(static_cast<T>(count - offset)) ? v : rest;
}

// Turns logits into weights, where the pairs are groups.
template <class T>
void softmax_in_groups(T* weights, int64_t num_pairs, int64_t total_points) {
  in_groups<T>(total_points, [&](auto group) SACCADE_INLINE_LAMBDA {
    constexpr int G = decltype(group)::value;
    for (int64_t i = 0; i < num_pairs * total_points; i += kWidth<T>) {
      const Vector<T> logits = load(weights + i);
      const Vector<T> powers = exp_nonpositive<T>(logits - maximum_across<T, G>(logits));
      store(weights + i, powers / sum_across<T, G>(powers));
    }
  });
}

// From the logits of one pair to its weights. Whole vectors are read and written.
template <class T>
SACCADE_INLINE void softmax_pair(const T* logits, T* weights, int64_t total_points) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const V lowest = splat<T>(-std::numeric_limits<T>::infinity());
  V max = lowest, sum = {};
  for (int64_t i = 0; i < total_points; i += W) {
    max = maximum<T>(select_within_row<T>(load(logits + i), i, total_points, lowest), max);
  }
  max = maximum_across<T, W>(max);
  for (int64_t i = 0; i < total_points; i += W) {
    const V below = select_within_row<T>(load(logits + i), i, total_points, lowest) - max;
    const V powers = exp_nonpositive<T>(below);
    store(weights + i, powers);
    sum += powers;
  }
  sum = sum_across<T, W>(sum);
  for (int64_t i = 0; i < total_points; i += W) {
    store(weights + i, load(weights + i) / sum);
  }
}

// Turns gradients of weights into those of logits. Both arrays must have the capacity for one more
// vector.
template <class T>
void softmax_backward(const T* weights, T* grads, int64_t num_pairs, int64_t total_points) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const auto run = [&](auto group) SACCADE_INLINE_LAMBDA {
    constexpr int G = decltype(group)::value;
    for (int64_t i = 0; i < num_pairs * total_points; i += W) {
      const V weight = load(weights + i), grad = load(grads + i);
      store(grads + i, weight * (grad - sum_across<T, G>(weight * grad)));
    }
  };
  if (in_groups<T>(total_points, run)) {
    return;
  }
  V first = load(grads);
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const auto grad = [&](int64_t i)
                          SACCADE_INLINE_LAMBDA { return i == 0 ? first : load(grads + i); };
    V sum = {};
    for (int64_t i = 0; i < total_points; i += W) {
      sum += select_within_row<T>(load(weights + i) * grad(i), i, total_points, V{});
    }
    sum = sum_across<T, W>(sum);
    // Loaded before the stores below, which it would otherwise have to wait for.
    const V next = load(grads + total_points);
    for (int64_t i = 0; i < total_points; i += W) {
      const V grad_weights = grad(i);
      const V grad_logits = load(weights + i) * (grad_weights - sum);
      store(grads + i, select_within_row<T>(grad_logits, i, total_points, grad_weights));
    }
    first = next;
    weights += total_points;
    grads += total_points;
  }
}
