// The three products of the gradient: dot products of grad_output with the rows, from which the
// gradients of weights and locations follow, and the scatter of weighted grad_output into the rows.

// A chunk of grad_output [B, Q, M * D] for one head in the compute type, `channels` from
// `first_channel` on, each query padded with zeros to whole vectors.
template <class S, class T>
void load_grad(const Problem& problem, const S* grad_output, const Unit& unit,
               int64_t first_channel, int64_t channels, Buffer<T>& grads) {
  const int64_t stride = whole_vectors<T>(channels);
  grads.reserve(unit.num_queries * stride);
  for (int64_t query = 0; query < unit.num_queries; ++query) {
    const S* from = grad_output + unit.row(problem, query) * problem.head_dim + first_channel;
    const int64_t ahead = std::min(query + kQueriesAhead, unit.num_queries - 1);
    prefetch(grad_output + unit.row(problem, ahead) * problem.head_dim + first_channel, channels);
    T* to = &grads[query * stride];
    int64_t at = 0;
    for (; at + kWidth<T> <= channels; at += kWidth<T>) {
      store(to + at, load_as_compute(from + at));
    }
    if (at < channels) {
      store(to + at, load_partial<S, T>(from + at, channels - at));
    }
  }
}

// Points whose 4 * kGroup dot products fill a vector.
template <class T>
constexpr int kGroup = kWidth<T> / 4;

// The dot products of one query's grad with the four corners of a group of points, point after
// point. Fewer than a group: the last one is repeated.
template <class S, class T>
SACCADE_INLINE Vector<T> group_dots(const LevelRows<const S>& level, const Points<T>& points,
                                    int64_t at, int64_t count, const T* grad, int64_t channels) {
  constexpr int G = kGroup<T>, W = kWidth<T>;
  const S* corners[G];
#pragma GCC unroll 4
  for (int i = 0; i < G; ++i) {
    const int64_t point = at + (i < count ? i : count - 1);
    corners[i] = level.row(points.row(point));
  }
  Vector<T> dots[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) {
    dots[i] = Vector<T>{};  // one by one: GCC fills an array through memory
  }
  int64_t at_channel = 0;
  for (; at_channel + W <= channels; at_channel += W) {
    const Vector<T> g = load(grad + at_channel);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      dots[i] = (Vector<T>)fma(g, load_as_compute(corners[i / 4] + level.steps[i % 4] + at_channel),
                               dots[i]);
    }
  }
  if (at_channel < channels) {
    const Vector<T> g = load(grad + at_channel);
    for (int i = 0; i < W; ++i) {
      const S* row = corners[i / 4] + level.steps[i % 4] + at_channel;
      dots[i] = (Vector<T>)fma(g, load_partial<S, T>(row, channels - at_channel), dots[i]);
    }
  }
  return sums<T>(dots);
}

template <class S, class T>
void dots_of_chunk(const Problem& problem, const Points<T>& points, int64_t num_queries,
                   const HeadRows<S>& rows, const T* grads, int64_t grads_stride, T* dots) {
  constexpr int G = kGroup<T>;
  for (const Level& level : problem.levels) {
    const LevelRows<const S> level_rows = rows_to_read(problem, level, rows);
    for (int64_t query = 0; query < num_queries; ++query) {
      const T* grad = grads + query * grads_stride;
      int64_t at = query * problem.total_points + level.first_point;
      if (!level.packed && query + kRowQueriesAhead < num_queries) {
        prefetch_rows(level_rows, points, at + kRowQueriesAhead * problem.total_points,
                      level.num_points, problem.head_dim);
      }
      const int64_t end = at + level.num_points;
      for (; at + G <= end; at += G) {
        store(dots + 4 * at, group_dots(level_rows, points, at, G, grad, problem.head_dim));
      }
      if (at < end) {
        // Not the whole vector: beyond the level lie dot products that are there already.
        store_partial<T, T>(dots + 4 * at,
                            group_dots(level_rows, points, at, end - at, grad, problem.head_dim),
                            4 * (end - at));
      }
    }
  }
}

// From dot products to the gradients of locations and weights; false if a number is NaN.
template <class T>
bool chain(const Problem& problem, const Points<T>& points, int64_t num_queries, const T* dots,
           T* grad_locations, T* grad_weights) {
  typedef Vector<T> V;
  constexpr int W = kWidth<T>;
  const PointTable<T>& table = point_table<T>(problem);
  V nan = {};
  for (int64_t at = 0; at < num_queries * problem.total_points; at += W) {
    const Located<T> point = locate_points<T>(problem, table, &points.locations[0], at);
    const V attention = load(&points.attention_weights[at]);
    const V first = load(dots + 4 * at), second = load(dots + 4 * at + W);
    const V third = load(dots + 4 * at + 2 * W), fourth = load(dots + 4 * at + 3 * W);
    const V even_low = evens<T>(first, second), even_high = evens<T>(third, fourth);
    const V odd_low = odds<T>(first, second), odd_high = odds<T>(third, fourth);
    const V corners[4] = {evens<T>(even_low, even_high), evens<T>(odd_low, odd_high),
                          odds<T>(even_low, even_high), odds<T>(odd_low, odd_high)};
    const auto row = [&](const V* by_x, int i) {
      return by_x[0] * corners[2 * i] + by_x[1] * corners[2 * i + 1];
    };
    const V* wx = point.x.weights;
    const V* wy = point.y.weights;
    const V grad_weight = wy[0] * row(wx, 0) + wy[1] * row(wx, 1);
    const V grad_x = attention * (wy[0] * row(point.x.slopes, 0) + wy[1] * row(point.x.slopes, 1));
    const V grad_y = attention * (point.y.slopes[0] * row(wx, 0) + point.y.slopes[1] * row(wx, 1));
    store(grad_weights + at, grad_weight);
    store_pairs<T>(grad_locations + 2 * at, grad_x, grad_y);
    const V sum = grad_weight + grad_x + grad_y;
    nan += sum == sum ? V{} : splat<T>(1);
  }
  return !any(nan != V{});
}

template <class S>
struct BackwardPointsScratch {
  PackedRows<S> packed;
  Points<Compute<S>> points;
  Buffer<Compute<S>> grads, dots, grad_locations, grad_weights;
};

template <class S>
void backward_points(const Problem& problem, const Value& value, const void* grad_output,
                     const void* locations, const void* weights, void* grad_locations,
                     void* grad_weights, int64_t begin, int64_t end,
                     BackwardPointsScratch<S>& scratch) {
  typedef Compute<S> T;
  const int64_t total_points = problem.total_points;
  const int64_t grads_stride = whole_vectors<T>(problem.head_dim);
  const int64_t most_points = problem.chunk_queries * total_points + kWidth<T>;
  scratch.packed.forget();
  scratch.dots.reserve(4 * most_points);
  scratch.grad_locations.reserve(2 * most_points);
  scratch.grad_weights.reserve(most_points);
  for (int64_t index = begin; index < end; ++index) {
    const Unit unit(problem, index);
    const HeadRows<S> rows = scratch.packed.rows(problem, value, unit);
    Points<T>& points = scratch.points;
    points.gather(problem, static_cast<const T*>(locations), static_cast<const T*>(weights), unit);
    points.compute(problem, unit.num_queries);
    load_grad(problem, static_cast<const S*>(grad_output), unit, 0, problem.head_dim,
              scratch.grads);
    const int64_t count = unit.num_queries * total_points;
    std::fill_n(&scratch.dots[4 * count], 4 * kWidth<T>, T(0));  // read by the last vector
    dots_of_chunk(problem, points, unit.num_queries, rows, &scratch.grads[0], grads_stride,
                  &scratch.dots[0]);
    if (!chain(problem, points, unit.num_queries, &scratch.dots[0], &scratch.grad_locations[0],
               &scratch.grad_weights[0])) {
      for (int64_t query = 0; query < unit.num_queries; ++query) {
        exact_backward_points(problem, points, query, rows.in_place, rows.stride,
                              &scratch.grads[query * grads_stride], &scratch.grad_locations[0],
                              &scratch.grad_weights[0]);
      }
    }
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      const int64_t to = unit.row(problem, query) * total_points;
      copy_numbers(static_cast<T*>(grad_locations) + 2 * to,
                   &scratch.grad_locations[2 * query * total_points], 2 * total_points);
      copy_numbers(static_cast<T*>(grad_weights) + to, &scratch.grad_weights[query * total_points],
                   total_points);
    }
  }
  scratch.packed.forget();
}

// Adds weight * grad to the four rows of each of `count` points. The rows of one point may be the
// same row (maps one cell wide), so they are updated one after the other.
template <class T, int NV, bool Partial>
SACCADE_INLINE void scatter(const LevelRows<T>& level, int64_t channel, const Points<T>& points,
                            int64_t at, int64_t count, const T* grad, int64_t channels) {
  Vector<T> g[NV];
#pragma GCC unroll 4
  for (int v = 0; v < NV; ++v) {
    g[v] = load(grad + v * kWidth<T>);
  }
  for (int64_t point = at; point < at + count; ++point) {
    T* corner = level.row(points.row(point)) + channel;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const Vector<T> weight = splat<T>(points.weight(point, c));
      T* row = corner + level.steps[c];
#pragma GCC unroll 4
      for (int v = 0; v < NV; ++v) {
        if (Partial) {
          const Vector<T> old = load_partial<T, T>(row, channels);
          store_partial<T, T>(row, (Vector<T>)fma(weight, g[v], old), channels);
        } else {
          T* to = row + v * kWidth<T>;
          store(to, (Vector<T>)fma(weight, g[v], load(to)));
        }
      }
    }
  }
}

template <class T>
void scatter_chunk(const Problem& problem, const Points<T>& points, int64_t num_queries,
                   const T* grads, int64_t grads_stride, int64_t channels, T* rows,
                   int64_t row_stride) {
  constexpr int W = kWidth<T>;
  for (const Level& level : problem.levels) {
    const LevelRows<T> level_rows(level, rows, row_stride);
    for (int64_t query = 0; query < num_queries; ++query) {
      const int64_t at = query * problem.total_points + level.first_point;
      const T* grad = grads + query * grads_stride;
      int64_t c = 0;
      for (; c + 4 * W <= channels; c += 4 * W) {
        scatter<T, 4, false>(level_rows, c, points, at, level.num_points, grad + c, 0);
      }
      if (c + 2 * W <= channels) {
        scatter<T, 2, false>(level_rows, c, points, at, level.num_points, grad + c, 0);
        c += 2 * W;
      }
      if (c + W <= channels) {
        scatter<T, 1, false>(level_rows, c, points, at, level.num_points, grad + c, 0);
        c += W;
      }
      if (c < channels) {
        scatter<T, 1, true>(level_rows, c, points, at, level.num_points, grad + c, channels - c);
      }
    }
  }
}

template <class S>
struct BackwardValueScratch {
  Points<Compute<S>> points;
  Buffer<Compute<S>> grads, rows;
};

template <class S>
void backward_value(const Problem& problem, const void* grad_output, const void* locations,
                    const void* weights, void* grad_value, int64_t begin, int64_t end,
                    BackwardValueScratch<S>& scratch) {
  typedef Compute<S> T;
  constexpr bool kSameType = std::is_same<S, T>::value;
  // Where the sums are kept: in rows of our own (always for 16-bit storage: sums are in float), or
  // right in grad_value if too little is added to pay for writing it out.
  const bool own_rows = !kSameType || problem.own_grad_rows;
  const int64_t full_stride = problem.value_heads * problem.head_dim;
  for (int64_t index = begin; index < end; ++index) {
    const int64_t band = index % problem.num_bands;
    const int64_t value_head = index / problem.num_bands % problem.value_heads;
    const int64_t batch = index / problem.num_bands / problem.value_heads;
    const int64_t band_channels =
        whole_vectors<T>((problem.head_dim + problem.num_bands - 1) / problem.num_bands);
    const int64_t first_channel = std::min(band * band_channels, problem.head_dim);
    const int64_t channels = std::min(band_channels, problem.head_dim - first_channel);
    if (channels == 0) {
      continue;
    }
    S* target = static_cast<S*>(grad_value) + batch * problem.num_positions * full_stride +
                value_head * problem.head_dim + first_channel;
    T* rows;
    int64_t row_stride;
    if (own_rows) {
      scratch.rows.reserve(problem.num_positions * channels);
      rows = &scratch.rows[0];
      row_stride = channels;
      std::fill_n(rows, problem.num_positions * channels, T(0));
    } else {
      rows = reinterpret_cast<T*>(target);
      row_stride = full_stride;
      for (int64_t row = 0; row < problem.num_positions; ++row) {
        std::fill_n(rows + row * row_stride, channels, T(0));
      }
    }
    const int64_t first_head = problem.value_heads > 1 ? value_head : 0;
    const int64_t end_head = problem.value_heads > 1 ? value_head + 1 : problem.num_heads;
    for (int64_t head = first_head; head < end_head; ++head) {
      for (int64_t chunk = 0; chunk < problem.num_chunks; ++chunk) {
        const Unit unit(problem, (batch * problem.num_heads + head) * problem.num_chunks + chunk);
        Points<T>& points = scratch.points;
        points.gather(problem, static_cast<const T*>(locations), static_cast<const T*>(weights),
                      unit);
        points.compute(problem, unit.num_queries);
        load_grad(problem, static_cast<const S*>(grad_output), unit, first_channel, channels,
                  scratch.grads);
        const int64_t grads_stride = whole_vectors<T>(channels);
        if (points.weights_are_finite &&
            all_finite(&scratch.grads[0], unit.num_queries * grads_stride)) {
          scatter_chunk(problem, points, unit.num_queries, &scratch.grads[0], grads_stride,
                        channels, rows, row_stride);
        } else {
          for (int64_t query = 0; query < unit.num_queries; ++query) {
            exact_backward_value(problem, points, query, &scratch.grads[query * grads_stride],
                                 channels, rows, row_stride);
          }
        }
      }
    }
    if (own_rows) {
      for (int64_t row = 0; row < problem.num_positions; ++row) {
        write_numbers(target + row * full_stride, rows + row * row_stride, channels);
      }
    }
  }
  scratch.rows.release_if_above(kKeptBytes / int64_t(sizeof(T)));
}
