// Memory and small helpers of the kernels.

// Memory that grows and is kept: the first touch of fresh pages costs more than the work on them.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

  void reserve(int64_t count) {
    if (count <= capacity_) {
      return;
    }
    constexpr std::size_t kAlignment = 64;
    const std::size_t bytes = (count * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
    std::free(data_);
    capacity_ = 0;
    data_ = static_cast<T*>(std::aligned_alloc(kAlignment, bytes));
    if (data_ == nullptr) {
      throw std::bad_alloc();
    }
    capacity_ = count;
  }

  // A buffer that one large call left behind is given back.
  void release_if_above(int64_t count) {
    if (capacity_ > count) {
      std::free(data_);
      data_ = nullptr;
      capacity_ = 0;
    }
  }

  T* data() { return data_; }
  T& operator[](int64_t index) { return data_[index]; }
  const T& operator[](int64_t index) const { return data_[index]; }

 private:
  T* data_ = nullptr;
  int64_t capacity_ = 0;
};

template <class S>
SACCADE_INLINE void copy_numbers(S* to, const S* from, int64_t count) {
  // In pieces of fixed sizes: a call of memcpy costs as much as copying the few cache lines that a
  // row usually is.
  char* target = reinterpret_cast<char*>(to);
  const char* source = reinterpret_cast<const char*>(from);
  int64_t bytes = count * static_cast<int64_t>(sizeof(S));
  for (; bytes >= 64; bytes -= 64, target += 64, source += 64) {
    std::memcpy(target, source, 64);
  }
#pragma GCC unroll 5
  for (int64_t piece = 32; piece >= 2; piece /= 2) {
    if (bytes & piece) {
      std::memcpy(target, source, piece);
      target += piece;
      source += piece;
    }
  }
}

// Copies `count` numbers in whole pieces of 64 bytes, up to 63 bytes more than asked for, where
// `end` (of what may be read) allows it: a short row then takes no branches. `to` must have the
// room.
template <class S>
SACCADE_INLINE void copy_numbers_roughly(S* to, const S* from, int64_t count, const S* end) {
  constexpr int64_t kPiece = 64 / sizeof(S);
  const int64_t rounded = (count + kPiece - 1) / kPiece * kPiece;
  if (from + rounded > end) {
    copy_numbers(to, from, count);
    return;
  }
  for (int64_t at = 0; at < rounded; at += kPiece) {
    std::memcpy(to + at, from + at, 64);
  }
}

// What a chunk of queries reads of a tensor [T, M, ...] lies in pieces, one head apart: fetched
// far enough ahead to cover the way to memory, near enough to still be in the cache when needed.
constexpr int64_t kQueriesAhead = 16;
constexpr int64_t kPointsAhead = 256;

// Fetches the lines in which the numbers lie, into the second-level cache, which has more requests
// under way than the first.
template <class S>
SACCADE_INLINE void prefetch(const S* from, int64_t count) {
  constexpr uintptr_t kLine = 64;
  const char* const end = reinterpret_cast<const char*>(from + count);
  const char* line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(from) & -kLine);
  for (; line < end; line += kLine) {
    __builtin_prefetch(line, 0, 2);
  }
}

// Whether rows of that many bytes, one after the other from `first` on, are whole cache lines: only
// those may be written past the caches, where a half-written line costs more than it saves.
inline bool fills_lines(const void* first, int64_t row_bytes) {
  return reinterpret_cast<uintptr_t>(first) % 64 == 0 && row_bytes % 64 == 0;
}

// The compute type of a storage type.
template <class S>
struct ComputeOf {
  typedef float type;
};
template <>
struct ComputeOf<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
const PointTable<T>& point_table(const Problem& problem);
template <>
inline const PointTable<float>& point_table(const Problem& problem) {
  return problem.float_table;
}
template <>
inline const PointTable<double>& point_table(const Problem& problem) {
  return problem.double_table;
}

// Consecutive queries of a map and some neighbouring heads of each. What one head of one query does
// is a look; the looks of a unit go query after query.
struct Unit {
  int64_t batch, first_head, num_heads;
  int64_t first_query;  // among all queries
  int64_t num_queries;

  int64_t num_looks() const { return num_queries * num_heads; }

  // Index into tensors [T, M, ...] of the first look of a query.
  int64_t row(const Problem& problem, int64_t query) const {
    return (first_query + query) * problem.num_heads + first_head;
  }

  // Calls run(look, row, head): counted within the unit, index into tensors [T, M, ...], counted
  // from the first head.
  template <class Run>
  SACCADE_INLINE void for_each_look(const Problem& problem, Run run) const {
    int64_t look = 0;
    for (int64_t query = 0; query < num_queries; ++query) {
      const int64_t first = row(problem, query);
      for (int64_t head = 0; head < num_heads; ++head, ++look) {
        run(look, first + head, head);
      }
    }
  }
};

// The unit of work of the kernels that go by queries: map by map, there head by head.
inline Unit unit_of(const Problem& problem, int64_t index) {
  const int64_t groups = problem.num_heads / problem.heads_together;
  const std::vector<int64_t>& first = problem.first_chunks;
  // The last map whose chunks begin at or before this one: maps without queries have none.
  const int64_t batch =
      std::upper_bound(first.begin(), first.end(), index / groups) - first.begin() - 1;
  const int64_t in_map = index - groups * first[batch];
  const int64_t num_chunks = first[batch + 1] - first[batch];
  const int64_t query = problem.first_queries[batch] + in_map % num_chunks * problem.chunk_queries;
  return {batch, in_map / num_chunks * problem.heads_together, problem.heads_together, query,
          std::min(problem.chunk_queries, problem.first_queries[batch + 1] - query)};
}

// Numbers in whole vectors.
template <class T>
int64_t whole_vectors(int64_t count) {
  return (count + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// What a thread keeps of a large buffer between calls.
constexpr int64_t kKeptBytes = int64_t(16) << 20;

// Where the rows of a unit's first head are: in the value, and the packed levels copied together.
template <class S>
struct HeadRows {
  const S* in_place;
  int64_t stride;       // of the rows in place
  int64_t head_stride;  // to the next head's
  const S* packed;
};

template <class S>
class PackedRows {
 public:
  // Consecutive units of a head find the copy of the first.
  HeadRows<S> rows(const Problem& problem, const Value& value, const Unit& unit) {
    const int64_t head = problem.value_heads > 1 ? unit.first_head : 0;
    const S* in_place = static_cast<const S*>(value.data) + unit.batch * value.batch_stride +
                        head * value.head_stride;
    if (unit.batch != batch_ || head != head_) {
      packed_.reserve(problem.num_packed_rows * problem.head_dim);
      for (const Level& level : problem.levels) {
        if (level.packed) {
          pack(in_place + level.first_row * value.row_stride, value.row_stride, level.num_rows(),
               level.first_packed_row, problem.head_dim);
        }
      }
      batch_ = unit.batch;
      head_ = head;
    }
    return {in_place, value.row_stride, problem.value_heads > 1 ? value.head_stride : 0,
            packed_.data()};
  }

  // To be called at the beginning and end of every call: the copy belongs to one value only.
  void forget() {
    batch_ = head_ = -1;
    packed_.release_if_above(kKeptBytes / int64_t(sizeof(S)));
  }

 private:
  void pack(const S* from, int64_t stride, int64_t num_rows, int64_t first, int64_t head_dim) {
    constexpr int64_t kRowsAhead = 16;
    for (int64_t row = 0; row < num_rows; ++row) {
      prefetch(from + std::min(row + kRowsAhead, num_rows - 1) * stride, head_dim);
      copy_numbers(&packed_[(first + row) * head_dim], from + row * stride, head_dim);
    }
  }

  Buffer<S> packed_;
  int64_t batch_ = -1, head_ = -1;
};

// A piece of a row: some whole vectors, or (Partial) a row shorter than a vector.
template <int NumVectors, bool IsPartial>
struct Block {
  static constexpr int NV = NumVectors;
  static constexpr bool Partial = IsPartial;
};

// Vector v of a block that begins at `row`. Blocks of several vectors go in pairs (see
// load_of_pair).
template <class S, class T, class Block>
SACCADE_INLINE Vector<T> load_of_block(const S* row, int v, int64_t channels) {
  if (Block::Partial) {
    return load_partial<S, T>(row, channels);
  }
  return Block::NV == 1 ? load_as_compute(row)
                        : load_of_pair<S, T>(row + v / 2 * 2 * kWidth<T>, v % 2);
}

// Calls run(Block, slot, channel) for pieces of a row of `channels` numbers, up to `Most` vectors
// at a time: `channel` is the first number of the piece in the row, `slot` its place in a buffer of
// whole vectors. Where the row does not end with a vector, the last piece is the row's last whole
// vector, so that its first numbers are visited a second time.
template <class T, int Most, class Run>
SACCADE_INLINE void for_blocks(int64_t channels, Run run) {
  constexpr int W = kWidth<T>;
  int64_t slot = 0;
  if constexpr (Most >= 4) {
    for (; slot + 4 * W <= channels; slot += 4 * W) {
      run(Block<4, false>{}, slot, slot);
    }
  }
  if constexpr (Most >= 2) {
    for (; slot + 2 * W <= channels; slot += 2 * W) {
      run(Block<2, false>{}, slot, slot);
    }
  }
  for (; slot + W <= channels; slot += W) {
    run(Block<1, false>{}, slot, slot);
  }
  if (slot < channels) {
    if (channels < W) {
      run(Block<1, true>{}, slot, slot);
    } else {
      run(Block<1, false>{}, slot, channels - W);
    }
  }
}

// From a row of the compute type to one as it is stored.
template <class S, class T>
SACCADE_INLINE void write_numbers(S* to, const T* from, int64_t count) {
  const auto run = [&](auto block, int64_t, int64_t channel) SACCADE_INLINE_LAMBDA {
    if (decltype(block)::Partial) {
      store_partial<S, T>(to, load_partial<T, T>(from, count), count);
    } else {
      store_from_compute(to + channel, load(from + channel));
    }
  };
  for_blocks<T, 1>(count, run);
}

// The same past the caches, for rows of whole cache lines.
template <class S, class T>
SACCADE_INLINE void stream_numbers(S* to, const T* from, int64_t count) {
  for (int64_t at = 0; at < count; at += kWidth<T>) {
    stream_from_compute(to + at, load(from + at));
  }
}
