// Stage one: from the locations of a chunk of queries to *corners*, rows of the value and their
// weights, a vector of points at a time. All variety (coordinates, padding, interpolation) ends
// here.
//
// A point reads two cells along each axis, base and base + 1. The base is clamped into the map and
// the weights are a hat around the position, 1 - |position - cell|: where one of the two cells does
// not lie beside the position, its weight is exactly 0. There is nothing to branch on and no read
// outside the map. The one difference to the definition is 0 * infinity, which exact.inl corrects.

template <class T>
struct AxisCells {
  Vector<T> base;          // index of the lower cell, a whole number
  Vector<T> weights[2];    // of the two cells
  Vector<T> slopes[2];     // derivatives of the weights by the location
  Vector<T> is_corner[2];  // 1 where the definition reads the cell, even if its weight is 0
};

template <class T>
SACCADE_INLINE AxisCells<T> find_axis_cells(Vector<T> location, const AxisTable<T>& table,
                                            int64_t pair_offset, Interpolation interpolation,
                                            Padding padding) {
  typedef Vector<T> V;
  const V zero = {}, one = splat<T>(1), two = splat<T>(2);
  V slope = load(&table.scale[pair_offset]);
  // Rounded twice, never fused: every backend agrees on the position to the last bit.
  V position = location * slope + load(&table.shift[pair_offset]);
  if (padding != Padding::zeros) {
    const V last = load(&table.last_pixel[pair_offset]);
    slope = position > zero && position < last ? slope : zero;
    position = minimum<T>(maximum<T>(position, zero), last);
  }
  const bool one_cell = interpolation != Interpolation::linear;
  if (one_cell) {
    const bool nearest = interpolation == Interpolation::nearest;
    position = nearest ? (V)round_even(position) : (V)floor(position);
    slope = zero;
  }
  AxisCells<T> axis;
  axis.base = minimum<T>(maximum<T>((V)floor(position), zero), load(&table.max_base[pair_offset]));
  const V distance = position - axis.base;
  const V has_neighbour = load(&table.has_neighbour[pair_offset]);
  // Zero where the argument is negative or NaN.
  axis.weights[0] = maximum<T>(distance < zero ? one + distance : one - distance, zero);
  axis.weights[1] = maximum<T>(minimum<T>(distance, two - distance), zero) * has_neighbour;
  const V below = distance >= -one && distance < zero ? one : zero;  // base is the upper cell
  const V inside = distance >= zero && distance < one ? one : zero;  // both cells
  const V above = distance >= one && distance < two ? one : zero;    // base + 1 is the lower cell
  axis.slopes[0] = slope * (below - inside);
  axis.slopes[1] = slope * (inside - above) * has_neighbour;
  axis.is_corner[0] = one_cell ? axis.weights[0] : below + inside;
  axis.is_corner[1] = one_cell ? axis.weights[1] : (inside + above) * has_neighbour;
  return axis;
}

// The cells of a vector of points, the first of which is point `pair_offset` of its (query, head)
// pair. A point whose location is not finite has weights, slopes and corners 0.
template <class T, int N>
struct PointCells {
  AxisCells<T> axes[N];  // x, y, z

  SACCADE_INLINE PointCells(const Plan& plan, const PointTable<T>& table, const T* locations,
                            int64_t pair_offset) {
    typedef Vector<T> V;
    const V zero = {}, one = splat<T>(1);
    V location[N];
    load_by_axis<T, N>(locations, location);
    V finite = one;
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      axes[n] = find_axis_cells<T>(location[n], table.axes[n], pair_offset, plan.call.interpolation,
                                   plan.call.padding);
      finite = location[n] - location[n] == zero ? finite : zero;
    }
    const auto drop = [&](V& vector) { vector = finite != zero ? vector : zero; };
#pragma GCC unroll 3
    for (int i = 0; i < 2; ++i) {
      drop(axes[0].weights[i]);
      drop(axes[0].is_corner[i]);
      for (int n = 0; n < N; ++n) {
        drop(axes[n].slopes[i]);
      }
    }
  }
};

// Calls run(locations, attention weights, pair offset, index) for each vector of a tile's points,
// where the caller's tensors hold locations and attention weights; `index` counts the points. The
// tensors are read in place if the points of a query fill whole vectors, else copied to lie side by
// side. The last vector may reach past the last point and then reads zeros there.
template <class T, int N, class Run>
SACCADE_INLINE void for_each_vector(const Plan& plan, const PointReader<T>& reader,
                                    const Tile& tile, PointBuffers<T>& copies, Run run) {
  constexpr int64_t W = kWidth<T>;
  const int64_t points_per_query = tile.num_heads * plan.call.total_points;
  const int64_t query_stride = plan.call.num_heads * plan.call.total_points;
  const int64_t end = plan.call.total_queries() * query_stride;
  int64_t source = tile.row(plan, 0) * plan.call.total_points;
  PairOffset<T> pair_offset(plan.call.total_points);
  int64_t index = 0;
  const bool reads_in_place = points_per_query % W == 0;
  if (reads_in_place) {
    for (int64_t query = 0; query < tile.num_queries; ++query, source += query_stride) {
      reader.template fetch_ahead<N>(plan, tile, source);
      for (int64_t point = 0; point < points_per_query; point += W, index += W) {
        run(reader.points + N * (source + point), reader.weights + source + point,
            pair_offset.value, index);
        pair_offset.next();
      }
    }
    return;
  }
  constexpr int64_t kMinPoints = 8 * W;  // copied before they are used
  constexpr int64_t kMargin = std::max<int64_t>(N * W, 64 / sizeof(T));
  copies.locations.reserve(N * (kMinPoints + points_per_query) + kMargin);
  copies.attention_weights.reserve(kMinPoints + points_per_query + kMargin);
  T* const locations = copies.locations.data();
  T* const weights = copies.attention_weights.data();
  int64_t filled = 0;
  for (int64_t query = 0; query < tile.num_queries; ++query, source += query_stride) {
    reader.template fetch_ahead<N>(plan, tile, source);
    copy_whole_pieces(locations + N * filled, reader.points + N * source, N * points_per_query,
                      reader.points + N * end);
    copy_whole_pieces(weights + filled, reader.weights + source, points_per_query,
                      reader.weights + end);
    filled += points_per_query;
    const bool is_last = query + 1 == tile.num_queries;
    if (filled < kMinPoints && !is_last) {
      continue;
    }
    if (is_last) {
      std::fill_n(locations + N * filled, N * W, T(0));
      std::fill_n(weights + filled, W, T(0));
    }
    int64_t done = 0;
    for (; done + (is_last ? 1 : W) <= filled; done += W, index += W) {
      run(locations + N * done, weights + done, pair_offset.value, index);
      pair_offset.next();
    }
    if (!is_last) {
      filled -= done;
      std::memcpy(locations, locations + N * done, N * W * sizeof(T));
      std::memcpy(weights, weights + done, W * sizeof(T));
    }
  }
}

// The points of one (query, head) pair, [P, N] and [P].
template <class T>
struct PairPoints {
  const T* locations;
  const T* attention_weights;
};

// What stage two reads of a tile: rows and weights of its points.
template <class T>
struct Corners {
  bool weights_are_finite;
  // [pairs, P, N] and [pairs, P]: locations and attention weights, for the chain rule.
  PointBuffers<T> kept;
  PreparedPoints<T> prepared;

  // [pairs, P] of a slice, from a level's first point on: the rows of the first corners, counted
  // within the level.
  const int32_t* rows(const Level& level, int64_t slice) const {
    return &rows_[slice * slice_stride_ + level.first_point];
  }
  // [pairs, P, 4], likewise: the weights of the corners (y, x), (y, x + 1), (y + 1, x), (y + 1,
  // x + 1), attention weight included. On a line the last two are 0.
  T* weights(const Level& level, int64_t slice) { return weights(slice) + 4 * level.first_point; }
  const T* weights(const Level& level, int64_t slice) const {
    return weights(slice) + 4 * level.first_point;
  }
  T* weights(int64_t slice) { return &weights_[4 * slice * slice_stride_]; }
  const T* weights(int64_t slice) const { return &weights_[4 * slice * slice_stride_]; }

  // The points of the pair at `row` of the tensors [T, M, ...], prepared once more if need be.
  PairPoints<T> get_pair(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
                         int64_t row) {
    const int64_t dims = plan.call.spatial_dims, points = plan.call.total_points;
    if (!plan.call.prepares_points()) {
      return {reader.points + dims * row * points, reader.weights + row * points};
    }
    reserve_copies(dims, points);
    const Tile single = {tile.batch_index, row % plan.call.num_heads, 1, row / plan.call.num_heads,
                         1};
    with_axes(plan, [&](auto axes) {
      prepared.template prepare<decltype(axes)::value>(plan, reader, single, copies_);
    });
    return {&copies_.locations[0], &copies_.attention_weights[0]};
  }

  // Computes the rows, and either the weights or `kept`. There is capacity for the weights either
  // way: the backward writes dot products in their place.
  template <bool kWeights>
  void compute(const Plan& plan, const PointReader<T>& reader, const Tile& tile) {
    with_axes(plan,
              [&](auto axes) { compute_in<decltype(axes)::value, kWeights>(plan, reader, tile); });
  }

 private:
  template <int N, bool kWeights>
  void compute_in(const Plan& plan, const PointReader<T>& reader, const Tile& tile) {
    typedef Vector<T> V;
    const PointTable<T>& table = point_table<T>(plan);
    const int64_t count = tile.num_pairs() * plan.call.total_points;
    const int64_t stride = count + kWidth<T>;
    slice_stride_ = stride;
    rows_.reserve(plan.call.num_slices() * stride);
    weights_.reserve(4 * plan.call.num_slices() * stride);
    if (!kWeights) {
      kept.locations.reserve(N * stride);
      kept.attention_weights.reserve(stride);
    }
    V zero_or_nan = {};
    const auto run = [&](const T* locations, const T* attention_weights, int64_t pair_offset,
                         int64_t index) SACCADE_INLINE_LAMBDA {
      const PointCells<T, N> cells(plan, table, locations, pair_offset);
      RowIndices<T> rows = to_rows<T>(cells.axes[N - 1].base);
      if constexpr (N == 3) {
        rows = rows * load_rows<T>(&table.height[pair_offset]) + to_rows<T>(cells.axes[1].base);
      }
      if constexpr (N >= 2) {
        rows = rows * load_rows<T>(&table.width[pair_offset]) + to_rows<T>(cells.axes[0].base);
      }
      store_rows<T>(&rows_[index], rows);
      if constexpr (N == 3) {
        store_rows<T>(&rows_[stride + index], rows + load_rows<T>(&table.slice_step[pair_offset]));
      }
      const V attention = load(attention_weights);
      zero_or_nan += attention - attention;
      if (!kWeights) {
        for (int n = 0; n < N; ++n) {
          store(&kept.locations[N * index + n * kWidth<T>], load(locations + n * kWidth<T>));
        }
        store(&kept.attention_weights[index], attention);
        return;
      }
      const V* wx = cells.axes[0].weights;
      if constexpr (N == 1) {
        store_quads<T>(&weights_[4 * index], wx[0] * attention, wx[1] * attention, V{}, V{});
      } else {
        const V* wy = cells.axes[1].weights;
        for (int slice = 0; slice < (N == 3 ? 2 : 1); ++slice) {
          const V share = N == 3 ? attention * cells.axes[N - 1].weights[slice] : attention;
          const V upper = wy[0] * share, lower = wy[1] * share;
          store_quads<T>(&weights_[4 * (slice * stride + index)], wx[0] * upper, wx[1] * upper,
                         wx[0] * lower, wx[1] * lower);
        }
      }
    };
    if (!plan.call.prepares_points()) {
      for_each_vector<T, N>(plan, reader, tile, copies_, run);
    } else if (PreparedPoints<T>::fills_vectors(plan, tile)) {
      prepared.template for_each_vector<N>(plan, reader, tile, run);
    } else {
      for_each_prepared_vector<N>(plan, reader, tile, run);
    }
    if (!kWeights) {
      // Later stages read whole vectors, the last of which reaches past the last point.
      std::fill_n(&kept.locations[N * count], N * kWidth<T>, T(0));
      std::fill_n(&kept.attention_weights[count], kWidth<T>, T(0));
      for (int64_t slice = 0; slice < plan.call.num_slices(); ++slice) {
        std::fill_n(weights(slice) + 4 * count, 4 * kWidth<T>, T(0));
      }
    }
    weights_are_finite = !any(zero_or_nan != zero_or_nan);
  }

  // Gives copies_ the capacity for `count` points.
  void reserve_copies(int64_t spatial_dims, int64_t count) {
    copies_.locations.reserve(spatial_dims * (count + PreparedPoints<T>::kCapacityMargin));
    copies_.attention_weights.reserve(count + PreparedPoints<T>::kCapacityMargin);
  }

  // The same as PreparedPoints::for_each_vector where the points do not fill vectors: they are
  // prepared some queries at a time, which the first-level cache holds until they are used.
  template <int N, class Run>
  SACCADE_INLINE void for_each_prepared_vector(const Plan& plan, const PointReader<T>& reader,
                                               const Tile& tile, Run run) {
    const int64_t points_per_query = tile.num_heads * plan.call.total_points;
    const int64_t queries_per_part =
        std::max<int64_t>(PreparedPoints<T>::kPointsPerPart / points_per_query, 1);
    reserve_copies(N, queries_per_part * points_per_query);
    const T *locations = &copies_.locations[0], *weights = &copies_.attention_weights[0];
    for (int64_t query = 0; query < tile.num_queries; query += queries_per_part) {
      const Tile part = {tile.batch_index, tile.first_head, tile.num_heads,
                         tile.first_query + query,
                         std::min(queries_per_part, tile.num_queries - query)};
      prepared.template prepare<N>(plan, reader, part, copies_);
      PairOffset<T> pair_offset(plan.call.total_points);
      for (int64_t i = 0; i < part.num_pairs() * plan.call.total_points; i += kWidth<T>) {
        run(locations + N * i, weights + i, pair_offset.value, query * points_per_query + i);
        pair_offset.next();
      }
    }
  }

  int64_t slice_stride_ = 0;
  Buffer<int32_t> rows_;
  Buffer<T> weights_;
  PointBuffers<T> copies_;
};

// Calls run(level, slice) for each of the pieces that stage two works on one after the other.
template <class Run>
SACCADE_INLINE void for_each_slice(const Plan& plan, Run run) {
  for (const PlannedLevel& level : plan.levels) {
    for (int64_t slice = 0; slice < plan.call.num_slices(); ++slice) {
      run(level, slice);
    }
  }
}

// The rows of a level for one head, and the steps from a point's first corner to the others.
template <class S>
struct LevelRows {
  S* first;
  int64_t stride;
  // An axis of one cell has no second one: the step stays on the first, its weight is 0.
  int64_t right, down;

  LevelRows(const Level& level, S* first_row, int64_t row_stride)
      : first(first_row),
        stride(row_stride),
        right(level.width > 1 ? row_stride : 0),
        down(level.height > 1 ? level.width * row_stride : 0) {}
};

// The rows of a level that a tile's first head reads: the copies if the level is packed.
template <class S>
LevelRows<const S> rows_to_read(const Plan& plan, const PlannedLevel& level,
                                const HeadRows<S>& rows) {
  return level.packed
             ? LevelRows<const S>(level, rows.packed + level.first_packed_row * plan.call.head_dim,
                                  plan.call.head_dim)
             : LevelRows<const S>(level, rows.value + level.first_row * rows.stride, rows.stride);
}
