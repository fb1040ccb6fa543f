// The gradients of locations and weights: dot products of grad_output with the rows of the value,
// then *points* in reverse.

// The grad_output [B, Q, M * D] of a unit in the compute type, in slots (see for_blocks); numbers
// that the last slot visits a second time are zero there. With kInPairs in the order of blocks.
template <bool kInPairs, class S, class T>
void load_grad(const Problem& problem, const S* grad_output, const Unit& unit, Buffer<T>& grads) {
  const int64_t head_dim = problem.head_dim;
  const int64_t stride = whole_vectors<T>(head_dim);
  grads.reserve(unit.num_queries * stride);
  const int64_t last = problem.batch_size * problem.num_queries * problem.num_heads - 1;
  for (int64_t query = 0; query < unit.num_queries; ++query) {
    const int64_t row = unit.row(problem, query);
    const S* from = grad_output + row * head_dim;
    const int64_t ahead = std::min(row + kQueriesAhead * problem.num_heads, last);
    prefetch(grad_output + ahead * head_dim, head_dim);
    T* to = &grads[query * stride];
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
  }
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

template <class S, class T>
void dots_of_chunk(const Problem& problem, const Points<T>& points, int64_t num_queries,
                   const HeadRows<S>& rows, const T* grads, int64_t grads_stride, T* dots) {
  const int64_t total_points = problem.total_points, head_dim = problem.head_dim;
  for (const Level& level : problem.levels) {
    const LevelRows<const S> level_rows = rows_to_read(problem, level, rows);
    const int64_t num_points = level.num_points;
    const int64_t fetched_ahead = queries_fetched_ahead(level, num_queries);
    const int32_t* point_rows = &points.rows[level.first_point];
    T* to = dots + 4 * level.first_point;
    for (int64_t query = 0; query < num_queries; ++query) {
      if (query < fetched_ahead) {
        prefetch_rows(level_rows, point_rows + kRowQueriesAhead * total_points, num_points,
                      head_dim);
      }
      for (int64_t k = 0; k < num_points; ++k) {
        dots_of_point(level_rows, level_rows.first + point_rows[k] * level_rows.stride,
                      grads + query * grads_stride, head_dim, to + 4 * k);
      }
      point_rows += total_points;
      to += 4 * total_points;
    }
  }
}

// From dot products to the gradients of locations and weights; false if a number is NaN.
template <class T>
bool chain(const Problem& problem, const PointCopies<T>& given, int64_t num_queries,
           const T* all_dots, T* grad_locations, T* grad_weights) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const PointTable<T>& table = point_table<T>(problem);
  V zero_or_nan = {};
  int64_t in_period = 0;
  for (int64_t at = 0; at < num_queries * problem.total_points; at += W) {
    const Located<T> point = locate_points<T>(problem, table, &given.locations[2 * at], in_period);
    in_period = next_in_period<T>(problem, in_period);
    const V attention = load(&given.attention_weights[at]);
    const T* dots = all_dots + 4 * at;
    const V first = load(dots), second = load(dots + W);
    const V third = load(dots + 2 * W), fourth = load(dots + 3 * W);
    const V even_low = evens<T>(first, second), even_high = evens<T>(third, fourth);
    const V odd_low = odds<T>(first, second), odd_high = odds<T>(third, fourth);
    const V corners[4] = {evens<T>(even_low, even_high), evens<T>(odd_low, odd_high),
                          odds<T>(even_low, even_high), odds<T>(odd_low, odd_high)};
    const auto row = [&](const V* by_x, int i) {
      return by_x[0] * corners[2 * i] + by_x[1] * corners[2 * i + 1];
    };
    const V* wx = point.x.weights;
    const V* wy = point.y.weights;
    const V grad_weight = wy[0] * row(wx, 0) + wy[1] * row(wx, 1);
    const V grad_x = attention * (wy[0] * row(point.x.slopes, 0) + wy[1] * row(point.x.slopes, 1));
    const V grad_y = attention * (point.y.slopes[0] * row(wx, 0) + point.y.slopes[1] * row(wx, 1));
    store(grad_weights + at, grad_weight);
    store_pairs<T>(grad_locations + 2 * at, grad_x, grad_y);
    const V sum = grad_weight + grad_x + grad_y;
    zero_or_nan += sum == sum ? V{} : sum;
  }
  return !any(zero_or_nan != zero_or_nan);
}

template <class S>
struct BackwardPointsScratch {
  PackedRows<S> packed;
  Points<Compute<S>> points;
  Buffer<Compute<S>> grads, dots, grad_locations, grad_weights;
};

template <class S>
void backward_points(const Problem& problem, const Value& value, const void* grad_output,
                     const void* locations, const void* weights, void* grad_locations,
                     void* grad_weights, int64_t begin, int64_t end,
                     BackwardPointsScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t total_points = problem.total_points;
  const S* grad = static_cast<const S*>(grad_output);
  const GivenPoints<T> given = {static_cast<const T*>(locations), static_cast<const T*>(weights)};
  const int64_t grads_stride = whole_vectors<T>(problem.head_dim);
  const int64_t most_points = problem.chunk_queries * total_points + kWidth<T>;
  const bool stream = problem.stream_results &&
                      fills_lines(grad_locations, 2 * total_points * sizeof(T)) &&
                      fills_lines(grad_weights, total_points * sizeof(T));
  scratch.packed.forget();
  scratch.dots.reserve(4 * most_points);
  scratch.grad_locations.reserve(2 * most_points);
  scratch.grad_weights.reserve(most_points);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_of(problem, index);
    const HeadRows<S> rows = scratch.packed.rows(problem, value, unit);
    Points<T>& points = scratch.points;
    points.template locate<true>(problem, given, unit);
    load_grad<true>(problem, grad, unit, scratch.grads);
    const int64_t count = unit.num_queries * total_points;
    std::fill_n(&scratch.dots[4 * count], 4 * kWidth<T>, T(0));  // read by the last vector
    dots_of_chunk(problem, points, unit.num_queries, rows, &scratch.grads[0], grads_stride,
                  &scratch.dots[0]);
    if (!chain(problem, points.kept, unit.num_queries, &scratch.dots[0], &scratch.grad_locations[0],
               &scratch.grad_weights[0])) {
      for (int64_t query = 0; query < unit.num_queries; ++query) {
        exact_backward_points(problem, given, unit, query, rows.in_place, rows.stride,
                              grad + unit.row(problem, query) * problem.head_dim,
                              &scratch.grad_locations[2 * query * total_points],
                              &scratch.grad_weights[query * total_points]);
      }
    }
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      const int64_t to = unit.row(problem, query) * total_points;
      const T* location = &scratch.grad_locations[2 * query * total_points];
      const T* weight = &scratch.grad_weights[query * total_points];
      if (stream) {
        stream_numbers(static_cast<T*>(grad_locations) + 2 * to, location, 2 * total_points);
        stream_numbers(static_cast<T*>(grad_weights) + to, weight, total_points);
      } else {
        copy_numbers(static_cast<T*>(grad_locations) + 2 * to, location, 2 * total_points);
        copy_numbers(static_cast<T*>(grad_weights) + to, weight, total_points);
      }
    }
  }
  if (stream) {
    end_streams();
  }
  scratch.packed.forget();
}
