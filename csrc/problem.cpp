#include <algorithm>
#include <cmath>
#include <limits>

#include "deformable_attention.h"

namespace saccade {
namespace {

// No vector type is wider; the tables are this much longer than a period.
constexpr int64_t kWidestVector = 16;

// The largest T that is not above `number`: sizes beyond T's exact integers must not round up.
template <class T>
T round_down(int64_t number) {
  T rounded = static_cast<T>(number);
  // 2^63 is out of range for the comparison below; sizes are far smaller (checked by the caller).
  if (static_cast<int64_t>(rounded) > number) {
    rounded = std::nextafter(rounded, T(0));
  }
  return rounded;
}

template <class T>
void append(AxisTable<T>& table, int64_t size, Coordinates coordinates) {
  switch (coordinates) {
    case Coordinates::normalized:
      table.scale.push_back(static_cast<T>(size));
      table.shift.push_back(T(-0.5));
      break;
    case Coordinates::normalized_corners:
      table.scale.push_back(static_cast<T>(size - 1));
      table.shift.push_back(T(0));
      break;
    case Coordinates::pixel:
      table.scale.push_back(T(1));
      table.shift.push_back(T(0));
      break;
  }
  table.last.push_back(round_down<T>(size - 1));
  table.base_limit.push_back(round_down<T>(std::max<int64_t>(size - 2, 0)));
  table.pair.push_back(size > 1 ? T(1) : T(0));
}

template <class T>
void fill(PointTable<T>& table, const Problem& problem) {
  const int64_t room = 2 * problem.total_points + kWidestVector;
  for (int64_t n = 0; n < problem.spatial_dims; ++n) {
    AxisTable<T>& axis = table.axes[n];
    for (std::vector<T>* column :
         {&axis.scale, &axis.shift, &axis.last, &axis.base_limit, &axis.pair}) {
      column->reserve(room);
    }
  }
  table.width.reserve(room);
  const bool volumes = problem.spatial_dims == 3;
  if (volumes) {
    table.height.reserve(room);
    table.next_slice.reserve(room);
  }
  int64_t filled = 0;
  while (filled < problem.total_points + kWidestVector) {
    for (const Level& level : problem.levels) {
      for (int64_t point = 0; point < level.num_points; ++point, ++filled) {
        const int64_t sizes[] = {level.width, level.height, level.depth};
        for (int64_t axis = 0; axis < problem.spatial_dims; ++axis) {
          append(table.axes[axis], sizes[axis], problem.coordinates);
        }
        table.width.push_back(static_cast<int32_t>(level.width));
        if (volumes) {
          const int64_t slice = level.depth > 1 ? level.height * level.width : 0;
          table.height.push_back(static_cast<int32_t>(level.height));
          table.next_slice.push_back(static_cast<int32_t>(slice));
        }
      }
    }
  }
}

int64_t divide_up(int64_t number, int64_t by) { return (number + by - 1) / by; }

}  // namespace

void Problem::prepare(int64_t num_threads) {
  // Heads one after the other, for their rows to stay in the caches. But few points fill neither a
  // cache line nor a vector: those of all heads together are fetched once, and read in place.
  constexpr int64_t kFewPoints = 8, kFewChannels = 32;
  const bool together = total_points <= kFewPoints && head_dim <= kFewChannels;
  heads_together = together ? num_heads : 1;

  // A chunk's points and sums stay in the first- and second-level caches.
  constexpr int64_t kChunkNumbers = 1 << 15;
  const int64_t looks = kChunkNumbers / (head_dim + 8 * total_points);
  chunk_queries = std::min<int64_t>(std::max<int64_t>(looks, 16), 256) / heads_together;
  chunk_queries = std::max<int64_t>(std::min(chunk_queries, num_queries), 1);
  num_chunks = divide_up(num_queries, chunk_queries);

  // A head's rows lie value_heads * head_dim apart, so that they share few sets of the caches.
  // Copied together they have them to themselves; that pays once the gathers outnumber the rows
  // clearly (from 1 to 2 a decoder gains a fifth, from 2 to 4 a little).
  constexpr int64_t kGathersPerRow = 4;
  // Rows in place of levels that the second-level cache holds need no fetching.
  constexpr int64_t kFetchedNumbers = 1 << 19;
  num_packed_rows = 0;
  for (Level& level : levels) {
    const int64_t rows = level.num_rows();
    level.packed = value_heads > 1 && !together &&
                   num_queries * level.num_points * num_corners() >= kGathersPerRow * rows;
    level.first_packed_row = num_packed_rows;
    num_packed_rows += level.packed ? rows : 0;
    level.fetched_ahead = !level.packed && rows * value_heads * head_dim >= kFetchedNumbers;
  }
  own_grad_rows = value_heads > 1 &&
                  num_queries * total_points * num_corners() >= kGathersPerRow * num_positions;

  // Ownership of grad_value goes by batch and head, then by bands of the lines of every level.
  const int64_t owners = std::max<int64_t>(batch_size * value_heads, 1);
  int64_t most_bands = 1;
  for (const Level& level : levels) {
    most_bands = std::max(most_bands, level.num_lines());
  }
  num_bands = std::min(divide_up(num_threads, owners), most_bands);

  // Points of one cell add to the same four rows: sorted by cell they are summed up in registers.
  // The more queries are sorted together the more points a cell has, as long as their weights and
  // gradients stay in the second-level cache.
  constexpr int64_t kScatterNumbers = 1 << 18;
  scatter_queries = kScatterNumbers / (head_dim + 6 * total_points);
  scatter_queries = std::max<int64_t>(std::min(scatter_queries, num_queries), 1);
  for (Level& level : levels) {
    level.sorted = scatter_queries * level.num_points >= level.num_rows() / 2;
  }

  // Results that no cache keeps until they are read are written past them: a plain write would
  // first read what it overwrites.
  constexpr int64_t kStreamedNumbers = 1 << 20;
  stream_results = batch_size * num_queries * num_heads * head_dim >= kStreamedNumbers;

  if (storage == Storage::float64) {
    fill(double_table, *this);
  } else {
    fill(float_table, *this);
  }
}

}  // namespace saccade
