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
void append(AxisTable<T>& table, int64_t size, int64_t clamped_size, const Problem& problem) {
  switch (problem.coordinates) {
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
  if (problem.interpolation == Interpolation::discrete) {
    // It rounds a location times the size, which counts from the edge, as if from a centre.
    table.shift.back() += T(1);
  }
  table.last.push_back(round_down<T>(clamped_size - 1));
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
          const int64_t size = sizes[axis];
          const bool by_height = problem.padding == Padding::border_height;
          append(table.axes[axis], size, by_height ? std::min(size, level.height) : size, problem);
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

// An offset counts pixels of its level, or for boxes parts of the box.
template <class T>
void fill_offsets(PointTable<T>& table, const Problem& problem) {
  const int64_t period = problem.spatial_dims * problem.total_points;
  table.offset_step.reserve(period + kWidestVector);
  for (const Level& level : problem.levels) {
    const T share = static_cast<T>(0.5 / static_cast<double>(level.num_points));
    for (int64_t point = 0; point < level.num_points; ++point) {
      for (int64_t axis = 0; axis < problem.spatial_dims; ++axis) {
        const T pixels = table.axes[axis].scale[level.first_point];
        // Corners of a single pixel: wherever the location is, it is that pixel.
        const T step = pixels > 0 ? T(1) / pixels : T(0);
        table.offset_step.push_back(problem.references_are_boxes ? share : step);
        const int32_t reference = problem.reference_index[level.first_point + point];
        table.reference_at.push_back(
            static_cast<int32_t>(reference * problem.reference_size() + axis));
      }
    }
  }
  for (int64_t i = 0; i < kWidestVector; ++i) {
    table.offset_step.push_back(table.offset_step[i]);
    table.reference_at.push_back(table.reference_at[i]);
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
  int64_t most_queries = 0;
  for (int64_t batch = 0; batch < batch_size; ++batch) {
    most_queries = std::max(most_queries, num_queries(batch));
  }
  chunk_queries = std::max<int64_t>(std::min(chunk_queries, most_queries), 1);
  first_chunks.assign(1, 0);
  for (int64_t batch = 0; batch < batch_size; ++batch) {
    first_chunks.push_back(first_chunks.back() + divide_up(num_queries(batch), chunk_queries));
  }

  // A head's rows lie value_heads * head_dim apart, so that they share few sets of the caches.
  // Copied together they have them to themselves; that pays once the gathers outnumber the rows
  // clearly (from 1 to 2 a decoder gains a fifth, from 2 to 4 a little).
  constexpr int64_t kGathersPerRow = 4;
  // Rows in place of levels that the second-level cache holds need no fetching.
  constexpr int64_t kFetchedNumbers = 1 << 19;
  const int64_t queries_of_map = total_queries() / std::max<int64_t>(batch_size, 1);
  num_packed_rows = 0;
  for (Level& level : levels) {
    const int64_t rows = level.num_rows();
    level.packed = value_heads > 1 && !together &&
                   queries_of_map * level.num_points * num_corners() >= kGathersPerRow * rows;
    level.first_packed_row = num_packed_rows;
    num_packed_rows += level.packed ? rows : 0;
    level.fetched_ahead = !level.packed && rows * value_heads * head_dim >= kFetchedNumbers;
  }
  own_grad_rows = value_heads > 1 &&
                  queries_of_map * total_points * num_corners() >= kGathersPerRow * num_positions;

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
  scatter_queries = std::max<int64_t>(std::min(scatter_queries, most_queries), 1);
  for (Level& level : levels) {
    level.sorted = scatter_queries * level.num_points >= level.num_rows() / 2;
  }

  // Results that no cache keeps until they are read are written past them: a plain write would
  // first read what it overwrites.
  constexpr int64_t kStreamedNumbers = 1 << 20;
  stream_results = total_queries() * num_heads * head_dim >= kStreamedNumbers;

  const auto fill_tables = [&](auto& table) {
    fill(table, *this);
    if (is_fused()) {
      fill_offsets(table, *this);
    }
  };
  if (storage == Storage::float64) {
    fill_tables(double_table);
  } else {
    fill_tables(float_table);
  }
}

}  // namespace saccade
