// The gradients of locations and weights: dot products of grad_output with the rows of the value,
// then *points* in reverse.

// The grad_output [T, M * D] of a unit in the compute type, in slots (see for_blocks); numbers
// that the last slot visits a second time are zero there. With kInPairs in the order of blocks.
template <bool kInPairs, class S, class T>
void load_grad(const Problem& problem, const S* grad_output, const Unit& unit, Buffer<T>& grads) {
  const int64_t head_dim = problem.head_dim;
  const int64_t stride = whole_vectors<T>(head_dim);
  grads.reserve(unit.num_looks() * stride);
  const int64_t last = problem.total_queries() * problem.num_heads - 1;
  const auto load_look = [&](int64_t look, int64_t row, int64_t) SACCADE_INLINE_LAMBDA {
    const S* from = grad_output + row * head_dim;
    const int64_t ahead = std::min(row + kQueriesAhead * problem.num_heads, last);
    prefetch(grad_output + ahead * head_dim, head_dim);
    T* to = &grads[look * stride];
    const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
      typedef decltype(block) B;
#pragma GCC unroll 2
      for (int v = 0; v < B::NV; ++v) {
        store(to + slot + v * kWidth<T>, load_of_block<S, T, B>(from + channel, v, head_dim));
      }
      if (!B::Partial) {
        std::fill_n(to + slot, slot - channel, T(0));
      }
    };
    for_blocks<T, kInPairs ? 2 : 1>(head_dim, run);
  };
  unit.for_each_look(problem, load_look);
}

// The dot products of grad with the four corners of a point.
template <class S, class T>
SACCADE_INLINE void dots_of_point(const LevelRows<const S>& level, const S* upper, const T* grad,
                                  int64_t head_dim, T* dots) {
  Vector<T> dot[4] = {Vector<T>{}, Vector<T>{}, Vector<T>{}, Vector<T>{}};
  const S* lower = upper + level.down;
  const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(block)::NV; ++v) {
      const Vector<T> g = load(grad + slot + v * kWidth<T>);
      const auto add = [&](Vector<T>& sum, const S* row) SACCADE_INLINE_LAMBDA {
        const auto numbers = load_of_block<S, T, decltype(block)>(row + channel, v, head_dim);
        sum = (Vector<T>)fma(g, numbers, sum);
      };
      add(dot[0], upper);
      add(dot[1], upper + level.right);
      add(dot[2], lower);
      add(dot[3], lower + level.right);
    }
  };
  for_blocks<T, 4>(head_dim, run);
  store_sums<T>(dots, dot[0], dot[1], dot[2], dot[3]);
}

// The dot products of all points of a unit, in place of their weights.
template <class S, class T>
void dots_of_chunk(const Problem& problem, Points<T>& points, const Unit& unit,
                   const HeadRows<S>& rows, const T* grads, int64_t grads_stride) {
  const int64_t total_points = problem.total_points, head_dim = problem.head_dim;
  for_each_slice(problem, [&](const Level& level, int64_t slice) SACCADE_INLINE_LAMBDA {
    const int64_t num_points = level.num_points;
    T* dots = points.weights(level, slice);
    const T* grad = grads;
    for_each_look_of_level(problem, level, rows, unit, points.rows(level, slice), true,
                           [&](const LevelRows<const S>& level_rows, const S* first,
                               const int32_t* point_rows) SACCADE_INLINE_LAMBDA {
                             for (int64_t k = 0; k < num_points; ++k) {
                               dots_of_point(level_rows, first + point_rows[k] * level_rows.stride,
                                             grad, head_dim, dots + 4 * k);
                             }
                             grad += grads_stride;
                             dots += 4 * total_points;
                           });
  });
}

// The dot products of a vector of points by corner, read from [points, 4].
template <class T>
struct Dots {
  Vector<T> corners[4];

  SACCADE_INLINE explicit Dots(const T* from) {
    typedef Vector<T> V;
    constexpr int W = kWidth<T>;
    const V first = load(from), second = load(from + W);
    const V third = load(from + 2 * W), fourth = load(from + 3 * W);
    const V even_low = evens<T>(first, second), even_high = evens<T>(third, fourth);
    const V odd_low = odds<T>(first, second), odd_high = odds<T>(third, fourth);
    corners[0] = evens<T>(even_low, even_high);
    corners[1] = evens<T>(odd_low, odd_high);
    corners[2] = odds<T>(even_low, even_high);
    corners[3] = odds<T>(odd_low, odd_high);
  }

  // Weighted by what each axis gives its two cells, and summed.
  SACCADE_INLINE Vector<T> sum(const Vector<T>* x) const {
    return x[0] * corners[0] + x[1] * corners[1];
  }
  SACCADE_INLINE Vector<T> sum(const Vector<T>* x, const Vector<T>* y) const {
    return y[0] * sum(x) + y[1] * (x[0] * corners[2] + x[1] * corners[3]);
  }
};

// From dot products to the gradients of locations and weights; false if a number is NaN.
template <int N, class T>
bool chain(const Problem& problem, const Points<T>& points, int64_t num_looks, T* grad_locations,
           T* grad_weights) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const PointTable<T>& table = point_table<T>(problem);
  const PointCopies<T>& given = points.kept;
  const T* const dots = points.weights(0);
  V zero_or_nan = {};
  InPeriod<T> in_period(problem.total_points);
  for (int64_t at = 0; at < num_looks * problem.total_points; at += W) {
    const Located<T, N> point(problem, table, &given.locations[N * at], in_period.at);
    in_period.next();
    const V attention = load(&given.attention_weights[at]);
    const Dots<T> first(dots + 4 * at);
    // Of the weights of all axes, but of the slopes of axis `by`.
    const auto sum_by = [&](int by) SACCADE_INLINE_LAMBDA {
      const auto of = [&](int n) { return by == n ? point.axes[n].slopes : point.axes[n].weights; };
      if constexpr (N == 1) {
        return first.sum(of(0));
      } else if constexpr (N == 2) {
        return first.sum(of(0), of(1));
      } else {
        const Dots<T> second(points.weights(1) + 4 * at);
        return of(2)[0] * first.sum(of(0), of(1)) + of(2)[1] * second.sum(of(0), of(1));
      }
    };
    const V grad_weight = sum_by(-1);
    V sum = grad_weight, grad_location[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      grad_location[n] = attention * sum_by(n);
      sum += grad_location[n];
    }
    store(grad_weights + at, grad_weight);
    store_by_axis<T, N>(grad_locations + N * at, grad_location);
    zero_or_nan += sum == sum ? V{} : sum;
  }
  return !any(zero_or_nan != zero_or_nan);
}

// Where the gradients of the points go (see PointGradients).
template <class T>
struct GradPoints {
  T* references;
  T* locations;
  T* attention_weights;
  bool stream;

  GradPoints(const Problem& problem, const PointGradients& to)
      : references(static_cast<T*>(to.reference_points)),
        locations(static_cast<T*>(to.locations)),
        attention_weights(static_cast<T*>(to.weights)),
        stream(problem.stream_results &&
               fills_lines(locations, problem.spatial_dims * problem.total_points * sizeof(T)) &&
               fills_lines(attention_weights, problem.total_points * sizeof(T))) {}
};

// Writes the gradients of a unit's points, whose dot products are in place of their weights.
template <class S, class T>
void write_grad_points(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
                       Points<T>& points, const HeadRows<S>& rows, const S* grad_output,
                       const GradPoints<T>& to, PointCopies<T>& grads) {
  const int64_t total_points = problem.total_points, spatial_dims = problem.spatial_dims;
  const int64_t room = unit.num_looks() * total_points + kWidth<T>;
  grads.locations.reserve(spatial_dims * room);
  grads.attention_weights.reserve(room);
  bool finite = false;
  with_axes(problem, [&](auto axes) {
    finite = chain<decltype(axes)::value>(problem, points, unit.num_looks(), &grads.locations[0],
                                          &grads.attention_weights[0]);
  });
  if (!finite) {
    unit.for_each_look(problem, [&](int64_t look, int64_t row, int64_t head) {
      exact_backward_points(problem, points.look(problem, given, unit, row),
                            rows.in_place + head * rows.head_stride, rows.stride,
                            grad_output + row * problem.head_dim,
                            &grads.locations[spatial_dims * look * total_points],
                            &grads.attention_weights[look * total_points]);
    });
  }
  if (problem.is_fused()) {
    with_axes(problem, [&](auto axes) {
      points.fused.template reverse<decltype(axes)::value>(problem, given, unit, points.kept, grads,
                                                           to.references);
    });
  }
  const int64_t of_query = unit.num_heads * total_points;
  for (int64_t query = 0; query < unit.num_queries; ++query) {
    const int64_t first = unit.row(problem, query) * total_points;
    const T* location = &grads.locations[spatial_dims * query * of_query];
    const T* weight = &grads.attention_weights[query * of_query];
    if (to.stream) {
      stream_numbers(to.locations + spatial_dims * first, location, spatial_dims * of_query);
      stream_numbers(to.attention_weights + first, weight, of_query);
    } else {
      copy_numbers(to.locations + spatial_dims * first, location, spatial_dims * of_query);
      copy_numbers(to.attention_weights + first, weight, of_query);
    }
  }
}

template <class S>
struct BackwardPointsScratch {
  PackedRows<S> packed;
  Points<Compute<S>> points;
  Buffer<Compute<S>> grads;
  PointCopies<Compute<S>> grad_points;
};

template <class S>
void backward_points(const Problem& problem, const Value& value, const void* grad_output,
                     const PointInputs& inputs, const PointGradients& gradients, int64_t begin,
                     int64_t end, BackwardPointsScratch<S>& scratch) {
  typedef Compute<S> T;
  const S* grad = static_cast<const S*>(grad_output);
  const GivenPoints<T> given(inputs);
  const GradPoints<T> to(problem, gradients);
  scratch.packed.forget();
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_of(problem, index);
    const HeadRows<S> rows = scratch.packed.rows(problem, value, unit);
    Points<T>& points = scratch.points;
    points.template locate<false>(problem, given, unit);
    load_grad<true>(problem, grad, unit, scratch.grads);
    dots_of_chunk(problem, points, unit, rows, &scratch.grads[0],
                  whole_vectors<T>(problem.head_dim));
    write_grad_points(problem, given, unit, points, rows, grad, to, scratch.grad_points);
  }
  if (to.stream) {
    end_streams();
  }
  scratch.packed.forget();
}
