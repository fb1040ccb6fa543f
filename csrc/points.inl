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
  if (padding == Padding::border) {
    const V last = load(&table.last[at]);
    slope = position > zero && position < last ? slope : zero;
    position = minimum<T>(maximum<T>(position, zero), last);
  }
  const bool nearest = interpolation == Interpolation::nearest;
  if (nearest) {
    position = (V)round_even(position);
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
  axis.is_corner[0] = nearest ? axis.weights[0] : below + inside;
  axis.is_corner[1] = nearest ? axis.weights[1] : (inside + above) * pair;
  return axis;
}

template <class T>
struct Located {
  Axis<T> x, y;
};

// The points [at, at + width) of a chunk: `locations` holds x and y in turns. A point whose
// location is not finite has weight, slope and corners 0.
template <class T>
SACCADE_INLINE Located<T> locate_points(const Problem& problem, const PointTable<T>& table,
                                        const T* locations, int64_t at) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const V zero = {};
  const V first = load(locations + 2 * at), second = load(locations + 2 * at + W);
  const V x = evens<T>(first, second), y = odds<T>(first, second);
  const int64_t in_period = at % problem.total_points;
  Located<T> located = {
      locate<T>(x, table.x, in_period, problem.interpolation, problem.padding),
      locate<T>(y, table.y, in_period, problem.interpolation, problem.padding),
  };
  const V finite = x - x == zero && y - y == zero ? splat<T>(1) : zero;
  const auto drop = [&](V& number) { number = finite != zero ? number : zero; };
  for (int i = 0; i < 2; ++i) {
    drop(located.x.weights[i]);
    drop(located.x.slopes[i]);
    drop(located.x.is_corner[i]);
    drop(located.y.slopes[i]);
  }
  return located;
}

// What stage two reads, for a vector of points: the row of each point's first corner within its
// level and the weights of the corners (y, x), (y, x + 1), (y + 1, x), (y + 1, x + 1), attention
// weight included. Blocks rather than five arrays, so that one address reaches everything of a
// point.
template <class T>
struct PointBlock {
  int32_t row[kWidth<T>];
  T weights[4][kWidth<T>];
};

template <class T>
struct Points {
  Buffer<T> locations;          // [chunk, P, 2], as given
  Buffer<T> attention_weights;  // [chunk, P], as given
  Buffer<PointBlock<T>> blocks;
  bool weights_are_finite;

  int64_t row(int64_t point) const {
    return blocks[uint64_t(point) / kWidth<T>].row[uint64_t(point) % kWidth<T>];
  }
  T weight(int64_t point, int corner) const {
    return blocks[uint64_t(point) / kWidth<T>].weights[corner][uint64_t(point) % kWidth<T>];
  }

  // Copies the chunk's locations and weights of one head together: [.., M, P, ..] -> [chunk, P,
  // ..].
  void gather(const Problem& problem, const T* all_locations, const T* all_weights,
              const Unit& unit) {
    const int64_t total_points = problem.total_points;
    const int64_t count = unit.num_queries * total_points;
    locations.reserve(2 * count + 2 * kWidth<T>);
    attention_weights.reserve(count + kWidth<T>);
    const int64_t step = problem.num_heads * total_points;
    const int64_t first = unit.row(problem, 0) * total_points;
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      const int64_t from = first + query * step;
      const int64_t ahead = from + std::min(kQueriesAhead, unit.num_queries - 1 - query) * step;
      prefetch(all_locations + 2 * ahead, 2 * total_points);
      prefetch(all_weights + ahead, total_points);
      copy_numbers(&locations[query * 2 * total_points], all_locations + 2 * from,
                   2 * total_points);
      copy_numbers(&attention_weights[query * total_points], all_weights + from, total_points);
    }
    // The last vector may reach past the last point; what it computes there is not used.
    std::fill_n(&locations[2 * count], 2 * kWidth<T>, T(0));
    std::fill_n(&attention_weights[count], kWidth<T>, T(0));
  }

  void compute(const Problem& problem, int64_t num_queries) {
    typedef Vector<T> V;
    const PointTable<T>& table = point_table<T>(problem);
    const int64_t count = num_queries * problem.total_points;
    blocks.reserve(count / kWidth<T> + 1);
    V not_finite = {};
    for (int64_t at = 0; at < count; at += kWidth<T>) {
      const Located<T> point = locate_points<T>(problem, table, &locations[0], at);
      PointBlock<T>& block = blocks[at / kWidth<T>];
      store_rows<T>(block.row, point.x.base, point.y.base, &table.width[at % problem.total_points]);
      const V attention = load(&attention_weights[at]);
      not_finite += attention - attention;
      for (int corner = 0; corner < 4; ++corner) {
        store(block.weights[corner],
              point.y.weights[corner / 2] * point.x.weights[corner % 2] * attention);
      }
    }
    weights_are_finite = !any(not_finite != not_finite);
  }
};

// The rows of a level for one head, and the steps from a point's first corner to the others.
template <class S>
struct LevelRows {
  S* first;
  int64_t stride;
  int64_t steps[4];

  LevelRows(const Level& level, S* rows_of_all_levels, int64_t row_stride)
      : first(rows_of_all_levels + level.first_row * row_stride), stride(row_stride) {
    // An axis of one cell has no second one: the step stays on the first, its weight is 0.
    const int64_t right = level.width > 1 ? row_stride : 0;
    const int64_t down = level.height > 1 ? level.width * row_stride : 0;
    steps[0] = 0;
    steps[1] = right;
    steps[2] = down;
    steps[3] = down + right;
  }

  S* row(int64_t number) const { return first + number * stride; }
};

// A level's rows to read: the copies if it is packed.
template <class S>
LevelRows<const S> rows_to_read(const Problem& problem, const Level& level,
                                const HeadRows<S>& rows) {
  if (!level.packed) {
    return LevelRows<const S>(level, rows.in_place, rows.stride);
  }
  LevelRows<const S> found(level, rows.packed, problem.head_dim);
  found.first = rows.packed + level.first_packed_row * problem.head_dim;
  return found;
}
