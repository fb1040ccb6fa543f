// Stage zero of a fused call: from reference points, offsets and logits to locations and attention
// weights, unit by unit, in memory that stays in the caches; and its reverse.

// How the numbers of a query's reference points become those of its offsets: for each the
// coordinate that it starts from, and of boxes the size by which it is multiplied.
template <class T>
class References {
 public:
  References(const Problem& problem, const GivenPoints<T>& given)
      : first_(given.references),
        count_(problem.num_references * problem.reference_size()),
        end_(given.references + problem.total_queries() * count_),
        index_(point_table<T>(problem).reference_at.data()),
        axes_(problem.spatial_dims),
        boxes_(problem.references_are_boxes),
        short_(kPicks && count_ <= kWidth<T>) {}

  // To be called before the numbers of a query are asked for.
  SACCADE_INLINE void of_query(int64_t query) {
    numbers_ = first_ + query * count_;
    if (short_) {
      if (numbers_ + 2 * kWidth<T> > end_) {
        std::copy_n(numbers_, count_, copies_);
        numbers_ = copies_;
      }
      all_ = load(numbers_);
      // Sizes follow the coordinates of their box.
      sizes_ = boxes_ ? load(numbers_ + axes_) : all_;
    }
  }

  // Of the numbers from `at` on, counted in the offsets of a head.
  SACCADE_INLINE Vector<T> coordinates(int64_t at) const { return numbers(all_, at, 0); }
  SACCADE_INLINE Vector<T> sizes(int64_t at) const { return numbers(sizes_, at, axes_); }

 private:
  SACCADE_INLINE Vector<T> numbers(Vector<T> from, int64_t at, int64_t shift) const {
    if constexpr (kPicks) {
      if (short_) {
        return (Vector<T>)pick(from, index_ + at);
      }
    }
    T found[kWidth<T>];
    for (int lane = 0; lane < kWidth<T>; ++lane) {
      found[lane] = numbers_[index_[at + lane] + shift];
    }
    return load(found);
  }

  const T* const first_;
  const int64_t count_;
  const T* const end_;
  const int32_t* const index_;
  const int64_t axes_;
  const bool boxes_, short_;
  const T* numbers_ = nullptr;
  Vector<T> all_ = {}, sizes_ = {};
  T copies_[2 * kWidth<T>] = {};
};

template <class T>
class FusedPoints {
 public:
  static constexpr int64_t kRoom = kWidth<T> + 64 / sizeof(T);
  // Points that are made together, for the first-level cache to hold them.
  static constexpr int64_t kTogether = 512;

  // The points of a unit, look after look; zeros behind the last one, up to a whole vector. `to`
  // has room for kRoom more (times N, of locations).
  template <int N>
  void make(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
            PointCopies<T>& to) {
    // What does not change is taken out of the problem: the numbers written might be a part of it.
    const int64_t total_points = problem.total_points, num_heads = unit.num_heads;
    const int64_t of_query = num_heads * total_points, numbers = N * total_points;
    const int64_t all = problem.total_queries() * problem.num_heads * total_points;
    const int64_t count = unit.num_queries * of_query;
    const bool boxes = problem.references_are_boxes;
    const T* const step = point_table<T>(problem).offset_step.data();
    const int64_t to_next = problem.num_heads * total_points;
    int64_t from = unit.row(problem, 0) * total_points;
    References<T> references(problem, given);
    last_offsets_.reserve(N * of_query + kWidth<T>);
    last_logits_.reserve(of_query + kWidth<T>);
    T *location = &to.locations[0], *weight = &to.attention_weights[0];
    for (int64_t query = 0; query < unit.num_queries; ++query, from += to_next) {
      given.template fetch_ahead<N>(problem, unit, from);
      const T* offset = given.locations + N * from;
      const T* logit = given.attention_weights + from;
      if (from + of_query + kWidth<T> > all) {
        // Whole vectors of the last ones would reach beyond the end of what may be read.
        offset = std::copy_n(offset, N * of_query, &last_offsets_[0]) - N * of_query;
        logit = std::copy_n(logit, of_query, &last_logits_[0]) - of_query;
      }
      references.of_query(unit.first_query + query);
      for (int64_t head = 0; head < num_heads; ++head) {
        // Whole vectors: the numbers of the next look come afterwards.
        softmax_of_look(logit, weight, total_points);
        for (int64_t at = 0; at < numbers; at += kWidth<T>) {
          store(location + at, located(references, load(offset + at), step, at, boxes));
        }
        logit += total_points;
        weight += total_points;
        offset += numbers;
        location += numbers;
      }
    }
    std::fill_n(&to.locations[N * count], N * kWidth<T>, T(0));
    std::fill_n(&to.attention_weights[count], kWidth<T>, T(0));
  }

  // Whether each vector of a unit's points holds whole looks of one query: then it is made and
  // handed on at once, and what it waits for in memory is waited for while the one before is
  // located.
  static bool by_vectors(const Problem& problem, const Unit& unit) {
    return unit.num_heads * problem.total_points % kWidth<T> == 0 &&
           in_groups<T>(problem.total_points, [](auto) {});
  }

  // Calls run(locations, attention weights, in_period, at) for each vector, if by_vectors(). The
  // weights are made for some queries together: one softmax alone is a chain of steps that wait for
  // each other.
  template <int N, class Run>
  SACCADE_INLINE void for_each_vector(const Problem& problem, const GivenPoints<T>& given,
                                      const Unit& unit, Run run) {
    constexpr int64_t W = kWidth<T>;
    const int64_t total_points = problem.total_points;
    const int64_t of_query = unit.num_heads * total_points;
    const int64_t to_next = problem.num_heads * total_points;
    const int64_t together = std::max<int64_t>(kTogether / of_query, 1);
    const T* const step = point_table<T>(problem).offset_step.data();
    const bool boxes = problem.references_are_boxes;
    const int64_t first = unit.row(problem, 0) * total_points;
    weights_.reserve(together * of_query);
    T* const weights = &weights_[0];
    References<T> references(problem, given);
    T locations[N * W];
    int64_t at = 0;
    for (int64_t begin = 0; begin < unit.num_queries; begin += together) {
      const int64_t end = std::min(begin + together, unit.num_queries);
      T* weight = weights;
      for (int64_t query = begin; query < end; ++query, weight += of_query) {
        const int64_t from = first + query * to_next;
        given.template fetch_ahead<N>(problem, unit, from);
        copy_numbers(weight, given.attention_weights + from, of_query);
      }
      softmax_in_groups(weights, (end - begin) * unit.num_heads, total_points);
      weight = weights;
      for (int64_t query = begin; query < end; ++query) {
        const T* offset = given.locations + N * (first + query * to_next);
        references.of_query(unit.first_query + query);
        for (int64_t point = 0; point < of_query; point += W, at += W, weight += W) {
#pragma GCC unroll 3
          for (int n = 0; n < N; ++n, offset += W) {
            const int64_t in_look = n * W % (N * total_points);
            store(locations + n * W, located(references, load(offset), step, in_look, boxes));
          }
          run(locations, weight, 0, at);
        }
      }
    }
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
    const int64_t count = N * unit.num_looks() * total_points;
    const T* const step = point_table<T>(problem).offset_step.data();
    T* const grad = &grads.locations[0];
    InPeriod<T> in_period(N * total_points);
    for (int64_t at = 0; at < count; at += kWidth<T>) {
      store(grad + at, load(grad + at) * load(step + in_period.at));
      in_period.next();
    }
    if (problem.references_are_boxes) {
      multiply_by_sizes<N>(problem, given, unit, grad);
    }
  }

 private:
  // A vector of offsets, number `at` of those of a look on, as locations. Rounded step by step, as
  // the separate operations would be.
  static SACCADE_INLINE Vector<T> located(const References<T>& references, Vector<T> offsets,
                                          const T* step, int64_t at, bool boxes) {
    Vector<T> moved = offsets * load(step + at);
    if (boxes) {
      moved = moved * references.sizes(at);
    }
    return references.coordinates(at) + moved;
  }

  template <int N>
  void multiply_by_sizes(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
                         T* grad) {
    const int64_t numbers = N * problem.total_points;
    References<T> references(problem, given);
    for (int64_t query = 0; query < unit.num_queries; ++query) {
      references.of_query(unit.first_query + query);
      for (int64_t head = 0; head < unit.num_heads; ++head, grad += numbers) {
        for (int64_t at = 0; at < numbers; at += kWidth<T>) {
          const Vector<T> of_points = load(grad + at);
          // A point whose location is not finite has gradient 0, also where its box is infinite.
          const Vector<T> sizes = of_points != Vector<T>{} ? references.sizes(at) : Vector<T>{};
          const Vector<T> moved = of_points * sizes;
          store(grad + at, within_row<T>(moved, at, numbers, of_points));
        }
      }
    }
  }

  template <int N>
  void gather_references(const Problem& problem, const GivenPoints<T>& given, const Unit& unit,
                         const T* grad_locations, T* grad_references) {
    const int64_t count = N * problem.total_points;
    const int64_t of_look = problem.num_references * problem.reference_size();
    const PointTable<T>& of_call = point_table<T>(problem);
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

  Buffer<T> weights_, last_offsets_, last_logits_;
};
