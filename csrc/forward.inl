// output[q] = sum over points of weight * row: the blend, and the loop over units around it.

// `count` points of one query on one level, added to NV vectors of sums. With Partial, NV is 1 and
// only `channels` numbers of the rows exist.
template <class S, class T, int NV, bool Partial>
SACCADE_INLINE void blend(const LevelRows<const S>& level, int64_t channel, const Points<T>& points,
                          int64_t at, int64_t count, T* sums, int64_t channels) {
  Vector<T> sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    sum[v] = load(sums + v * kWidth<T>);
  }
  for (int64_t point = at; point < at + count; ++point) {
    const S* corner = level.row(points.row(point)) + channel;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Vector<T> weight = splat<T>(points.weight(point, c));
      const S* row = corner + level.steps[c];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const Vector<T> numbers =
            Partial ? load_partial<S, T>(row, channels) : load_as_compute(row + v * kWidth<T>);
        sum[v] = (Vector<T>)fma(weight, numbers, sum[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(sums + v * kWidth<T>, sum[v]);
  }
}

// Rows that are read in place lie strewn over the value map: fetched this many queries ahead.
constexpr int64_t kRowQueriesAhead = 2;

// Fetches the rows that `count` points read.
template <class S, class T>
SACCADE_INLINE void prefetch_rows(const LevelRows<const S>& level, const Points<T>& points,
                                  int64_t at, int64_t count, int64_t head_dim) {
  for (int64_t point = at; point < at + count; ++point) {
    const S* corner = level.row(points.row(point));
    for (int c = 0; c < 4; ++c) {
      prefetch(corner + level.steps[c], head_dim);
    }
  }
}

// Level after level over the whole chunk, so that the rows of one level stay in the caches.
template <class S, class T>
void blend_chunk(const Problem& problem, const Points<T>& points, int64_t num_queries,
                 const HeadRows<S>& rows, T* sums, int64_t sums_stride) {
  constexpr int W = kWidth<T>;
  const int64_t head_dim = problem.head_dim;
  for (const Level& level : problem.levels) {
    const LevelRows<const S> level_rows = rows_to_read(problem, level, rows);
    for (int64_t query = 0; query < num_queries; ++query) {
      const int64_t at = query * problem.total_points + level.first_point;
      if (!level.packed && query + kRowQueriesAhead < num_queries) {
        prefetch_rows(level_rows, points, at + kRowQueriesAhead * problem.total_points,
                      level.num_points, head_dim);
      }
      T* to = sums + query * sums_stride;
      int64_t c = 0;
      for (; c + 4 * W <= head_dim; c += 4 * W) {
        blend<S, T, 4, false>(level_rows, c, points, at, level.num_points, to + c, 0);
      }
      if (c + 2 * W <= head_dim) {
        blend<S, T, 2, false>(level_rows, c, points, at, level.num_points, to + c, 0);
        c += 2 * W;
      }
      if (c + W <= head_dim) {
        blend<S, T, 1, false>(level_rows, c, points, at, level.num_points, to + c, 0);
        c += W;
      }
      if (c < head_dim) {
        blend<S, T, 1, true>(level_rows, c, points, at, level.num_points, to + c, head_dim - c);
      }
    }
  }
}

template <class S, class T>
SACCADE_INLINE void write_numbers(S* to, const T* from, int64_t count) {
  int64_t at = 0;
  for (; at + kWidth<T> <= count; at += kWidth<T>) {
    store_from_compute(to + at, load(from + at));
  }
  if (at < count) {
    store_partial<S, T>(to + at, load_partial<T, T>(from + at, count - at), count - at);
  }
}

template <class S>
struct ForwardScratch {
  PackedRows<S> packed;
  Points<Compute<S>> points;
  Buffer<Compute<S>> sums;
};

template <class S>
void forward(const Problem& problem, const Value& value, const void* locations, const void* weights,
             void* output, int64_t begin, int64_t end, ForwardScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t head_dim = problem.head_dim;
  const int64_t sums_stride = whole_vectors<T>(head_dim);
  scratch.packed.forget();
  scratch.sums.reserve(problem.chunk_queries * sums_stride);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit(problem, index);
    const HeadRows<S> rows = scratch.packed.rows(problem, value, unit);
    scratch.points.gather(problem, static_cast<const T*>(locations), static_cast<const T*>(weights),
                          unit);
    scratch.points.compute(problem, unit.num_queries);
    T* sums = &scratch.sums[0];
    std::fill_n(sums, unit.num_queries * sums_stride, T(0));
    blend_chunk(problem, scratch.points, unit.num_queries, rows, sums, sums_stride);
    const bool not_a_number = has_nan(sums, unit.num_queries * sums_stride);
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      T* row = sums + query * sums_stride;
      if (not_a_number && has_nan(row, sums_stride)) {
        exact_forward(problem, scratch.points, query, rows.in_place, rows.stride, row);
      }
      write_numbers(static_cast<S*>(output) + unit.row(problem, query) * head_dim, row, head_dim);
    }
  }
  scratch.packed.forget();
}
