// How a call is carried out: everything that is derived from its sizes and options and the number
// of threads. The results do not depend on a plan: it only sets how the work is divided and which
// of several ways, equal in their results, is the faster one.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "call.h"

namespace saccade {

struct PlannedLevel : Level {
  // Whether a head's rows of this level are copied together before they are gathered from, and the
  // index of the first one among all rows copied.
  bool packed = false;
  int64_t first_packed_row = 0;
  bool fetched_ahead = false;  // whether rows that are read from the value itself are prefetched
  bool sorted = false;         // whether the backward sorts the points of this level by cell
};

// Constants of one axis for each point, repeated with period total_points so that a vector of
// points can be loaded starting anywhere in a (query, head) pair (see corners.inl).
template <class T>
struct AxisTable {
  std::vector<T> scale, shift;   // pixel = location * scale + shift
  std::vector<T> last_pixel;     // the centre of the last pixel
  std::vector<T> max_base;       // the largest lower cell of two neighbouring cells
  std::vector<T> has_neighbour;  // 1, or 0 where the axis has a single cell
};

template <class T>
struct PointTable {
  AxisTable<T> axes[3];  // x, y, z
  std::vector<int32_t> width;
  std::vector<int32_t> height;      // of volumes
  std::vector<int32_t> slice_step;  // of volumes: from a row to the same row of the next slice
  // With reference points, point after point and axis after axis: the factor of an offset, and
  // which of a query's reference elements holds the coordinate that the offset starts from.
  std::vector<T> offset_step;
  std::vector<int32_t> reference_element;
};

// A *tile* is the unit of work of the kernels that go by queries: a chunk of consecutive queries of
// one map, and one head or all heads of each.
struct Plan {
  Call call;
  int64_t num_threads = 1;

  std::vector<PlannedLevel> levels;  // those of the call
  int64_t heads_per_tile = 1;
  int64_t queries_per_chunk = 1;
  std::vector<int64_t> first_chunks;  // [B + 1]: each map's first chunk, and the number of all
  int64_t num_packed_rows = 0;        // of all levels, for one head
  // Whether a head's grad_value is summed up in rows of its own, which are then written out.
  bool accumulates_per_head = false;
  int64_t num_bands = 1;  // parts of each level's lines that own a piece of grad_value each
  int64_t queries_per_scatter = 1;  // whose points are sorted together
  bool streams_results = false;     // large results are written past the caches
  PointTable<float> float_table;
  PointTable<double> double_table;

  // Whether the gradient of the value is summed up in the result itself.
  bool adds_in_place() const {
    return !accumulates_per_head &&
           (call.storage == Storage::float32 || call.storage == Storage::float64);
  }
  int64_t num_tiles() const { return call.num_heads / heads_per_tile * first_chunks.back(); }
  int64_t num_value_tasks() const { return call.batch_size * call.value_heads * num_bands; }
  // Values that one tile gathers, by which the work is divided among threads. 64 bits do not hold
  // the product of all sizes.
  double tile_cost() const {
    return static_cast<double>(queries_per_chunk * heads_per_tile * call.total_points) *
           static_cast<double>(call.num_corners() * call.head_dim);
  }
};

Plan make_plan(Call call, int64_t num_threads);

// The plan of an equal call for as many threads, from a bounded cache that all threads share.
std::shared_ptr<const Plan> find_plan(Call&& call, int64_t num_threads);

}  // namespace saccade
