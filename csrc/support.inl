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
SACCADE_INLINE void copy_elements(S* target, const S* source, int64_t count) {
  // In pieces of fixed sizes: a call of memcpy costs as much as copying the few cache lines that a
  // row usually is.
  char* target_bytes = reinterpret_cast<char*>(target);
  const char* source_bytes = reinterpret_cast<const char*>(source);
  int64_t bytes = count * static_cast<int64_t>(sizeof(S));
  for (; bytes >= 64; bytes -= 64, target_bytes += 64, source_bytes += 64) {
    std::memcpy(target_bytes, source_bytes, 64);
  }
#pragma GCC unroll 5
  for (int64_t piece = 32; piece >= 2; piece /= 2) {
    if (bytes & piece) {
      std::memcpy(target_bytes, source_bytes, piece);
      target_bytes += piece;
      source_bytes += piece;
    }
  }
}

// Copies `count` elements in whole pieces of 64 bytes, up to 63 bytes more than requested, if
// `end` (of what may be read) allows it: a short row then takes no branches. `target` must have the
// capacity.
template <class S>
SACCADE_INLINE void copy_whole_pieces(S* target, const S* source, int64_t count, const S* end) {
  constexpr int64_t kPiece = 64 / sizeof(S);
  const int64_t rounded = (count + kPiece - 1) / kPiece * kPiece;
  if (source + rounded > end) {
    copy_elements(target, source, count);
    return;
  }
  for (int64_t i = 0; i < rounded; i += kPiece) {
    std::memcpy(target + i, source + i, 64);
  }
}

// A chunk of queries reads pieces of a tensor [T, M, ...] that lie one query apart. They are
// fetched far enough ahead to cover the way to memory, near enough to still be in the cache when
// needed.
constexpr int64_t kQueriesAhead = 16;
constexpr int64_t kPointsAhead = 256;

// Fetches the lines in which the elements lie into the second-level cache, which can have more
// requests under way than the first.
template <class S>
SACCADE_INLINE void prefetch(const S* first, int64_t count) {
  constexpr uintptr_t kLine = 64;
  const char* const end = reinterpret_cast<const char*>(first + count);
  const char* line = reinterpret_cast<const char*>(reinterpret_cast<uintptr_t>(first) & -kLine);
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
struct ComputeType {
  typedef float type;
};
template <>
struct ComputeType<double> {
  typedef double type;
};
template <class S>
using Compute = typename ComputeType<S>::type;

template <class T>
const PointTable<T>& point_table(const Plan& plan);
template <>
inline const PointTable<float>& point_table(const Plan& plan) {
  return plan.float_table;
}
template <>
inline const PointTable<double>& point_table(const Plan& plan) {
  return plan.double_table;
}

// A *(query, head) pair*, in short a pair, is one query seen by one head: the owner of P points and
// of D channels of the output. A tile is a range of consecutive queries of one map and of
// neighbouring heads; its pairs go query after query.
struct Tile {
  int64_t batch_index, first_head, num_heads;
  int64_t first_query;  // among the queries of all maps
  int64_t num_queries;

  int64_t num_pairs() const { return num_queries * num_heads; }

  // Index into tensors [T, M, ...] of the first pair of a query, which is counted within the tile.
  int64_t row(const Plan& plan, int64_t query) const {
    return (first_query + query) * plan.call.num_heads + first_head;
  }

  // Calls run(pair, row, head): the pair counted within the tile, its index into tensors
  // [T, M, ...], and its head counted from the first one.
  template <class Run>
  SACCADE_INLINE void for_each_pair(const Plan& plan, Run run) const {
    int64_t pair = 0;
    for (int64_t query = 0; query < num_queries; ++query) {
      const int64_t first = row(plan, query);
      for (int64_t head = 0; head < num_heads; ++head, ++pair) {
        run(pair, first + head, head);
      }
    }
  }
};

// Tiles are numbered map by map, and within a map head by head.
inline Tile get_tile(const Plan& plan, int64_t index) {
  const int64_t groups = plan.call.num_heads / plan.heads_per_tile;
  const std::vector<int64_t>& first = plan.first_chunks;
  // The last map whose chunks begin at or before this one: maps without queries have none.
  const int64_t batch_index =
      std::upper_bound(first.begin(), first.end(), index / groups) - first.begin() - 1;
  const int64_t index_in_map = index - groups * first[batch_index];
  const int64_t num_chunks = first[batch_index + 1] - first[batch_index];
  const int64_t query =
      plan.call.first_queries[batch_index] + index_in_map % num_chunks * plan.queries_per_chunk;
  return {batch_index, index_in_map / num_chunks * plan.heads_per_tile, plan.heads_per_tile, query,
          std::min(plan.queries_per_chunk, plan.call.first_queries[batch_index + 1] - query)};
}

// `count` elements in whole vectors.
template <class T>
int64_t round_up_to_vectors(int64_t count) {
  return (count + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}

// A thread gives back what a large buffer has beyond this when a call ends.
constexpr int64_t kMaxKeptBytes = int64_t(16) << 20;

// The rows of a tile's first head: those of the value, and the copies of its packed levels.
template <class S>
struct HeadRows {
  const S* value;
  int64_t stride;       // between the rows of the value
  int64_t head_stride;  // to the rows of the next head
  const S* packed;
};

template <class S>
class PackedRows {
 public:
  // Consecutive tiles of a head share one copy.
  HeadRows<S> rows(const Plan& plan, const Value& value, const Tile& tile) {
    const int64_t head = plan.call.value_heads > 1 ? tile.first_head : 0;
    const S* rows = static_cast<const S*>(value.data) + tile.batch_index * value.batch_stride +
                    head * value.head_stride;
    if (tile.batch_index != batch_index_ || head != head_) {
      packed_.reserve(plan.num_packed_rows * plan.call.head_dim);
      for (const PlannedLevel& level : plan.levels) {
        if (level.packed) {
          pack(rows + level.first_row * value.row_stride, value.row_stride, level.num_rows(),
               &packed_[level.first_packed_row * plan.call.head_dim], plan.call.head_dim);
        }
      }
      batch_index_ = tile.batch_index;
      head_ = head;
    }
    return {rows, value.row_stride, plan.call.value_heads > 1 ? value.head_stride : 0,
            packed_.data()};
  }

  // Must be called at the beginning and end of every call: the copy belongs to one value only.
  void invalidate() {
    batch_index_ = head_ = -1;
    packed_.release_if_above(kMaxKeptBytes / int64_t(sizeof(S)));
  }

 private:
  // Not inlined: among the variables of its caller the loop would run out of registers.
  __attribute__((noinline)) static void pack(const S* source, int64_t stride, int64_t num_rows,
                                             S* target, int64_t head_dim) {
    constexpr int64_t kRowsAhead = 16;
    const S* const last = source + (num_rows - 1) * stride;
    for (int64_t rest = num_rows; rest > 0; --rest, source += stride, target += head_dim) {
      prefetch(rest > kRowsAhead ? source + kRowsAhead * stride : last, head_dim);
      copy_elements(target, source, head_dim);
    }
  }

  Buffer<S> packed_;
  int64_t batch_index_ = -1, head_ = -1;
};

// A piece of a row: some whole vectors, or (Partial) a whole row shorter than one.
template <int NumVectors, bool IsPartial>
struct Block {
  static constexpr int NV = NumVectors;
  static constexpr bool Partial = IsPartial;
};

// Vector v of a block that begins at `row`. Blocks of several vectors are interleaved by two (see
// load_interleaved).
template <class S, class T, class Block>
SACCADE_INLINE Vector<T> load_block_vector(const S* row, int v, int64_t channels) {
  if (Block::Partial) {
    return load_partial<S, T>(row, channels);
  }
  return Block::NV == 1 ? load_as_compute(row)
                        : load_interleaved<S, T>(row + v / 2 * 2 * kWidth<T>, v % 2);
}

// Calls run(Block, slot, channel) for pieces of a row of `channels` elements, up to MaxVectors
// vectors at a time: `channel` is the piece's offset in the row, `slot` its offset in a buffer of
// whole vectors. If the row does not end with a whole vector, the last piece is the row's last
// whole vector, so that its first channels are visited a second time.
template <class T, int MaxVectors, class Run>
SACCADE_INLINE void for_blocks(int64_t channels, Run run) {
  constexpr int W = kWidth<T>;
  int64_t slot = 0;
  if constexpr (MaxVectors >= 4) {
    for (; slot + 4 * W <= channels; slot += 4 * W) {
      run(Block<4, false>{}, slot, slot);
    }
  }
  if constexpr (MaxVectors >= 2) {
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

// Converts a row of the compute type to the storage type.
template <class S, class T>
SACCADE_INLINE void write_elements(S* target, const T* source, int64_t count) {
  const auto run = [&](auto block, int64_t, int64_t channel) SACCADE_INLINE_LAMBDA {
    if (decltype(block)::Partial) {
      store_partial<S, T>(target, load_partial<T, T>(source, count), count);
    } else {
      store_from_compute(target + channel, load(source + channel));
    }
  };
  for_blocks<T, 1>(count, run);
}

// The same past the caches, for rows of whole cache lines.
template <class S, class T>
SACCADE_INLINE void stream_elements(S* target, const T* source, int64_t count) {
  for (int64_t i = 0; i < count; i += kWidth<T>) {
    stream_from_compute(target + i, load(source + i));
  }
}
