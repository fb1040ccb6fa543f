// A call of the operator: its sizes and options, as the schema states them. It knows nothing of
// torch, of memory or of threads.
//
// Shapes: value [B, S, M or 1, D]; with the queries of all maps one after the other, points
// [T, M, P, N], weights [T, M, P], reference points [T, R, N or 2 N], output [T, M * D].
#pragma once

#include <cstdint>
#include <tuple>
#include <vector>

namespace saccade {

enum class Interpolation { linear, nearest, discrete };
// border_height clamps every axis to the height, as the first implementations of the discrete rule.
enum class Padding { zeros, border, border_height };
enum class Coordinates { normalized, normalized_corners, pixel };

// How values (and outputs and their gradients) are stored. Positions, weights and sums are float,
// for float64 values double: the *compute type*.
enum class Storage { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Level {
  int64_t depth, height, width;  // 1 for axes that the map does not have
  int64_t first_row;             // index of the level's first row (position) in the value
  int64_t first_point;           // index of the level's first point within a (query, head) pair
  int64_t num_points;

  // Lines of pixels, one after the other also from slice to slice of a volume.
  int64_t num_lines() const { return depth * height; }
  int64_t num_rows() const { return num_lines() * width; }

  auto tied() const { return std::tie(depth, height, width, first_row, first_point, num_points); }
  bool operator==(const Level& other) const { return tied() == other.tied(); }
};

struct Call {
  int64_t spatial_dims = 2;  // N: 1, 2 or 3
  int64_t batch_size = 0, num_positions = 0, num_heads = 0, value_heads = 0;
  int64_t head_dim = 0, total_points = 0;
  std::vector<Level> levels;
  // [B + 1]: the index of each map's first query, and the number of all queries.
  std::vector<int64_t> first_queries;
  // R reference points per query, 0 where the call has none: its points are then locations, else
  // offsets from the reference point that reference_index names for each of the P points.
  int64_t num_references = 0;
  bool references_are_boxes = false;
  std::vector<int32_t> reference_index;
  bool softmax = false;  // the weights are logits
  Interpolation interpolation = Interpolation::linear;
  Padding padding = Padding::zeros;
  Coordinates coordinates = Coordinates::normalized;
  Storage storage = Storage::float32;

  int64_t total_queries() const { return first_queries.back(); }
  int64_t num_queries(int64_t batch_index) const {
    return first_queries[batch_index + 1] - first_queries[batch_index];
  }
  bool has_references() const { return num_references > 0; }
  // Whether locations or weights have to be computed before they can be used.
  bool prepares_points() const { return has_references() || softmax; }
  // Elements of one reference point.
  int64_t reference_size() const { return spatial_dims * (references_are_boxes ? 2 : 1); }
  // Cells that one point reads.
  int64_t num_corners() const { return int64_t(1) << spatial_dims; }
  // The second stage knows points of up to four corners in one slice: in a volume a point is two.
  int64_t num_slices() const { return spatial_dims == 3 ? 2 : 1; }

  auto tied() const {
    return std::tie(spatial_dims, batch_size, num_positions, num_heads, value_heads, head_dim,
                    total_points, num_references, references_are_boxes, softmax, interpolation,
                    padding, coordinates, storage, levels, first_queries, reference_index);
  }
  bool operator==(const Call& other) const { return tied() == other.tied(); }
};

}  // namespace saccade
