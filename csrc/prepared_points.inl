// Stage zero, for calls with reference points or a softmax: from offsets to locations, from logits
// to attention weights, tile by tile, in memory that stays in the caches; and its reverse. Either
// one alone leaves the other as the caller has it.

// A query's reference points, spread over the elements of its offsets: for each the coordinate that
// it starts from, and of boxes the size by which it is multiplied.
template <class T>
class References {
 public:
  References(const Plan& plan, const PointReader<T>& reader)
      : first_(reader.references),
        count_(plan.call.num_references * plan.call.reference_size()),
        end_(first_ + plan.call.total_queries() * count_),
        index_(point_table<T>(plan).reference_element.data()),
        axes_(plan.call.spatial_dims),
        boxes_(plan.call.references_are_boxes),
        short_(kPicks && count_ <= kWidth<T>) {}

  // Must be called before coordinates() and sizes() of the query.
  SACCADE_INLINE void select_query(int64_t query) {
    elements_ = first_ + query * count_;
    if (short_) {
      if (elements_ + 2 * kWidth<T> > end_) {
        std::copy_n(elements_, count_, copies_);
        elements_ = copies_;
      }
      coordinates_ = load(elements_);
      // Sizes follow the coordinates of their box.
      sizes_ = boxes_ ? load(elements_ + axes_) : coordinates_;
    }
  }

  // For a vector of offsets that begins `offset` elements into those of its (query, head) pair.
  SACCADE_INLINE Vector<T> coordinates(int64_t offset) const {
    return spread(coordinates_, offset, 0);
  }
  SACCADE_INLINE Vector<T> sizes(int64_t offset) const { return spread(sizes_, offset, axes_); }

 private:
  SACCADE_INLINE Vector<T> spread(Vector<T> source, int64_t offset, int64_t shift) const {
    if constexpr (kPicks) {
      if (short_) {
        return (Vector<T>)pick(source, index_ + offset);
      }
    }
    T lanes[kWidth<T>];
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      lanes[lane] = elements_[index_[offset + lane] + shift];
    }
    return load(lanes);
  }

  const T* const first_;
  const int64_t count_;
  const T* const end_;
  const int32_t* const index_;
  const int64_t axes_;
  const bool boxes_, short_;
  const T* elements_ = nullptr;
  Vector<T> coordinates_ = {}, sizes_ = {};
  T copies_[2 * kWidth<T>] = {};
};

template <class T>
class PreparedPoints {
 public:
  static constexpr int64_t kCapacityMargin = kWidth<T> + 64 / sizeof(T);
  // Points that are prepared together, few enough for the first-level cache.
  static constexpr int64_t kPointsPerPart = 512;

  // Writes the locations and attention weights of a tile to `target`, pair after pair, and zeros
  // behind the last one, up to a whole vector. `target` needs a capacity of kCapacityMargin more
  // (times N, of locations).
  template <int N>
  void prepare(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
               PointBuffers<T>& target) {
    // Copied from the plan, since the compiler must assume that what is written might alias it.
    const int64_t total_points = plan.call.total_points, num_heads = tile.num_heads;
    const int64_t points_per_query = num_heads * total_points,
                  coordinates_per_pair = N * total_points;
    const int64_t end = plan.call.total_queries() * plan.call.num_heads * total_points;
    const int64_t count = tile.num_queries * points_per_query;
    const bool has_references = plan.call.has_references(), softmax = plan.call.softmax;
    const bool boxes = plan.call.references_are_boxes;
    const T* const step = point_table<T>(plan).offset_step.data();
    const int64_t query_stride = plan.call.num_heads * total_points;
    int64_t first = tile.row(plan, 0) * total_points;
    References<T> references(plan, reader);
    last_points_.reserve(N * points_per_query + kWidth<T>);
    last_weights_.reserve(points_per_query + kWidth<T>);
    T *location = &target.locations[0], *attention = &target.attention_weights[0];
    for (int64_t query = 0; query < tile.num_queries; ++query, first += query_stride) {
      reader.template fetch_ahead<N>(plan, tile, first);
      const T* point = reader.points + N * first;
      const T* weight = reader.weights + first;
      if (first + points_per_query + kWidth<T> > end) {
        // Whole vectors of the last points would reach beyond the end of what may be read.
        point = std::copy_n(point, N * points_per_query, &last_points_[0]) - N * points_per_query;
        weight = std::copy_n(weight, points_per_query, &last_weights_[0]) - points_per_query;
      }
      if (has_references) {
        references.select_query(tile.first_query + query);
      }
      for (int64_t head = 0; head < num_heads; ++head) {
        // Whole vectors are written: what they write too much is the next pair's, written later.
        if (softmax) {
          softmax_pair(weight, attention, total_points);
        } else {
          copy_vectors(attention, weight, total_points);
        }
        if (has_references) {
          for (int64_t i = 0; i < coordinates_per_pair; i += kWidth<T>) {
            store(location + i, to_locations(references, load(point + i), step, i, boxes));
          }
        } else {
          copy_vectors(location, point, coordinates_per_pair);
        }
        weight += total_points;
        attention += total_points;
        point += coordinates_per_pair;
        location += coordinates_per_pair;
      }
    }
    std::fill_n(&target.locations[N * count], N * kWidth<T>, T(0));
    std::fill_n(&target.attention_weights[count], kWidth<T>, T(0));
  }

  // Whether each vector of a tile's points holds whole (query, head) pairs of one query. Such a
  // vector is prepared and handed on at once: the processor waits for its memory while it works on
  // the vector before.
  static bool fills_vectors(const Plan& plan, const Tile& tile) {
    return tile.num_heads * plan.call.total_points % kWidth<T> == 0 &&
           in_groups<T>(plan.call.total_points, [](auto) {});
  }

  // Calls run(locations, attention weights, pair offset, index) for each vector of points, if
  // fills_vectors(); `index` counts the points. The softmax is computed for some queries together,
  // since one alone is a chain of steps that wait for each other.
  template <int N, class Run>
  SACCADE_INLINE void for_each_vector(const Plan& plan, const PointReader<T>& reader,
                                      const Tile& tile, Run run) {
    constexpr int64_t W = kWidth<T>;
    const int64_t total_points = plan.call.total_points;
    const int64_t points_per_query = tile.num_heads * total_points;
    const int64_t query_stride = plan.call.num_heads * total_points;
    const int64_t queries_per_part = std::max<int64_t>(kPointsPerPart / points_per_query, 1);
    const T* const step = point_table<T>(plan).offset_step.data();
    const bool has_references = plan.call.has_references();
    const bool boxes = plan.call.references_are_boxes;
    const int64_t first = tile.row(plan, 0) * total_points;
    weights_.reserve(queries_per_part * points_per_query);
    T* const weights = &weights_[0];
    References<T> references(plan, reader);
    T locations[N * W];
    int64_t index = 0;
    for (int64_t begin = 0; begin < tile.num_queries; begin += queries_per_part) {
      const int64_t end = std::min(begin + queries_per_part, tile.num_queries);
      T* weight = weights;
      for (int64_t query = begin; query < end; ++query, weight += points_per_query) {
        const int64_t point = first + query * query_stride;
        reader.template fetch_ahead<N>(plan, tile, point);
        copy_elements(weight, reader.weights + point, points_per_query);
      }
      if (plan.call.softmax) {
        softmax_in_groups(weights, (end - begin) * tile.num_heads, total_points);
      }
      weight = weights;
      for (int64_t query = begin; query < end; ++query) {
        const T* source = reader.points + N * (first + query * query_stride);
        if (!has_references) {
          for (int64_t point = 0; point < points_per_query; point += W, index += W, weight += W) {
            run(source + N * point, weight, 0, index);
          }
          continue;
        }
        references.select_query(tile.first_query + query);
        for (int64_t point = 0; point < points_per_query; point += W, index += W, weight += W) {
#pragma GCC unroll 3
          for (int n = 0; n < N; ++n, source += W) {
            const int64_t pair_offset = n * W % (N * total_points);
            store(locations + n * W,
                  to_locations(references, load(source), step, pair_offset, boxes));
          }
          run(locations, weight, 0, index);
        }
      }
    }
  }

  // Turns `grads`, the gradients of a tile's locations and attention weights, into those of the
  // caller's points and weights. `grad_references` is [T, M, R, N or 2 N], null if not needed.
  template <int N>
  void reverse(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
               const PointBuffers<T>& points, PointBuffers<T>& grads, T* grad_references) {
    const int64_t total_points = plan.call.total_points;
    if (plan.call.softmax) {
      softmax_backward(&points.attention_weights[0], &grads.attention_weights[0], tile.num_pairs(),
                       total_points);
    }
    if (!plan.call.has_references()) {
      return;
    }
    if (grad_references != nullptr) {
      sum_references<N>(plan, reader, tile, &grads.locations[0], grad_references);
    }
    const int64_t count = N * tile.num_pairs() * total_points;
    const T* const step = point_table<T>(plan).offset_step.data();
    T* const grad = &grads.locations[0];
    PairOffset<T> pair_offset(N * total_points);
    for (int64_t i = 0; i < count; i += kWidth<T>) {
      store(grad + i, load(grad + i) * load(step + pair_offset.value));
      pair_offset.next();
    }
    if (plan.call.references_are_boxes) {
      multiply_by_sizes<N>(plan, reader, tile, grad);
    }
  }

 private:
  static SACCADE_INLINE void copy_vectors(T* target, const T* source, int64_t count) {
    for (int64_t i = 0; i < count; i += kWidth<T>) {
      store(target + i, load(source + i));
    }
  }

  // A vector of offsets, from element `offset` of those of a pair on, as locations. Rounded step by
  // step, as the separate operations would be.
  static SACCADE_INLINE Vector<T> to_locations(const References<T>& references, Vector<T> offsets,
                                               const T* step, int64_t offset, bool boxes) {
    Vector<T> moved = offsets * load(step + offset);
    if (boxes) {
      moved = moved * references.sizes(offset);
    }
    return references.coordinates(offset) + moved;
  }

  template <int N>
  void multiply_by_sizes(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
                         T* grad) {
    const int64_t coordinates_per_pair = N * plan.call.total_points;
    References<T> references(plan, reader);
    for (int64_t query = 0; query < tile.num_queries; ++query) {
      references.select_query(tile.first_query + query);
      for (int64_t head = 0; head < tile.num_heads; ++head, grad += coordinates_per_pair) {
        for (int64_t i = 0; i < coordinates_per_pair; i += kWidth<T>) {
          const Vector<T> scaled = load(grad + i);
          // A point whose location is not finite has gradient 0, also where its box is infinite.
          const Vector<T> sizes = scaled != Vector<T>{} ? references.sizes(i) : Vector<T>{};
          store(grad + i, select_within_row<T>(scaled * sizes, i, coordinates_per_pair, scaled));
        }
      }
    }
  }

  template <int N>
  void sum_references(const Plan& plan, const PointReader<T>& reader, const Tile& tile,
                      const T* grad_locations, T* grad_references) {
    const int64_t coordinates_per_pair = N * plan.call.total_points;
    const int64_t elements_per_pair = plan.call.num_references * plan.call.reference_size();
    const PointTable<T>& table = point_table<T>(plan);
    tile.for_each_pair(plan, [&](int64_t pair, int64_t row, int64_t) {
      T* const target = grad_references + row * elements_per_pair;
      std::fill_n(target, elements_per_pair, T(0));
      const T* grad = grad_locations + pair * coordinates_per_pair;
      const T* offset = reader.points + row * coordinates_per_pair;
      for (int64_t i = 0; i < coordinates_per_pair; ++i) {
        T* const coordinate = target + table.reference_element[i];
        coordinate[0] += grad[i];
        if (plan.call.references_are_boxes && grad[i] != 0) {
          coordinate[N] += grad[i] * (offset[i] * table.offset_step[i]);
        }
      }
    });
  }

  Buffer<T> weights_, last_points_, last_weights_;
};
