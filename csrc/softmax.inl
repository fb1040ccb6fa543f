// The softmax over the points of a look, and its reverse. Looks lie one after the other, [looks,
// P].
//
// Where P is a power of two and not above a vector, a vector holds whole looks, and sums go from
// lane to lane within each; else a look is a number of vectors of its own, the last of which
// reaches into the next look.

// Of the exponential: bits of the fraction, bias of the exponent, ln 2 in two parts of which a
// small multiple of the first is exact, terms of the series.
template <class T>
struct Exponential {
  typedef uint32_t Bits;
  static constexpr int kFraction = 23, kBias = 127, kTerms = 7;
  static constexpr T kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f, kLeast = -87.0f;
};
template <>
struct Exponential<double> {
  typedef uint64_t Bits;
  static constexpr int kFraction = 52, kBias = 1023, kTerms = 13;
  static constexpr double kLn2High = 0x1.62e42p-1, kLn2Low = 0x1.fdf473de6af28p-22, kLeast = -708.0;
};

template <class T>
constexpr T inverse_factorial(int number) {
  double factorial = 1;
  for (int i = 2; i <= number; ++i) {
    factorial *= i;
  }
  return static_cast<T>(1 / factorial);
}

// e to the power of numbers that are not above 0; what would be too small to have all its digits
// (below e^-87 = 2e-38, of doubles e^-708 = 3e-308) is 0.
template <class T>
SACCADE_INLINE Vector<T> exp_of_negative(Vector<T> x) {
  typedef Vector<T> V;
  typedef Exponential<T> E;
  typedef typename E::Bits Bits;
  typedef typename VectorOf<Bits, kWidth<T>>::type BitsVector;
  // x = n ln 2 + r. Added to 1.5 * 2^fraction, a number is rounded to a whole one, which then is in
  // the lowest bits.
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
  return x < splat<T>(E::kLeast) ? V{} : sum * power;
}

template <class T, int By, int... I>
SACCADE_INLINE Vector<T> exchange(Vector<T> a, std::integer_sequence<int, I...>) {
  return shuffle<T, (I ^ By)...>(a, a);
}

// Combines the lanes of each `Group` (a power of two); every lane gets the result.
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

// Calls run(group) if P points are a group of lanes that a vector holds a whole number of; else
// false.
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

// The lanes of a row of `count` numbers from number `at` on, and `rest` in those beyond.
template <class T>
SACCADE_INLINE Vector<T> within_row(Vector<T> v, int64_t at, int64_t count, Vector<T> rest) {
  static const T kLanes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  if (at + kWidth<T> <= count) {
    return v;
  }
  return load(kLanes) < splat(static_cast<T>(count - at)) ? v : rest;
}

// From logits to weights, in place, of looks that are groups.
template <class T>
void softmax_in_groups(T* numbers, int64_t num_looks, int64_t total_points) {
  in_groups<T>(total_points, [&](auto group) SACCADE_INLINE_LAMBDA {
    constexpr int G = decltype(group)::value;
    for (int64_t at = 0; at < num_looks * total_points; at += kWidth<T>) {
      const Vector<T> logits = load(numbers + at);
      const Vector<T> powers = exp_of_negative<T>(logits - maximum_across<T, G>(logits));
      store(numbers + at, powers / sum_across<T, G>(powers));
    }
  });
}

// From the logits of one look to its weights. Whole vectors are read, and written.
template <class T>
SACCADE_INLINE void softmax_of_look(const T* logits, T* weights, int64_t total_points) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const V lowest = splat<T>(-std::numeric_limits<T>::infinity());
  V most = lowest, sum = {};
  for (int64_t at = 0; at < total_points; at += W) {
    most = maximum<T>(within_row<T>(load(logits + at), at, total_points, lowest), most);
  }
  most = maximum_across<T, W>(most);
  for (int64_t at = 0; at < total_points; at += W) {
    const V below = within_row<T>(load(logits + at), at, total_points, lowest) - most;
    const V powers = exp_of_negative<T>(below);
    store(weights + at, powers);
    sum += powers;
  }
  sum = sum_across<T, W>(sum);
  for (int64_t at = 0; at < total_points; at += W) {
    store(weights + at, load(weights + at) / sum);
  }
}

// From the gradients of weights to those of logits, in place. There is room for a vector behind the
// last numbers.
template <class T>
void softmax_backward(const T* weights, T* grads, int64_t num_looks, int64_t total_points) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const auto run = [&](auto group) SACCADE_INLINE_LAMBDA {
    constexpr int G = decltype(group)::value;
    for (int64_t at = 0; at < num_looks * total_points; at += W) {
      const V weight = load(weights + at), grad = load(grads + at);
      store(grads + at, weight * (grad - sum_across<T, G>(weight * grad)));
    }
  };
  if (in_groups<T>(total_points, run)) {
    return;
  }
  V first = load(grads);
  for (int64_t look = 0; look < num_looks; ++look) {
    const auto grad = [&](int64_t at)
                          SACCADE_INLINE_LAMBDA { return at == 0 ? first : load(grads + at); };
    V sum = {};
    for (int64_t at = 0; at < total_points; at += W) {
      sum += within_row<T>(load(weights + at) * grad(at), at, total_points, V{});
    }
    sum = sum_across<T, W>(sum);
    // Before it is written to: read afterwards, it would have to wait for that.
    const V next = load(grads + total_points);
    for (int64_t at = 0; at < total_points; at += W) {
      const V of_weights = grad(at);
      const V of_logits = load(weights + at) * (of_weights - sum);
      store(grads + at, within_row<T>(of_logits, at, total_points, of_weights));
    }
    first = next;
    weights += total_points;
    grads += total_points;
  }
}
