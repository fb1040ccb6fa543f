// The gradients of points and weights: dot products of grad_output with the rows of the value, then
// *points* in reverse.

// Loads the grad_output [T, M * D] of a tile in the compute type, in slots (see for_blocks);
// channels that the last slot visits a second time are zero there. With kInterleaved two vectors of
// a block are interleaved, as rows of the value are loaded.
template <bool kInterleaved, class S, class T>
void load_grad(const Plan& plan, const S* grad_output, const Tile& tile, Buffer<T>& grads) {
  const int64_t head_dim = plan.call.head_dim;
  const int64_t stride = round_up_to_vectors<T>(head_dim);
  grads.reserve(tile.num_pairs() * stride);
  const int64_t last = plan.call.total_queries() * plan.call.num_heads - 1;
  const auto load_pair = [&](int64_t pair, int64_t row, int64_t) SACCADE_INLINE_LAMBDA {
    const S* source = grad_output + row * head_dim;
    const int64_t ahead = std::min(row + kQueriesAhead * plan.call.num_heads, last);
    prefetch(grad_output + ahead * head_dim, head_dim);
    T* target = &grads[pair * stride];
    const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
      typedef decltype(block) B;
#pragma GCC unroll 2
      for (int v = 0; v < B::NV; ++v) {
        store(target + slot + v * kWidth<T>,
              load_block_vector<S, T, B>(source + channel, v, head_dim));
      }
      if (!B::Partial) {
        std::fill_n(target + slot, slot - channel, T(0));
      }
    };
    for_blocks<T, kInterleaved ? 2 : 1>(head_dim, run);
  };
  tile.for_each_pair(plan, load_pair);
}

// The dot products of grad with the four corners of a point.
template <class S, class T>
SACCADE_INLINE void compute_point_dots(const LevelRows<const S>& level, const S* upper,
                                       const T* grad, int64_t head_dim, T* dots) {
  Vector<T> dot[4] = {Vector<T>{}, Vector<T>{}, Vector<T>{}, Vector<T>{}};
  const S* lower = upper + level.down;
  const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < decltype(block)::NV; ++v) {
      const Vector<T> g = load(grad + slot + v * kWidth<T>);
      const auto add = [&](Vector<T>& sum, const S* row) SACCADE_INLINE_LAMBDA {
        const auto values = load_block_vector<S, T, decltype(block)>(row + channel, v, head_dim);
        sum = (Vector<T>)fma(g, values, sum);
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

// The dot products of all points of a tile, written in place of their weights.
template <class S, class T>
void compute_dots(const Plan& plan, Corners<T>& corners, const Tile& tile, const HeadRows<S>& rows,
                  const T* grads, int64_t grads_stride) {
  const int64_t total_points = plan.call.total_points, head_dim = plan.call.head_dim;
  for_each_slice(plan, [&](const PlannedLevel& level, int64_t slice) SACCADE_INLINE_LAMBDA {
    const int64_t num_points = level.num_points;
    T* dots = corners.weights(level, slice);
    const T* grad = grads;
    for_each_level_pair(
        plan, level, rows, tile, corners.rows(level, slice), true,
        [&](const LevelRows<const S>& level_rows, const S* first, const int32_t* point_rows)
            SACCADE_INLINE_LAMBDA {
              for (int64_t k = 0; k < num_points; ++k) {
                compute_point_dots(level_rows, first + point_rows[k] * level_rows.stride, grad,
                                   head_dim, dots + 4 * k);
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

  SACCADE_INLINE explicit Dots(const T* source) {
    typedef Vector<T> V;
    constexpr int W = kWidth<T>;
    const V first = load(source), second = load(source + W);
    const V third = load(source + 2 * W), fourth = load(source + 3 * W);
    const V even_low = evens<T>(first, second), even_high = evens<T>(third, fourth);
    const V odd_low = odds<T>(first, second), odd_high = odds<T>(third, fourth);
    corners[0] = evens<T>(even_low, even_high);
    corners[1] = evens<T>(odd_low, odd_high);
    corners[2] = odds<T>(even_low, even_high);
    corners[3] = odds<T>(odd_low, odd_high);
  }

  // Sums over the corners, weighted by the weights (or slopes) that each axis gives its two cells.
  SACCADE_INLINE Vector<T> sum(const Vector<T>* x) const {
    return x[0] * corners[0] + x[1] * corners[1];
  }
  SACCADE_INLINE Vector<T> sum(const Vector<T>* x, const Vector<T>* y) const {
    return y[0] * sum(x) + y[1] * (x[0] * corners[2] + x[1] * corners[3]);
  }
};

// From dot products to the gradients of locations and attention weights; returns false if any of
// them is NaN.
template <int N, class T>
bool apply_chain_rule(const Plan& plan, const Corners<T>& corners, int64_t num_pairs,
                      T* grad_locations, T* grad_weights) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const PointTable<T>& table = point_table<T>(plan);
  const PointBuffers<T>& kept = corners.kept;
  const T* const dots = corners.weights(0);
  V zero_or_nan = {};
  PairOffset<T> pair_offset(plan.call.total_points);
  for (int64_t i = 0; i < num_pairs * plan.call.total_points; i += W) {
    const PointCells<T, N> cells(plan, table, &kept.locations[N * i], pair_offset.value);
    pair_offset.next();
    const V attention = load(&kept.attention_weights[i]);
    const Dots<T> first(dots + 4 * i);
    // With the weights of all axes, except for axis `by`, whose slopes are taken.
    const auto sum_by = [&](int by) SACCADE_INLINE_LAMBDA {
      const auto get = [&](int n) {
        return by == n ? cells.axes[n].slopes : cells.axes[n].weights;
      };
      if constexpr (N == 1) {
        return first.sum(get(0));
      } else if constexpr (N == 2) {
        return first.sum(get(0), get(1));
      } else {
        const Dots<T> second(corners.weights(1) + 4 * i);
        return get(2)[0] * first.sum(get(0), get(1)) + get(2)[1] * second.sum(get(0), get(1));
      }
    };
    const V grad_weight = sum_by(-1);
    V sum = grad_weight, grad_location[N];
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      grad_location[n] = attention * sum_by(n);
      sum += grad_location[n];
    }
    store(grad_weights + i, grad_weight);
    store_by_axis<T, N>(grad_locations + N * i, grad_location);
    zero_or_nan += sum == sum ? V{} : sum;
  }
  return !any(zero_or_nan != zero_or_nan);
}

// The tensors that receive the gradients of the points (see PointGradients).
template <class T>
struct GradPoints {
  T* references;
  T* points;
  T* weights;
  bool stream;

  GradPoints(const Plan& plan, const PointGradients& gradients)
      : references(static_cast<T*>(gradients.reference_points)),
        points(static_cast<T*>(gradients.points)),
        weights(static_cast<T*>(gradients.weights)),
        stream(plan.streams_results &&
               fills_lines(points, plan.call.spatial_dims * plan.call.total_points * sizeof(T)) &&
               fills_lines(weights, plan.call.total_points * sizeof(T))) {}
};

// Writes the gradients of a tile's points, whose dot products are in place of their weights.
template <class S, class T>
void write_grad_points(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
                       Corners<T>& corners, const HeadRows<S>& rows, const S* grad_output,
                       const GradPoints<T>& target, PointBuffers<T>& grads) {
  const int64_t total_points = plan.call.total_points, spatial_dims = plan.call.spatial_dims;
  const int64_t capacity = tile.num_pairs() * total_points + kWidth<T>;
  grads.locations.reserve(spatial_dims * capacity);
  grads.attention_weights.reserve(capacity);
  bool finite = false;
  with_axes(plan, [&](auto axes) {
    finite = apply_chain_rule<decltype(axes)::value>(
        plan, corners, tile.num_pairs(), &grads.locations[0], &grads.attention_weights[0]);
  });
  // An infinite weight times a sum of products may be infinite where the sum of its products with
  // each of them, which is the definition, is NaN.
  if (!finite || !corners.weights_are_finite) {
    tile.for_each_pair(plan, [&](int64_t pair, int64_t row, int64_t head) {
      T* const grad_locations = &grads.locations[spatial_dims * pair * total_points];
      T* const grad_weights = &grads.attention_weights[pair * total_points];
      const T* const weights = &corners.kept.attention_weights[pair * total_points];
      const auto is_nan = [](T element) { return element != element; };
      const auto is_odd = [](T element) { return element - element != T(0); };
      // A pair without such elements keeps its results, whatever its neighbours hold.
      if (std::any_of(grad_locations, grad_locations + spatial_dims * total_points, is_nan) ||
          std::any_of(grad_weights, grad_weights + total_points, is_nan) ||
          std::any_of(weights, weights + total_points, is_odd)) {
        exact_backward_points(plan, corners.get_pair(plan, reader, tile, row),
                              rows.value + head * rows.head_stride, rows.stride,
                              grad_output + row * plan.call.head_dim, grad_locations, grad_weights);
      }
    });
  }
  if (plan.call.prepares_points()) {
    with_axes(plan, [&](auto axes) {
      corners.prepared.template reverse<decltype(axes)::value>(plan, reader, tile, corners.kept,
                                                               grads, target.references);
    });
  }
  const int64_t points_per_query = tile.num_heads * total_points;
  for (int64_t query = 0; query < tile.num_queries; ++query) {
    const int64_t first = tile.row(plan, query) * total_points;
    const T* location = &grads.locations[spatial_dims * query * points_per_query];
    const T* weight = &grads.attention_weights[query * points_per_query];
    if (target.stream) {
      stream_elements(target.points + spatial_dims * first, location,
                      spatial_dims * points_per_query);
      stream_elements(target.weights + first, weight, points_per_query);
    } else {
      copy_elements(target.points + spatial_dims * first, location,
                    spatial_dims * points_per_query);
      copy_elements(target.weights + first, weight, points_per_query);
    }
  }
}

template <class S>
struct BackwardPointsScratch {
  PackedRows<S> packed;
  Corners<Compute<S>> corners;
  Buffer<Compute<S>> grads;
  PointBuffers<Compute<S>> grad_points;
};

template <class S>
void backward_points(const Plan& plan, const Value& value, const void* grad_output,
                     const PointInputs& inputs, const PointGradients& gradients, int64_t begin,
                     int64_t end, BackwardPointsScratch<S>& scratch) {
  typedef Compute<S> T;
  const S* grad = static_cast<const S*>(grad_output);
  const PointReader<T> reader(inputs);
  const GradPoints<T> target(plan, gradients);
  scratch.packed.invalidate();
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = get_tile(plan, index);
    const HeadRows<S> rows = scratch.packed.rows(plan, value, tile);
    Corners<T>& corners = scratch.corners;
    corners.template compute<false>(plan, reader, tile);
    load_grad<true>(plan, grad, tile, scratch.grads);
    compute_dots(plan, corners, tile, rows, &scratch.grads[0],
                 round_up_to_vectors<T>(plan.call.head_dim));
    write_grad_points(plan, reader, tile, corners, rows, grad, target, scratch.grad_points);
  }
  if (target.stream) {
    end_streams();
  }
  scratch.packed.invalidate();
}
