// The points of a call as they are given, and how to walk them.

// Locations [T, M, P, N] and attention weights [T, M, P]; of a fused call sampling offsets and
// attention logits, and the reference points [T, R, N or 2 N] that make points of them.
template <class T>
struct GivenPoints {
  const T* references;
  const T* locations;
  const T* attention_weights;

  explicit GivenPoints(const PointInputs& inputs)
      : references(static_cast<const T*>(inputs.reference_points)),
        locations(static_cast<const T*>(inputs.locations)),
        attention_weights(static_cast<const T*>(inputs.weights)) {}

  // What a unit will read some queries after that one.
  template <int N>
  SACCADE_INLINE void fetch_ahead(const Problem& problem, const Unit& unit, int64_t point) const {
    const int64_t of_query = unit.num_heads * problem.total_points;
    const int64_t step = problem.num_heads * problem.total_points;
    const int64_t queries_ahead = std::max<int64_t>(kPointsAhead / of_query, 1);
    const int64_t last = problem.total_queries() * step - of_query;
    const int64_t ahead = std::min(point + queries_ahead * step, last);
    prefetch(locations + N * ahead, N * of_query);
    prefetch(attention_weights + ahead, of_query);
  }
};

template <class T>
struct PointCopies {
  Buffer<T> locations, attention_weights;
};

// Calls run with the number of axes as a constant.
template <class Run>
SACCADE_INLINE void with_axes(const Problem& problem, Run run) {
  switch (problem.spatial_dims) {
    case 1:
      return run(std::integral_constant<int, 1>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    default:
      return run(std::integral_constant<int, 3>{});
  }
}

// Where in its look (of so many points, or numbers) a vector begins, vector after vector.
template <class T>
struct InPeriod {
  int64_t length, step, at = 0;

  explicit InPeriod(int64_t of_look) : length(of_look), step(kWidth<T> % of_look) {}
  SACCADE_INLINE void next() {
    at += step;
    at -= at >= length ? length : 0;
  }
};
