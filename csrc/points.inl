// Stage one: from the locations of a chunk of queries to rows of the value and weights, a vector of
// points at a time. All variety (coordinates, padding, interpolation) ends here.
//
// A point reads two cells along each axis, the pair (base, base + 1). The base is clamped into the
// map and the weights are a hat around the position, 1 - |position - cell|: where a cell of the
// pair is not one of the two around the position, its weight is exactly 0. There is nothing to
// branch on and no read outside the map. The one difference to the definition is 0 * infinity,
// which exact.inl puts right.

template <class T>
struct Axis {
  Vector<T> base;          // index of the first cell, a whole number
  Vector<T> weights[2];    // of the two cells
  Vector<T> slopes[2];     // derivatives of the weights by the location
  Vector<T> is_corner[2];  // 1 where the definition reads the cell, even if its weight is 0
};

template <class T>
SACCADE_INLINE Axis<T> locate(Vector<T> location, const AxisTable<T>& table, int64_t at,
                              Interpolation interpolation, Padding padding) {
  typedef Vector<T> V;
  const V zero = {}, one = splat<T>(1), two = splat<T>(2);
  V slope = load(&table.scale[at]);
  // Rounded twice, never fused: every backend agrees on the position to the last bit.
  V position = location * slope + load(&table.shift[at]);
  if (padding != Padding::zeros) {
    const V last = load(&table.last[at]);
    slope = position > zero && position < last ? slope : zero;
    position = minimum<T>(maximum<T>(position, zero), last);
  }
  const bool one_cell = interpolation != Interpolation::linear;
  if (one_cell) {
    const bool nearest = interpolation == Interpolation::nearest;
    position = nearest ? (V)round_even(position) : (V)floor(position);
    slope = zero;
  }
  Axis<T> axis;
  axis.base = minimum<T>(maximum<T>((V)floor(position), zero), load(&table.base_limit[at]));
  const V distance = position - axis.base;
  const V pair = load(&table.pair[at]);
  // Zero where the argument is negative or NaN.
  axis.weights[0] = maximum<T>(distance < zero ? one + distance : one - distance, zero);
  axis.weights[1] = maximum<T>(minimum<T>(distance, two - distance), zero) * pair;
  const V below = distance >= -one && distance < zero ? one : zero;  // base is the upper cell
  const V inside = distance >= zero && distance < one ? one : zero;  // both cells
  const V above = distance >= one && distance < two ? one : zero;    // base + 1 is the lower cell
  axis.slopes[0] = slope * (below - inside);
  axis.slopes[1] = slope * (inside - above) * pair;
  axis.is_corner[0] = one_cell ? axis.weights[0] : below + inside;
  axis.is_corner[1] = one_cell ? axis.weights[1] : (inside + above) * pair;
  return axis;
}

// A vector of points, the first of which is point `in_period` of its look. A point whose location
// is not finite has weight, slope and corners 0.
template <class T, int N>
struct Located {
  Axis<T> axes[N];  // x, y, z

  SACCADE_INLINE Located(const Problem& problem, const PointTable<T>& table, const T* locations,
                         int64_t in_period) {
    typedef Vector<T> V;
    const V zero = {}, one = splat<T>(1);
    V location[N];
    load_by_axis<T, N>(locations, location);
    V finite = one;
#pragma GCC unroll 3
    for (int n = 0; n < N; ++n) {
      axes[n] =
          locate<T>(location[n], table.axes[n], in_period, problem.interpolation, problem.padding);
      finite = location[n] - location[n] == zero ? finite : zero;
    }
    const auto drop = [&](V& number) { number = finite != zero ? number : zero; };
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

// Calls run(locations, attention weights, in_period, at) for each vector of the unit's given
// points, look after look; `at` counts them. They are read in place where the looks of a query are
// whole vectors of points, else copied together. The last vector may reach past the last point and
// then reads zeros there.
template <class T, int N, class Run>
SACCADE_INLINE void for_each_vector(const Problem& problem, const GivenPoints<T>& given,
                                    const Unit& unit, PointCopies<T>& copies, Run run) {
  constexpr int64_t W = kWidth<T>;
  const int64_t of_query = unit.num_heads * problem.total_points;
  const int64_t step = problem.num_heads * problem.total_points;
  const int64_t all = problem.total_queries() * step;
  int64_t from = unit.row(problem, 0) * problem.total_points;
  InPeriod<T> in_period(problem.total_points);
  int64_t at = 0;
  if (of_query % W == 0) {
    for (int64_t query = 0; query < unit.num_queries; ++query, from += step) {
      given.template fetch_ahead<N>(problem, unit, from);
      for (int64_t point = 0; point < of_query; point += W, at += W) {
        run(given.locations + N * (from + point), given.attention_weights + from + point,
            in_period.at, at);
        in_period.next();
      }
    }
    return;
  }
  constexpr int64_t kTogether = 8 * W;
  constexpr int64_t kRoom = std::max<int64_t>(N * W, 64 / sizeof(T));
  copies.locations.reserve(N * (kTogether + of_query) + kRoom);
  copies.attention_weights.reserve(kTogether + of_query + kRoom);
  T* const locations = copies.locations.data();
  T* const weights = copies.attention_weights.data();
  int64_t filled = 0;
  for (int64_t query = 0; query < unit.num_queries; ++query, from += step) {
    given.template fetch_ahead<N>(problem, unit, from);
    copy_numbers_roughly(locations + N * filled, given.locations + N * from, N * of_query,
                         given.locations + N * all);
    copy_numbers_roughly(weights + filled, given.attention_weights + from, of_query,
                         given.attention_weights + all);
    filled += of_query;
    const bool last = query + 1 == unit.num_queries;
    if (filled < kTogether && !last) {
      continue;
    }
    if (last) {
      std::fill_n(locations + N * filled, N * W, T(0));
      std::fill_n(weights + filled, W, T(0));
    }
    int64_t done = 0;
    for (; done + (last ? 1 : W) <= filled; done += W, at += W) {
      run(locations + N * done, weights + done, in_period.at, at);
      in_period.next();
    }
    if (!last) {
      filled -= done;
      std::memcpy(locations, locations + N * done, N * W * sizeof(T));
      std::memcpy(weights, weights + done, W * sizeof(T));
    }
  }
}

// The points of one look, [P, N] and [P].
template <class T>
struct LookPoints {
  const T* locations;
  const T* attention_weights;
};

// What stage two reads of the points of a unit.
template <class T>
struct Points {
  bool weights_are_finite;
  // [looks, P, N] and [looks, P], as given or made, for who needs the points once more.
  PointCopies<T> kept;
  FusedPoints<T> fused;

  // [looks, P] of a slice, from a level's first point on: the rows of the first corners, counted
  // within the level.
  const int32_t* rows(const Level& level, int64_t slice) const {
    return &rows_[slice * slice_stride_ + level.first_point];
  }
  // [looks, P, 4], alike: of the corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), attention
  // weight included. On a line the lower two are 0.
  T* weights(const Level& level, int64_t slice) { return weights(slice) + 4 * level.first_point; }
  const T* weights(const Level& level, int64_t slice) const {
    return weights(slice) + 4 * level.first_point;
  }
  T* weights(int64_t slice) { return &weights_[4 * slice * slice_stride_]; }
  const T* weights(int64_t slice) const { return &weights_[4 * slice * slice_stride_]; }

  // The points of the look at `row` of the tensors [T, M, ...]; of a fused call made once more.
  LookPoints<T> look(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
                     int64_t row) {
    const int64_t dims = problem.spatial_dims, points = problem.total_points;
    if (!problem.is_fused()) {
      return {given.locations + dims * row * points, given.attention_weights + row * points};
    }
    reserve_copies(dims, points);
    const Unit alone = {unit.batch, row % problem.num_heads, 1, row / problem.num_heads, 1};
    with_axes(problem, [&](auto axes) {
      fused.template make<decltype(axes)::value>(problem, given, alone, copies_);
    });
    return {&copies_.locations[0], &copies_.attention_weights[0]};
  }

  // The rows, and the weights or else `kept`. There is room for the weights either way.
  template <bool kWeights>
  void locate(const Problem& problem, const GivenPoints<T>& given, const Unit& unit) {
    with_axes(problem,
              [&](auto axes) { locate_in<decltype(axes)::value, kWeights>(problem, given, unit); });
  }

 private:
  template <int N, bool kWeights>
  void locate_in(const Problem& problem, const GivenPoints<T>& given, const Unit& unit) {
    typedef Vector<T> V;
    const PointTable<T>& table = point_table<T>(problem);
    const int64_t count = unit.num_looks() * problem.total_points;
    const int64_t stride = count + kWidth<T>;
    slice_stride_ = stride;
    rows_.reserve(problem.num_slices() * stride);
    weights_.reserve(4 * problem.num_slices() * stride);
    if (!kWeights) {
      kept.locations.reserve(N * stride);
      kept.attention_weights.reserve(stride);
    }
    V zero_or_nan = {};
    const auto run = [&](const T* locations, const T* attention_weights, int64_t in_period,
                         int64_t at) SACCADE_INLINE_LAMBDA {
      const Located<T, N> point(problem, table, locations, in_period);
      RowNumbers<T> rows = as_rows<T>(point.axes[N - 1].base);
      if constexpr (N == 3) {
        rows = rows * load_rows<T>(&table.height[in_period]) + as_rows<T>(point.axes[1].base);
      }
      if constexpr (N >= 2) {
        rows = rows * load_rows<T>(&table.width[in_period]) + as_rows<T>(point.axes[0].base);
      }
      store_rows<T>(&rows_[at], rows);
      if constexpr (N == 3) {
        store_rows<T>(&rows_[stride + at], rows + load_rows<T>(&table.next_slice[in_period]));
      }
      const V attention = load(attention_weights);
      zero_or_nan += attention - attention;
      if (!kWeights) {
        for (int n = 0; n < N; ++n) {
          store(&kept.locations[N * at + n * kWidth<T>], load(locations + n * kWidth<T>));
        }
        store(&kept.attention_weights[at], attention);
        return;
      }
      const V* wx = point.axes[0].weights;
      if constexpr (N == 1) {
        store_quads<T>(&weights_[4 * at], wx[0] * attention, wx[1] * attention, V{}, V{});
      } else {
        const V* wy = point.axes[1].weights;
        for (int slice = 0; slice < (N == 3 ? 2 : 1); ++slice) {
          const V share = N == 3 ? attention * point.axes[N - 1].weights[slice] : attention;
          const V upper = wy[0] * share, lower = wy[1] * share;
          store_quads<T>(&weights_[4 * (slice * stride + at)], wx[0] * upper, wx[1] * upper,
                         wx[0] * lower, wx[1] * lower);
        }
      }
    };
    if (!problem.is_fused()) {
      for_each_vector<T, N>(problem, given, unit, copies_, run);
    } else if (FusedPoints<T>::by_vectors(problem, unit)) {
      fused.template for_each_vector<N>(problem, given, unit, run);
    } else {
      for_each_made_vector<N>(problem, given, unit, run);
    }
    if (!kWeights) {
      // The last vector of who goes on with these reads past the last point.
      std::fill_n(&kept.locations[N * count], N * kWidth<T>, T(0));
      std::fill_n(&kept.attention_weights[count], kWidth<T>, T(0));
      for (int64_t slice = 0; slice < problem.num_slices(); ++slice) {
        std::fill_n(weights(slice) + 4 * count, 4 * kWidth<T>, T(0));
      }
    }
    weights_are_finite = !any(zero_or_nan != zero_or_nan);
  }

  // Room in copies_ for so many points.
  void reserve_copies(int64_t spatial_dims, int64_t count) {
    copies_.locations.reserve(spatial_dims * (count + FusedPoints<T>::kRoom));
    copies_.attention_weights.reserve(count + FusedPoints<T>::kRoom);
  }

  // Where the points of a fused call do not fill vectors they are made some queries at a time,
  // which the first-level cache holds until they are located.
  template <int N, class Run>
  SACCADE_INLINE void for_each_made_vector(const Problem& problem, const GivenPoints<T>& given,
                                           const Unit& unit, Run run) {
    const int64_t of_query = unit.num_heads * problem.total_points;
    const int64_t together = std::max<int64_t>(FusedPoints<T>::kTogether / of_query, 1);
    reserve_copies(N, together * of_query);
    const T *locations = &copies_.locations[0], *weights = &copies_.attention_weights[0];
    for (int64_t query = 0; query < unit.num_queries; query += together) {
      const Unit part = {unit.batch, unit.first_head, unit.num_heads, unit.first_query + query,
                         std::min(together, unit.num_queries - query)};
      fused.template make<N>(problem, given, part, copies_);
      InPeriod<T> in_period(problem.total_points);
      for (int64_t at = 0; at < part.num_looks() * problem.total_points; at += kWidth<T>) {
        run(locations + N * at, weights + at, in_period.at, query * of_query + at);
        in_period.next();
      }
    }
  }

  int64_t slice_stride_ = 0;
  Buffer<int32_t> rows_;
  Buffer<T> weights_;
  PointCopies<T> copies_;
};

// Calls run(level, slice) for what stage two does one after the other.
template <class Run>
SACCADE_INLINE void for_each_slice(const Problem& problem, Run run) {
  for (const Level& level : problem.levels) {
    for (int64_t slice = 0; slice < problem.num_slices(); ++slice) {
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

// A level's rows to read of a unit's first head: the copies if it is packed.
template <class S>
LevelRows<const S> rows_to_read(const Problem& problem, const Level& level,
                                const HeadRows<S>& rows) {
  return level.packed
             ? LevelRows<const S>(level, rows.packed + level.first_packed_row * problem.head_dim,
                                  problem.head_dim)
             : LevelRows<const S>(level, rows.in_place + level.first_row * rows.stride,
                                  rows.stride);
}
