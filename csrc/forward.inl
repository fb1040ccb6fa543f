// output[q] = sum over points of weight * row: the blend, and the loop over tiles around it.

// The points of one query on one level, added to the sums of a block of its channels.
template <class S, class T, class Block>
SACCADE_INLINE void blend(const LevelRows<const S>& level, const S* first, const int32_t* rows,
                          const T* weights, int64_t count, T* sums, int64_t channels) {
  constexpr int NV = Block::NV;
  const auto load_channels = [&](const S* row, int v) SACCADE_INLINE_LAMBDA {
    return load_block_vector<S, T, Block>(row, v, channels);
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
      upper_sum[v] = (Vector<T>)fma(w[0], load_channels(upper, v), upper_sum[v]);
      lower_sum[v] = (Vector<T>)fma(w[2], load_channels(lower, v), lower_sum[v]);
      upper_sum[v] = (Vector<T>)fma(w[1], load_channels(upper + level.right, v), upper_sum[v]);
      lower_sum[v] = (Vector<T>)fma(w[3], load_channels(lower + level.right, v), lower_sum[v]);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    store(sums + v * kWidth<T>, upper_sum[v] + lower_sum[v]);
  }
}

// Rows that are read from the value itself lie strewn over the map: they are fetched this many
// queries ahead.
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

// Calls run(rows, first, point_rows) for the pairs of a tile on one level: `first` is the level's
// first row for the pair's head; `point_rows` goes on from pair to pair. With `fetch`, rows of
// levels that are fetched_ahead are prefetched.
template <class S, class Run>
SACCADE_INLINE void for_each_level_pair(const Plan& plan, const PlannedLevel& level,
                                        const HeadRows<S>& rows, const Tile& tile,
                                        const int32_t* point_rows, bool fetch, Run run) {
  const LevelRows<const S> level_rows = rows_to_read(plan, level, rows);
  const int64_t total_points = plan.call.total_points, head_dim = plan.call.head_dim;
  const int64_t num_points = level.num_points, num_queries = tile.num_queries;
  const int64_t fetch_end = fetch && level.fetched_ahead ? num_queries - kRowQueriesAhead : 0;
  const auto loop = [&](auto num_heads) SACCADE_INLINE_LAMBDA {
    const int64_t ahead = kRowQueriesAhead * num_heads * total_points;
    for (int64_t query = 0; query < num_queries; ++query) {
      const S* first = level_rows.first;
      for (int64_t head = 0; head < num_heads; ++head) {
        if (query < fetch_end) {
          prefetch_rows(level_rows, first, point_rows + ahead, num_points, head_dim);
        }
        run(level_rows, first, point_rows);
        first += rows.head_stride;
        point_rows += total_points;
      }
    }
  };
  // With one head as a constant, the loop over heads costs nothing.
  tile.num_heads == 1 ? loop(std::integral_constant<int64_t, 1>{}) : loop(tile.num_heads);
}

// Level after level over the whole chunk, so that the rows of one level stay in the caches.
template <class S, class T>
void blend_chunk(const Plan& plan, const Corners<T>& corners, const Tile& tile,
                 const HeadRows<S>& rows, T* first_sums, int64_t sums_stride) {
  const int64_t total_points = plan.call.total_points, head_dim = plan.call.head_dim;
  for_each_slice(plan, [&](const PlannedLevel& level, int64_t slice) SACCADE_INLINE_LAMBDA {
    const int64_t num_points = level.num_points;
    const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
      const T* weights = corners.weights(level, slice);
      T* sums = first_sums + slot;
      for_each_level_pair(plan, level, rows, tile, corners.rows(level, slice), slot == 0,
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

// From the slots of sums (see for_blocks) to a row of the output; with `stream` past the caches,
// which rows of whole cache lines allow.
template <class S, class T>
SACCADE_INLINE void write_sums(S* target, const T* sums, int64_t head_dim, bool stream) {
  const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
    typedef decltype(block) B;
    const Vector<T> first = load(sums + slot);
    if (B::Partial) {
      store_partial<S, T>(target, first, head_dim);
    } else if (B::NV == 2) {
      store_interleaved<S, T>(target + channel, first, load(sums + slot + kWidth<T>), stream);
    } else if (stream) {
      stream_from_compute(target + channel, first);
    } else {
      store_from_compute(target + channel, first);
    }
  };
  for_blocks<T, 2>(head_dim, run);
}

template <class S>
struct ForwardScratch {
  PackedRows<S> packed;
  Corners<Compute<S>> corners;
  Buffer<Compute<S>> sums;
};

template <class S>
void forward(const Plan& plan, const Value& value, const PointInputs& inputs, void* output,
             int64_t begin, int64_t end, ForwardScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t head_dim = plan.call.head_dim;
  const int64_t sums_stride = round_up_to_vectors<T>(head_dim);
  const bool stream = plan.streams_results && fills_lines(output, head_dim * sizeof(S));
  const PointReader<T> reader(inputs);
  scratch.packed.invalidate();
  scratch.sums.reserve(plan.queries_per_chunk * plan.heads_per_tile * sums_stride);
  for (int64_t index = begin; index < end; ++index) {
    const Tile tile = get_tile(plan, index);
    const HeadRows<S> rows = scratch.packed.rows(plan, value, tile);
    scratch.corners.template compute<true>(plan, reader, tile);
    T* sums = &scratch.sums[0];
    std::fill_n(sums, tile.num_pairs() * sums_stride, T(0));
    blend_chunk(plan, scratch.corners, tile, rows, sums, sums_stride);
    const bool any_nan = has_nan(sums, tile.num_pairs() * sums_stride);
    const auto write = [&](int64_t pair, int64_t row, int64_t head) SACCADE_INLINE_LAMBDA {
      const T* pair_sums = sums + pair * sums_stride;
      S* target = static_cast<S*>(output) + row * head_dim;
      if (any_nan && has_nan(pair_sums, sums_stride)) {
        exact_forward(plan, scratch.corners.get_pair(plan, reader, tile, row),
                      rows.value + head * rows.head_stride, rows.stride, target);
      } else {
        write_sums(target, pair_sums, head_dim, stream);
      }
    };
    tile.for_each_pair(plan, write);
  }
  if (stream) {
    end_streams();
  }
  scratch.packed.invalidate();
}
