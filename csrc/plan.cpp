#include "plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace saccade {
namespace {

// No vector type is wider; the tables are this much longer than a period.
constexpr int64_t kMaxVectorWidth = 16;

int64_t divide_up(int64_t dividend, int64_t divisor) { return (dividend + divisor - 1) / divisor; }

// The predicates below decide between ways that give the same results. Each bound is a number of
// elements (float32: 4 bytes), from measurements on x86-64 servers with 32 to 48 KiB of first-level
// and 1 to 2 MiB of second-level cache per core.

// Heads are usually taken one after the other, so that the rows of a head stay in the caches. But
// few points fill neither a cache line nor a vector: then the points of all heads of a query, which
// lie side by side, are read once, and their rows from the value itself.
bool takes_heads_together(const Call& call) {
  constexpr int64_t kMaxPoints = 8, kMaxChannels = 32;
  return call.total_points <= kMaxPoints && call.head_dim <= kMaxChannels;
}

int64_t find_max_queries(const Call& call) {
  int64_t max_queries = 0;
  for (int64_t batch_index = 0; batch_index < call.batch_size; ++batch_index) {
    max_queries = std::max(max_queries, call.num_queries(batch_index));
  }
  return max_queries;
}

// The corners and sums of a chunk stay in the first- and second-level caches. A (query, head) pair
// has head_dim sums, and for each point four weights, a row and what it is made from: about 8.
int64_t choose_queries_per_chunk(const Call& call, int64_t heads_per_tile) {
  constexpr int64_t kChunkElements = 1 << 15;
  constexpr int64_t kMinPairs = 16, kMaxPairs = 256;
  const int64_t pairs = kChunkElements / (call.head_dim + 8 * call.total_points);
  const int64_t queries = std::min(std::max(pairs, kMinPairs), kMaxPairs) / heads_per_tile;
  return std::max<int64_t>(std::min(queries, find_max_queries(call)), 1);
}

// Whether `num_points` points per (query, head) pair read so much more often than there are rows
// that moving the rows pays. The rows of a head lie value_heads * head_dim elements apart, so that
// they share few sets of the caches; next to each other they use all of them. From a bound of 1 to
// one of 2 gathers per row a decoder gains a fifth, from 2 to 4 a little.
bool gathers_outnumber_rows(const Call& call, int64_t num_points, int64_t num_rows) {
  constexpr int64_t kMinGathersPerRow = 4;
  const int64_t queries_per_map = call.total_queries() / std::max<int64_t>(call.batch_size, 1);
  return queries_per_map * num_points * call.num_corners() >= kMinGathersPerRow * num_rows;
}

bool is_packed(const Call& call, const Level& level) {
  return call.value_heads > 1 && !takes_heads_together(call) &&
         gathers_outnumber_rows(call, level.num_points, level.num_rows());
}

// The same for the gradient of the value: whether a head's rows are summed up next to each other.
bool accumulates_per_head(const Call& call) {
  return call.value_heads > 1 &&
         gathers_outnumber_rows(call, call.total_points, call.num_positions);
}

// Rows of a level that the second-level cache holds (2 MiB of float32) need no prefetching.
bool exceeds_cache(const Call& call, const Level& level) {
  constexpr int64_t kMaxCachedElements = 1 << 19;
  return level.num_rows() * call.value_heads * call.head_dim >= kMaxCachedElements;
}

// The gradient of the value is owned by (map, head, band of the lines of every level): there are as
// many bands as it takes for all threads to own something, but none without lines.
int64_t choose_num_bands(const Call& call, int64_t num_threads) {
  const int64_t num_owners = std::max<int64_t>(call.batch_size * call.value_heads, 1);
  int64_t max_bands = 1;
  for (const Level& level : call.levels) {
    max_bands = std::max(max_bands, level.num_lines());
  }
  return std::min(divide_up(num_threads, num_owners), max_bands);
}

// Points of one cell add to the same four rows: sorted by cell, they are summed up in registers.
// The more queries are sorted together, the more points a cell has, as long as their weights and
// gradients stay in the second-level cache (1 MiB of float32).
int64_t choose_queries_per_scatter(const Call& call) {
  constexpr int64_t kScatterElements = 1 << 18;
  const int64_t queries = kScatterElements / (call.head_dim + 6 * call.total_points);
  return std::max<int64_t>(std::min(queries, find_max_queries(call)), 1);
}

// Sorting takes a pass over the cells: it needs at least one point for every second cell.
bool is_sorted(const Level& level, int64_t queries_per_scatter) {
  return queries_per_scatter * level.num_points >= level.num_rows() / 2;
}

// A result that no cache keeps until it is read (4 MiB of float32) is written past the caches: a
// plain write would first read what it overwrites.
bool exceeds_streaming_bound(const Call& call) {
  constexpr int64_t kMinStreamedElements = 1 << 20;
  return call.total_queries() * call.num_heads * call.head_dim >= kMinStreamedElements;
}

// The largest T that is not above `size`: sizes beyond T's exact integers must not round up.
template <class T>
T round_down(int64_t size) {
  T rounded = static_cast<T>(size);
  // 2^63 is out of range for the comparison below; sizes are far smaller (checked by the caller).
  if (static_cast<int64_t>(rounded) > size) {
    rounded = std::nextafter(rounded, T(0));
  }
  return rounded;
}

template <class T>
void append(AxisTable<T>& table, int64_t size, int64_t clamped_size, const Call& call) {
  switch (call.coordinates) {
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
  if (call.interpolation == Interpolation::discrete) {
    // It rounds a location times the size, which counts from the edge, as if from a centre.
    table.shift.back() += T(1);
  }
  table.last_pixel.push_back(round_down<T>(clamped_size - 1));
  table.max_base.push_back(round_down<T>(std::max<int64_t>(size - 2, 0)));
  table.has_neighbour.push_back(size > 1 ? T(1) : T(0));
}

template <class T>
void fill(PointTable<T>& table, const Call& call) {
  const int64_t capacity = 2 * call.total_points + kMaxVectorWidth;
  for (int64_t n = 0; n < call.spatial_dims; ++n) {
    AxisTable<T>& axis = table.axes[n];
    for (std::vector<T>* column :
         {&axis.scale, &axis.shift, &axis.last_pixel, &axis.max_base, &axis.has_neighbour}) {
      column->reserve(capacity);
    }
  }
  table.width.reserve(capacity);
  const bool has_slices = call.spatial_dims == 3;
  if (has_slices) {
    table.height.reserve(capacity);
    table.slice_step.reserve(capacity);
  }
  int64_t num_filled = 0;
  while (num_filled < call.total_points + kMaxVectorWidth) {
    for (const Level& level : call.levels) {
      for (int64_t point = 0; point < level.num_points; ++point, ++num_filled) {
        const int64_t sizes[] = {level.width, level.height, level.depth};
        for (int64_t axis = 0; axis < call.spatial_dims; ++axis) {
          const int64_t size = sizes[axis];
          const bool by_height = call.padding == Padding::border_height;
          append(table.axes[axis], size, by_height ? std::min(size, level.height) : size, call);
        }
        table.width.push_back(static_cast<int32_t>(level.width));
        if (has_slices) {
          const int64_t slice_step = level.depth > 1 ? level.height * level.width : 0;
          table.height.push_back(static_cast<int32_t>(level.height));
          table.slice_step.push_back(static_cast<int32_t>(slice_step));
        }
      }
    }
  }
}

// An offset counts pixels of its level, or for boxes parts of the box.
template <class T>
void fill_offsets(PointTable<T>& table, const Call& call) {
  const int64_t period = call.spatial_dims * call.total_points;
  table.offset_step.reserve(period + kMaxVectorWidth);
  table.reference_element.reserve(period + kMaxVectorWidth);
  for (const Level& level : call.levels) {
    const T box_step = static_cast<T>(0.5 / static_cast<double>(level.num_points));
    for (int64_t point = 0; point < level.num_points; ++point) {
      for (int64_t axis = 0; axis < call.spatial_dims; ++axis) {
        const T pixels = table.axes[axis].scale[level.first_point];
        // With the corners of a single pixel, all locations coincide: the step is 0.
        const T pixel_step = pixels > 0 ? T(1) / pixels : T(0);
        table.offset_step.push_back(call.references_are_boxes ? box_step : pixel_step);
        const int32_t reference = call.reference_index[level.first_point + point];
        table.reference_element.push_back(
            static_cast<int32_t>(reference * call.reference_size() + axis));
      }
    }
  }
  for (int64_t i = 0; i < kMaxVectorWidth; ++i) {
    table.offset_step.push_back(table.offset_step[i]);
    table.reference_element.push_back(table.reference_element[i]);
  }
}

template <class T>
void fill_tables(PointTable<T>& table, const Call& call) {
  fill(table, call);
  if (call.has_references()) {
    fill_offsets(table, call);
  }
}

}  // namespace

Plan make_plan(Call call_to_plan, int64_t num_threads) {
  Plan plan;
  plan.call = std::move(call_to_plan);
  plan.num_threads = num_threads;
  const Call& call = plan.call;
  plan.heads_per_tile = takes_heads_together(call) ? call.num_heads : 1;
  plan.queries_per_chunk = choose_queries_per_chunk(call, plan.heads_per_tile);
  plan.first_chunks.reserve(call.batch_size + 1);
  plan.first_chunks.push_back(0);
  for (int64_t batch_index = 0; batch_index < call.batch_size; ++batch_index) {
    plan.first_chunks.push_back(plan.first_chunks.back() +
                                divide_up(call.num_queries(batch_index), plan.queries_per_chunk));
  }
  plan.queries_per_scatter = choose_queries_per_scatter(call);
  plan.levels.reserve(call.levels.size());
  for (const Level& level : call.levels) {
    PlannedLevel planned;
    static_cast<Level&>(planned) = level;
    planned.packed = is_packed(call, level);
    planned.first_packed_row = plan.num_packed_rows;
    plan.num_packed_rows += planned.packed ? level.num_rows() : 0;
    planned.fetched_ahead = !planned.packed && exceeds_cache(call, level);
    planned.sorted = is_sorted(level, plan.queries_per_scatter);
    plan.levels.push_back(planned);
  }
  plan.accumulates_per_head = accumulates_per_head(call);
  plan.num_bands = choose_num_bands(call, num_threads);
  plan.streams_results = exceeds_streaming_bound(call);
  if (call.storage == Storage::float64) {
    fill_tables(plan.double_table, call);
  } else {
    fill_tables(plan.float_table, call);
  }
  return plan;
}

}  // namespace saccade
