// The kernels of one instruction set, behind plain pointers, sizes and strides.
//
// For each head the operator is a sparse matrix, built on the fly from locations and weights, times
// the value matrix. Every kernel therefore has two stages: *points* turns locations into
// corners, rows of the value with weights; *blend* (or, backwards, the dot products and the
// scatter) works on them.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "plan.h"

namespace saccade {

// The value map in memory; strides in elements, channels contiguous.
struct Value {
  const void* data;
  int64_t batch_stride, row_stride, head_stride;
};

// Contiguous tensors in the compute type (float or double), shaped as call.h says.
struct PointInputs {
  const void* reference_points;  // null unless the call has reference points
  const void* points;            // locations, or offsets from the reference points
  const void* weights;           // attention weights, or logits
};

// Gradients of the same shapes, except that of the reference points, which is kept apart for each
// head, [T, M, R, N or 2 N], and is null where it is not needed.
struct PointGradients {
  void* reference_points;
  void* points;
  void* weights;
};

// Each function works on tiles (tasks) [begin, end); two of them never write the same memory.
struct Kernels {
  const char* name;

  void (*forward)(const Plan&, const Value&, const PointInputs&, void* output, int64_t begin_tile,
                  int64_t end_tile);

  void (*backward_points)(const Plan&, const Value&, const void* grad_output, const PointInputs&,
                          const PointGradients&, int64_t begin_tile, int64_t end_tile);

  // Gradient of the value, contiguous [B, S, value_heads, D] in the storage type; zeroed before if
  // Plan::adds_in_place().
  void (*backward_value)(const Plan&, const void* grad_output, const PointInputs&, void* grad_value,
                         int64_t begin_task, int64_t end_task);
};

// The kernels in use. First call: SACCADE_CPU_ISA, else the best of the processor.
// Throws std::runtime_error when the environment variable names one that cannot run here.
const Kernels& active_kernels();
void set_active_kernels(const std::string& name);
// Names of the kernels that this processor can run, fastest first.
std::vector<std::string> available_kernels();

}  // namespace saccade
