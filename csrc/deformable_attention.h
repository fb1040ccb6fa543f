// The core of the CPU kernels: plain pointers, sizes and strides. Knows nothing of torch.
//
// For each head the operator is a sparse matrix, built on the fly from locations and weights, times
// the value matrix. Every kernel therefore has two stages: *points* turns locations into rows of
// the value and weights; *blend* (or, backwards, the dot products and the scatter) works on them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace saccade {

enum class Interpolation { linear, nearest, discrete };
// border_height clamps every axis to the height, as the first implementations of the discrete rule.
enum class Padding { zeros, border, border_height };
enum class Coordinates { normalized, normalized_corners, pixel };

// How values (and outputs and their gradients) are stored. Positions, weights and sums are float,
// for float64 values double.
enum class Storage { float32, float64, float16, bfloat16 };

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

struct Level {
  int64_t depth, height, width;  // 1 for axes that the map does not have
  int64_t first_row;             // of this level among the rows (positions) of the value
  int64_t first_point;           // of this level among the points of a query and head
  int64_t num_points;

  // Derived by Problem::prepare(): whether a head's rows of this level are copied together before
  // they are gathered from, and where among the rows copied.
  bool packed = false;
  int64_t first_packed_row = 0;
  bool fetched_ahead = false;  // whether rows in place are
  bool sorted = false;         // whether the backward sorts the points of this level by cell

  // Rows of pixels, one after the other also from slice to slice of a volume.
  int64_t num_lines() const { return depth * height; }
  int64_t num_rows() const { return num_lines() * width; }
};

// Constants of one axis for each point, repeated with period total_points so that a vector of
// points can be loaded starting anywhere in a query (see points.inl).
template <class T>
struct AxisTable {
  std::vector<T> scale, shift;  // pixel = location * scale + shift
  std::vector<T> last;          // the centre of the last pixel
  std::vector<T> base_limit;    // largest first cell of a pair of cells
  std::vector<T> pair;          // 1, or 0 where the axis has a single cell
};

template <class T>
struct PointTable {
  AxisTable<T> axes[3];  // x, y, z
  std::vector<int32_t> width;
  std::vector<int32_t> height;      // of volumes
  std::vector<int32_t> next_slice;  // of volumes: from a row to the same one of the next slice
  // Of fused calls, point after point, each with its axes: what an offset is multiplied by, and
  // where the coordinate that it starts from is among the numbers of a query's reference points.
  std::vector<T> offset_step;
  std::vector<int32_t> reference_at;
};

// Sizes and options of a call. Shapes: value [B, S, M or 1, D]; of all queries together, map after
// map: locations [T, M, P, N], weights [T, M, P], output [T, M * D].
struct Problem {
  int64_t spatial_dims = 2;  // N: 1, 2 or 3
  int64_t batch_size = 0, num_positions = 0, num_heads = 0, value_heads = 0;
  int64_t head_dim = 0, total_points = 0;
  std::vector<Level> levels;
  // [B + 1]: the first query of each map (batch item) among all queries, and their number.
  std::vector<int64_t> first_queries;
  // A fused call predicts from reference points [T, R, N] (boxes: 2 N) and offsets where to look:
  // R, 0 for a call that is given locations, and for each of P points the reference it starts from.
  int64_t num_references = 0;
  bool references_are_boxes = false;
  std::vector<int32_t> reference_index;
  Interpolation interpolation = Interpolation::linear;
  Padding padding = Padding::zeros;
  Coordinates coordinates = Coordinates::normalized;
  Storage storage = Storage::float32;

  // Derived by prepare().
  int64_t heads_together = 1;  // heads of a query that a unit of forward_units() takes: one or all
  int64_t chunk_queries = 0;
  std::vector<int64_t> first_chunks;  // [B + 1], as first_queries
  int64_t num_packed_rows = 0;        // of all levels, for one head
  bool own_grad_rows = false;  // sum a head's grad_value up in rows of its own, then write them out
  int64_t num_bands = 1;       // parts of each level's lines that own a piece of grad_value each
  int64_t scatter_queries = 0;  // whose points are sorted together
  bool stream_results = false;  // write large results past the caches
  PointTable<float> float_table;
  PointTable<double> double_table;

  // Derives the plan of the work from the sizes and the number of threads. The results do not
  // depend on that number: it only sets how many independent pieces there are.
  void prepare(int64_t num_threads);

  int64_t total_queries() const { return first_queries.back(); }
  int64_t num_queries(int64_t batch) const {
    return first_queries[batch + 1] - first_queries[batch];
  }
  bool is_fused() const { return num_references > 0; }
  // Numbers of one reference point.
  int64_t reference_size() const { return spatial_dims * (references_are_boxes ? 2 : 1); }

  // Whether the gradient of the value is summed up where it belongs.
  bool adds_in_place() const {
    return !own_grad_rows && (storage == Storage::float32 || storage == Storage::float64);
  }
  int64_t forward_units() const { return num_heads / heads_together * first_chunks.back(); }
  int64_t backward_points_units() const { return forward_units(); }
  int64_t backward_value_units() const { return batch_size * value_heads * num_bands; }
  // Gathered numbers of one forward unit: what parallelism is decided by.
  int64_t unit_cost() const {
    return chunk_queries * heads_together * total_points * num_corners() * head_dim;
  }
  // Cells that a point reads.
  int64_t num_corners() const { return int64_t(1) << spatial_dims; }
  // Stage two knows points of up to four corners in one slice: in a volume a point is two of them.
  int64_t num_slices() const { return spatial_dims == 3 ? 2 : 1; }
};

// The value map in memory; strides in elements, channels contiguous.
struct Value {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// The points of a call: locations [T, M, P, N] and attention weights [T, M, P]. Of a fused call the
// reference points [T, R, N or 2 N], the sampling offsets in place of the locations and the
// attention logits in place of the weights. Contiguous, in the compute type (float or double).
struct PointInputs {
  const void* reference_points;  // null unless fused
  const void* locations;
  const void* weights;
};

// Their gradients, alike; that of the reference points for each head by itself, [T, M, R, N or 2
// N], and null where nobody wants it.
struct PointGradients {
  void* reference_points;
  void* locations;
  void* weights;
};

// Each function works on units [begin, end); different units never write the same memory.
struct Kernels {
  const char* name;

  void (*forward)(const Problem&, const Value&, const PointInputs&, void* output, int64_t begin,
                  int64_t end);

  void (*backward_points)(const Problem&, const Value&, const void* grad_output, const PointInputs&,
                          const PointGradients&, int64_t begin, int64_t end);

  // Gradient of the value, contiguous [B, S, value_heads, D] in the storage type; zeroed before if
  // Problem::adds_in_place().
  void (*backward_value)(const Problem&, const void* grad_output, const PointInputs&,
                         void* grad_value, int64_t begin, int64_t end);
};

// The kernels in use. First call: SACCADE_CPU_ISA, else the best of the processor.
// Throws std::runtime_error when the environment variable names one that cannot run here.
const Kernels& active_kernels();
void set_active_kernels(const std::string& name);
// Names of the kernels this processor can run, fastest first.
std::vector<std::string> available_kernels();

}  // namespace saccade
