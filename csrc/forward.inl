// output[q] = sum over points of weight * row: the blend, and the loop over units around it.

// The points of one query on one level, added to the sums of a block of its channels.
template <class S, class T, class Block>
SACCADE_INLINE void blend(const LevelRows<const S>& level, const S* first, const int32_t* rows,
                          const T* weights, int64_t count, T* sums, int64_t channels) {
  constexpr int NV = Block::NV;
  const auto numbers = [&](const S* row, int v) SACCADE_INLINE_LAMBDA {
    return load_of_block<S, T, Block>(row, v, channels);
  };
  // Two sums, for the upper and the lower corners: one alone would be a chain of additions, each
  // waiting for the one before.
  Vector<T> upper_sum[NV], lower_sum[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    upper_sum[v] = load(sums + v * kWidth<T>);
    lower_sum[v] = Vector<T>{};
  }
  for (const int32_t* end = rows + count; rows != end; ++rows, weights += 4) {
    const S* upper = first + *rows * level.stride;
    const S* lower = upper + level.down;
    const Quad<T> w(weights);
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      upper_sum[v] = (Vector<T>)fma(w[0], numbers(upper, v), upper_sum[v]);
      lower_sum[v] = (Vector<T>)fma(w[2], numbers(lower, v), lower_sum[v]);
      upper_sum[v] = (Vector<T>)fma(w[1], numbers(upper + level.right, v), upper_sum[v]);
      lower_sum[v] = (Vector<T>)fma(w[3], numbers(lower + level.right, v), lower_sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(sums + v * kWidth<T>, upper_sum[v] + lower_sum[v]);
  }
}

// Rows that are read in place lie strewn over the value map: fetched this many queries ahead.
constexpr int64_t kRowQueriesAhead = 2;

// Fetches the rows that `count` points read.
template <class S>
SACCADE_INLINE void prefetch_rows(const LevelRows<const S>& level, const S* first,
                                  const int32_t* rows, int64_t count, int64_t head_dim) {
  for (const int32_t* end = rows + count; rows != end; ++rows) {
    const S* upper = first + *rows * level.stride;
    prefetch(upper, head_dim);
    prefetch(upper + level.right, head_dim);
    prefetch(upper + level.down, head_dim);
    prefetch(upper + level.down + level.right, head_dim);
  }
}

// Calls run(rows, first, point_rows) for the looks of a unit on one level: `first` is the level's
// first row for the look's head; `point_rows` goes on from look to look. With `fetch`, rows in
// place are fetched ahead.
template <class S, class Run>
SACCADE_INLINE void for_each_look_of_level(const Problem& problem, const Level& level,
                                           const HeadRows<S>& rows, const Unit& unit,
                                           const int32_t* point_rows, bool fetch, Run run) {
  const LevelRows<const S> level_rows = rows_to_read(problem, level, rows);
  const int64_t total_points = problem.total_points, head_dim = problem.head_dim;
  const int64_t num_points = level.num_points, num_queries = unit.num_queries;
  const int64_t fetched_ahead = fetch && level.fetched_ahead ? num_queries - kRowQueriesAhead : 0;
  const auto loop = [&](auto num_heads) SACCADE_INLINE_LAMBDA {
    const int64_t ahead = kRowQueriesAhead * num_heads * total_points;
    for (int64_t query = 0; query < num_queries; ++query) {
      const S* first = level_rows.first;
      for (int64_t head = 0; head < num_heads; ++head) {
        if (query < fetched_ahead) {
          prefetch_rows(level_rows, first, point_rows + ahead, num_points, head_dim);
        }
        run(level_rows, first, point_rows);
        first += rows.head_stride;
        point_rows += total_points;
      }
    }
  };
  // Known to be one, the loop over heads costs nothing.
  unit.num_heads == 1 ? loop(std::integral_constant<int64_t, 1>{}) : loop(unit.num_heads);
}

// Level after level over the whole chunk, so that the rows of one level stay in the caches.
template <class S, class T>
void blend_chunk(const Problem& problem, const Points<T>& points, const Unit& unit,
                 const HeadRows<S>& rows, T* all_sums, int64_t sums_stride) {
  const int64_t total_points = problem.total_points, head_dim = problem.head_dim;
  for_each_slice(problem, [&](const Level& level, int64_t slice) SACCADE_INLINE_LAMBDA {
    const int64_t num_points = level.num_points;
    const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
      const T* weights = points.weights(level, slice);
      T* sums = all_sums + slot;
      for_each_look_of_level(problem, level, rows, unit, points.rows(level, slice), slot == 0,
                             [&](const LevelRows<const S>& level_rows, const S* first,
                                 const int32_t* point_rows) SACCADE_INLINE_LAMBDA {
                               blend<S, T, decltype(block)>(level_rows, first + channel, point_rows,
                                                            weights, num_points, sums, head_dim);
                               weights += 4 * total_points;
                               sums += sums_stride;
                             });
    };
    for_blocks<T, 4>(head_dim, run);
  });
}

// From the slots of sums (see for_blocks) to a row of the output; `stream`: past the caches, for
// rows of whole cache lines.
template <class S, class T>
SACCADE_INLINE void write_sums(S* to, const T* sums, int64_t head_dim, bool stream) {
  const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
    typedef decltype(block) B;
    const Vector<T> first = load(sums + slot);
    if (B::Partial) {
      store_partial<S, T>(to, first, head_dim);
    } else if (B::NV == 2) {
      store_pair<S, T>(to + channel, first, load(sums + slot + kWidth<T>), stream);
    } else if (stream) {
      stream_from_compute(to + channel, first);
    } else {
      store_from_compute(to + channel, first);
    }
  };
  for_blocks<T, 2>(head_dim, run);
}

template <class S>
struct ForwardScratch {
  PackedRows<S> packed;
  Points<Compute<S>> points;
  Buffer<Compute<S>> sums;
};

template <class S>
void forward(const Problem& problem, const Value& value, const PointInputs& inputs, void* output,
             int64_t begin, int64_t end, ForwardScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t head_dim = problem.head_dim;
  const int64_t sums_stride = whole_vectors<T>(head_dim);
  const bool stream = problem.stream_results && fills_lines(output, head_dim * sizeof(S));
  const GivenPoints<T> given(inputs);
  scratch.packed.forget();
  scratch.sums.reserve(problem.chunk_queries * problem.heads_together * sums_stride);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit = unit_of(problem, index);
    const HeadRows<S> rows = scratch.packed.rows(problem, value, unit);
    scratch.points.template locate<true>(problem, given, unit);
    T* sums = &scratch.sums[0];
    std::fill_n(sums, unit.num_looks() * sums_stride, T(0));
    blend_chunk(problem, scratch.points, unit, rows, sums, sums_stride);
    const bool not_a_number = has_nan(sums, unit.num_looks() * sums_stride);
    const auto write = [&](int64_t look, int64_t row, int64_t head) SACCADE_INLINE_LAMBDA {
      const T* from = sums + look * sums_stride;
      S* to = static_cast<S*>(output) + row * head_dim;
      if (not_a_number && has_nan(from, sums_stride)) {
        exact_forward(problem, scratch.points.look(problem, given, unit, row),
                      rows.in_place + head * rows.head_stride, rows.stride, to);
      } else {
        write_sums(to, from, head_dim, stream);
      }
    };
    unit.for_each_look(problem, write);
  }
  if (stream) {
    end_streams();
  }
  scratch.packed.forget();
}
