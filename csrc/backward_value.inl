// The gradient of the value: the scatter of weighted grad_output into the rows that were read.

// A point to add to a cell's four rows; all indices are counted within the chunk, slice and level.
struct ScatterPoint {
  int32_t cell, point, query;
};

// The points of one slice of a level of a chunk whose cells touch the band.
template <class T>
class ScatterOrder {
 public:
  // By cell if the level is sorted (queries of one cell in their order), else by query.
  void build(const Plan& plan, const PlannedLevel& level, const int32_t* rows, int64_t num_queries,
             const Band::Rows& owned) {
    entries_.reserve(num_queries * level.num_points);
    size_ = 0;
    // The row of cells above the band adds to the first row of pixels that the band owns.
    const int64_t first = std::max<int64_t>(owned.first - level.width, 0), end = owned.end;
    if (owned.first == owned.end) {
      return;
    }
    const int64_t total_points = plan.call.total_points;
    const auto for_each = [&](auto run) SACCADE_INLINE_LAMBDA {
      for (int64_t query = 0; query < num_queries; ++query) {
        for (int64_t k = 0; k < level.num_points; ++k) {
          const int64_t point = query * total_points + k;
          if (rows[point] >= first && rows[point] < end) {
            run(rows[point], point, query);
          }
        }
      }
    };
    const auto entry = [&](int32_t cell, int64_t point, int64_t query) {
      return ScatterPoint{cell, static_cast<int32_t>(point), static_cast<int32_t>(query)};
    };
    if (!level.sorted) {
      for_each([&](int32_t cell, int64_t point, int64_t query)
                   SACCADE_INLINE_LAMBDA { entries_[size_++] = entry(cell, point, query); });
      return;
    }
    // A counting sort: `offsets` first holds the number of points of each cell, then the index of
    // the cell's next entry.
    offsets_.reserve(end - first);
    int32_t* const offsets = &offsets_[0];
    std::fill_n(offsets, end - first, 0);
    for_each([&](int32_t cell, int64_t, int64_t)
                 SACCADE_INLINE_LAMBDA { ++offsets[cell - first]; });
    for (int64_t i = 0; i < end - first; ++i) {
      const int32_t count = offsets[i];
      offsets[i] = static_cast<int32_t>(size_);
      size_ += count;
    }
    for_each([&](int32_t cell, int64_t point, int64_t query) SACCADE_INLINE_LAMBDA {
      entries_[offsets[cell - first]++] = entry(cell, point, query);
    });
  }

  const ScatterPoint* begin() const { return size_ > 0 ? &entries_[0] : nullptr; }
  const ScatterPoint* end() const { return begin() + size_; }

 private:
  Buffer<ScatterPoint> entries_;
  Buffer<int32_t> offsets_;
  int64_t size_ = 0;
};

// Adds a column of a cell, the sums of its upper and its lower row, to the rows that the band owns.
template <class T, int NV, bool Partial>
SACCADE_INLINE void add_column(T* upper, int64_t down, bool owns_upper, bool owns_lower,
                               const Vector<T>* upper_sum, const Vector<T>* lower_sum,
                               int64_t channels) {
  const auto add = [&](T* row, const Vector<T>* sum) SACCADE_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      T* target = row + v * kWidth<T>;
      if (Partial) {
        store_partial<T, T>(target, load_partial<T, T>(target, channels) + sum[v], channels);
      } else {
        store(target, load(target) + sum[v]);
      }
    }
  };
  if (owns_upper) {
    add(upper, upper_sum);
  }
  if (owns_lower) {
    add(upper + down, lower_sum);
  }
}

// Adds weight * grad to the four rows of each point's cell. On a sorted level the points of a cell
// are summed up in registers, and the right column of a cell goes on as the left one of the next.
// On other levels this must not be done: which points follow each other there depends on the bands,
// and the sums must not.
template <class T, int NV, bool Partial>
SACCADE_INLINE void scatter(const LevelRows<T>& rows, const PlannedLevel& level,
                            const Band::Rows& owned, const ScatterPoint* point,
                            const ScatterPoint* end, const T* weights, const T* grads,
                            int64_t grads_stride, int64_t channels) {
  typedef Vector<T> V;
  V upper_left[NV], lower_left[NV], upper_right[NV], lower_right[NV];
  const auto clear = [](V* vectors) SACCADE_INLINE_LAMBDA {
#pragma GCC unroll 4
    for (int v = 0; v < NV; ++v) {
      vectors[v] = V{};
    }
  };
  clear(upper_left);
  clear(lower_left);
  while (point != end) {
    clear(upper_right);
    clear(lower_right);
    const int32_t cell = point->cell;
    do {
      const Quad<T> w(weights + 4 * int64_t(point->point));
      const T* grad = grads + point->query * grads_stride;
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        const V g = load(grad + v * kWidth<T>);
        upper_left[v] = (V)fma(w[0], g, upper_left[v]);
        upper_right[v] = (V)fma(w[1], g, upper_right[v]);
        lower_left[v] = (V)fma(w[2], g, lower_left[v]);
        lower_right[v] = (V)fma(w[3], g, lower_right[v]);
      }
      ++point;
    } while (level.sorted && point != end && point->cell == cell);
    // A cell at the band's edge has a row of pixels that another band owns; a cell of a map that is
    // one cell high has no lower row.
    const bool owns_upper = cell >= owned.first;
    const bool owns_lower = rows.down > 0 && cell + level.width < owned.end;
    T* upper = rows.first + cell * rows.stride;
    add_column<T, NV, Partial>(upper, rows.down, owns_upper, owns_lower, upper_left, lower_left,
                               channels);
    if (level.sorted && point != end && point->cell == cell + 1 && level.width > 1) {
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        upper_left[v] = upper_right[v];
        lower_left[v] = lower_right[v];
      }
    } else {
      add_column<T, NV, Partial>(upper + rows.right, rows.down, owns_upper, owns_lower, upper_right,
                                 lower_right, channels);
      clear(upper_left);
      clear(lower_left);
    }
  }
}

template <class S>
struct BackwardValueScratch {
  Corners<Compute<S>> corners;
  ScatterOrder<Compute<S>> order;
  Buffer<Compute<S>> grads, rows;
};

// Adds the points of a tile to the band's part of `rows`.
template <class S>
void scatter_tile(const Plan& plan, const S* grad_output, const PointReader<Compute<S>>& reader,
                  const Tile& tile, const Band& band, Compute<S>* rows, int64_t row_stride,
                  BackwardValueScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t head_dim = plan.call.head_dim;
  const int64_t grads_stride = round_up_to_vectors<T>(head_dim);
  Corners<T>& corners = scratch.corners;
  corners.template compute<true>(plan, reader, tile);
  load_grad<false>(plan, grad_output, tile, scratch.grads);
  if (!corners.weights_are_finite ||
      !all_finite(&scratch.grads[0], tile.num_queries * grads_stride)) {
    for (int64_t query = 0; query < tile.num_queries; ++query) {
      const int64_t row = tile.row(plan, query);
      exact_backward_value(plan, corners.get_pair(plan, reader, tile, row),
                           grad_output + row * head_dim, band, rows, row_stride);
    }
    return;
  }
  constexpr int kMaxVectors = kManyRegisters ? 4 : 2;
  for_each_slice(plan, [&](const PlannedLevel& level, int64_t slice) SACCADE_INLINE_LAMBDA {
    const Band::Rows owned = band.rows(level);
    scratch.order.build(plan, level, corners.rows(level, slice), tile.num_queries, owned);
    const auto run = [&](auto block, int64_t slot, int64_t channel) SACCADE_INLINE_LAMBDA {
      typedef decltype(block) B;
      const LevelRows<T> level_rows(level, rows + level.first_row * row_stride + channel,
                                    row_stride);
      scatter<T, B::NV, B::Partial>(level_rows, level, owned, scratch.order.begin(),
                                    scratch.order.end(), corners.weights(level, slice),
                                    &scratch.grads[0] + slot, grads_stride, head_dim);
    };
    for_blocks<T, kMaxVectors>(head_dim, run);
  });
}

template <class S>
void backward_value(const Plan& plan, const void* grad_output, const PointInputs& inputs,
                    void* grad_value, int64_t begin, int64_t end,
                    BackwardValueScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t head_dim = plan.call.head_dim;
  const int64_t full_stride = plan.call.value_heads * head_dim;
  const bool adds_in_place = plan.adds_in_place();
  const PointReader<T> reader(inputs);
  const bool stream = plan.streams_results && fills_lines(grad_value, head_dim * sizeof(S));
  for (int64_t index = begin; index < end; ++index) {
    const Band band(plan, index % plan.num_bands);
    const int64_t value_head = index / plan.num_bands % plan.call.value_heads;
    const int64_t batch_index = index / plan.num_bands / plan.call.value_heads;
    S* target = static_cast<S*>(grad_value) + batch_index * plan.call.num_positions * full_stride +
                value_head * head_dim;
    T* rows = reinterpret_cast<T*>(target);
    const int64_t row_stride = adds_in_place ? full_stride : head_dim;
    if (!adds_in_place) {
      scratch.rows.reserve(plan.call.num_positions * head_dim);
      rows = &scratch.rows[0];
      band.for_each_range([&](int64_t first, int64_t last) {
        std::fill_n(rows + first * head_dim, (last - first) * head_dim, T(0));
      });
    }
    const int64_t first_head = plan.call.value_heads > 1 ? value_head : 0;
    const int64_t end_head = plan.call.value_heads > 1 ? value_head + 1 : plan.call.num_heads;
    for (int64_t head = first_head; head < end_head; ++head) {
      const int64_t end_query = plan.call.first_queries[batch_index + 1];
      for (int64_t query = plan.call.first_queries[batch_index]; query < end_query;
           query += plan.queries_per_scatter) {
        const Tile tile = {batch_index, head, 1, query,
                           std::min(plan.queries_per_scatter, end_query - query)};
        scatter_tile(plan, static_cast<const S*>(grad_output), reader, tile, band, rows, row_stride,
                     scratch);
      }
    }
    if (!adds_in_place) {
      band.for_each_range([&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; ++row) {
          S* target_row = target + row * full_stride;
          const T* source_row = rows + row * head_dim;
          if (stream) {
            stream_elements(target_row, source_row, head_dim);
          } else {
            write_elements(target_row, source_row, head_dim);
          }
        }
      });
    }
  }
  if (stream) {
    end_streams();
  }
  scratch.rows.release_if_above(kMaxKeptBytes / int64_t(sizeof(T)));
}
