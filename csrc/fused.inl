// Stage zero of a fused call: from reference points, offsets and logits to locations and attention
// weights, unit by unit, in memory that stays in the caches; and its reverse.

// The reference points of a query: for each number of an offset the coordinate that it starts from,
// and of boxes the size by which it is multiplied.
template <class T>
class QueryReferences {
 public:
  QueryReferences(const Problem& problem, const GivenPoints<T>& given, int64_t query)
      : table_(point_table<T>(problem)), axes_(problem.spatial_dims) {
    const int64_t count = problem.num_references * problem.reference_size();
    const T* const end = given.references + problem.total_queries() * count;
    numbers_ = given.references + query * count;
    short_ = kPicks && count <= kWidth<T>;
    if (short_) {
      if (numbers_ + kWidth<T> > end) {
        std::copy_n(numbers_, count, copies_);
        numbers_ = copies_;
      }
      all_ = load(numbers_);
      // Sizes follow the coordinates of their box.
      sizes_ = problem.references_are_boxes ? following(all_, axes_) : all_;
    }
  }

  // Of the numbers from `at` on, counted in the offsets of a head.
  SACCADE_INLINE Vector<T> coordinates(int64_t at) const { return numbers(all_, at, 0); }
  SACCADE_INLINE Vector<T> sizes(int64_t at) const { return numbers(sizes_, at, axes_); }

 private:
  SACCADE_INLINE Vector<T> numbers(Vector<T> from, int64_t at, int64_t shift) const {
    const int32_t* const index = &table_.reference_at[at];
    if (short_) {
      return (Vector<T>)pick(from, index);
    }
    T found[kWidth<T>];
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      found[lane] = numbers_[index[lane] + shift];
    }
    return load(found);
  }

  // Each lane the number so many lanes further on; the last ones, which are no coordinates, any.
  static Vector<T> following(Vector<T> v, int64_t shift) {
    T numbers[2 * kWidth<T>] = {};
    store(numbers, v);
    return load(numbers + shift);
  }

  const PointTable<T>& table_;
  int64_t axes_;
  const T* numbers_;
  bool short_;
  Vector<T> all_ = {}, sizes_ = {};
  T copies_[kWidth<T>] = {};
};

template <class T>
class FusedPoints {
 public:
  static constexpr int64_t kRoom = kWidth<T> + 64 / sizeof(T);

  // The points of a unit, look after look; zeros behind the last one, up to a whole vector. There
  // is room for kRoom more (times N, of locations).
  template <int N>
  void make(const Problem& problem, const GivenPoints<T>& given, const Unit& unit, T* locations,
            T* weights) {
    const int64_t total_points = problem.total_points, of_query = unit.num_heads * total_points;
    const int64_t all = problem.total_queries() * problem.num_heads * total_points;
    const int64_t count = unit.num_queries * of_query;
    last_offsets_.reserve(N * of_query + kWidth<T>);
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      const int64_t from = unit.row(problem, query) * total_points, at = query * of_query;
      given.template fetch_ahead<N>(problem, unit, from);
      copy_numbers_roughly(weights + at, given.attention_weights + from, of_query,
                           given.attention_weights + all);
      const T* offsets = given.locations + N * from;
      if (offsets + N * of_query + kWidth<T> > given.locations + N * all) {
        // Whole vectors of the last ones would reach beyond the end of what may be read.
        std::copy_n(offsets, N * of_query, &last_offsets_[0]);
        offsets = &last_offsets_[0];
      }
      const QueryReferences<T> references(problem, given, unit.first_query + query);
      for (int64_t head = 0; head < unit.num_heads; ++head) {
        const int64_t first = N * head * total_points;
        locate_look<N>(problem, references, offsets + first, locations + N * at + first);
      }
    }
    std::fill_n(locations + N * count, N * kWidth<T>, T(0));
    std::fill_n(weights + count, kWidth<T>, T(0));
    softmax(weights, unit.num_looks(), total_points);
    std::fill_n(weights + count, kWidth<T>, T(0));
  }

  // In place: from the gradients of a unit's locations and weights to those of offsets and logits.
  // `grad_references` is [T, M, R, N or 2 N], null if nobody wants it.
  template <int N>
  void reverse(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
               const PointCopies<T>& points, PointCopies<T>& grads, T* grad_references) {
    const int64_t total_points = problem.total_points;
    softmax_backward(&points.attention_weights[0], &grads.attention_weights[0], unit.num_looks(),
                     total_points);
    if (grad_references != nullptr) {
      gather_references<N>(problem, given, unit, &grads.locations[0], grad_references);
    }
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      const QueryReferences<T> references(problem, given, unit.first_query + query);
      for (int64_t head = 0; head < unit.num_heads; ++head) {
        const int64_t look = query * unit.num_heads + head;
        reverse_look<N>(problem, references, &grads.locations[N * look * total_points]);
      }
    }
  }

 private:
  static const PointTable<T>& table(const Problem& problem) { return point_table<T>(problem); }

  // Writes whole vectors: the numbers of the next look come afterwards.
  template <int N>
  SACCADE_INLINE void locate_look(const Problem& problem, const QueryReferences<T>& references,
                                  const T* offsets, T* locations) {
    const T* const step = &table(problem).offset_step[0];
    for (int64_t at = 0; at < N * problem.total_points; at += kWidth<T>) {
      // Rounded step by step, as the separate operations would be.
      Vector<T> moved = load(offsets + at) * load(step + at);
      if (problem.references_are_boxes) {
        moved = moved * references.sizes(at);
      }
      store(locations + at, references.coordinates(at) + moved);
    }
  }

  template <int N>
  SACCADE_INLINE void reverse_look(const Problem& problem, const QueryReferences<T>& references,
                                   T* grads) {
    const int64_t count = N * problem.total_points;
    const T* const step = &table(problem).offset_step[0];
    for (int64_t at = 0; at < count; at += kWidth<T>) {
      const Vector<T> grad = load_in_row(grads, at, count, T(0));
      Vector<T> moved = grad * load(step + at);
      if (problem.references_are_boxes) {
        // A point whose location is not finite has gradient 0, also where its box is infinite.
        moved = grad != Vector<T>{} ? moved * references.sizes(at) : grad;
      }
      store_in_row(grads, at, count, moved);
    }
  }

  template <int N>
  void gather_references(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
                         const T* grad_locations, T* grad_references) {
    const int64_t count = N * problem.total_points;
    const int64_t of_look = problem.num_references * problem.reference_size();
    const PointTable<T>& of_call = table(problem);
    unit.for_each_look(problem, [&](int64_t look, int64_t row, int64_t) {
      T* const to = grad_references + row * of_look;
      std::fill_n(to, of_look, T(0));
      const T* grad = grad_locations + look * count;
      const T* offset = given.locations + row * count;
      for (int64_t i = 0; i < count; ++i) {
        T* const coordinate = to + of_call.reference_at[i];
        coordinate[0] += grad[i];
        if (problem.references_are_boxes && grad[i] != 0) {
          coordinate[N] += grad[i] * (offset[i] * of_call.offset_step[i]);
        }
      }
    });
  }

  Buffer<T> last_offsets_;
};
