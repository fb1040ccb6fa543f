// The caller's tensors of points, and how to walk through them.

// Points [T, M, P, N] are locations, or offsets from the reference points [T, R, N or 2 N]; weights
// [T, M, P] are attention weights, or logits.
template <class T>
struct PointReader {
  const T* references;
  const T* points;
  const T* weights;

  explicit PointReader(const PointInputs& inputs)
      : references(static_cast<const T*>(inputs.reference_points)),
        points(static_cast<const T*>(inputs.points)),
        weights(static_cast<const T*>(inputs.weights)) {}

  // Fetches what the tile will read some queries after the one whose first point is `point`.
  template <int N>
  SACCADE_INLINE void fetch_ahead(const Plan& plan, const Tile& tile, int64_t point) const {
    const int64_t points_per_query = tile.num_heads * plan.call.total_points;
    const int64_t step = plan.call.num_heads * plan.call.total_points;
    const int64_t queries_ahead = std::max<int64_t>(kPointsAhead / points_per_query, 1);
    const int64_t last = plan.call.total_queries() * step - points_per_query;
    const int64_t ahead = std::min(point + queries_ahead * step, last);
    prefetch(points + N * ahead, N * points_per_query);
    prefetch(weights + ahead, points_per_query);
  }
};

// Locations [pairs, P, N] and attention weights [pairs, P] of a tile, or their gradients.
template <class T>
struct PointBuffers {
  Buffer<T> locations, attention_weights;
};

// Calls run with the number of axes as a constant.
template <class Run>
SACCADE_INLINE void with_axes(const Plan& plan, Run run) {
  switch (plan.call.spatial_dims) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    default:
      return run(std::integral_constant<int, 3>{});
  }
}

// The offset of a vector within its (query, head) pair, which has `period` points (or coordinates),
// while vector after vector is visited.
template <class T>
struct PairOffset {
  int64_t period, step, value = 0;

  explicit PairOffset(int64_t elements_per_pair)
      : period(elements_per_pair), step(kWidth<T> % elements_per_pair) {}
  SACCADE_INLINE void next() {
    value += step;
    value -= value >= period ? period : 0;
  }
};
