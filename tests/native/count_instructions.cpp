// Two small calls with fixed inputs, for counting the instructions of the kernels (see
// tests/test_instruction_counts.py): an encoder-like one, where every position of the map is a
// query, and a decoder-like one with few queries on a larger map.
//
// Usage: count_instructions ISA encoder|decoder forward|backward. It prints the sum of its results
// and exits with 1 if that is 0: a kernel that does nothing is not a fast one.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "kernels.h"

namespace {

// Knuth's linear congruential generator: the same numbers with every standard library.
struct Generator {
  uint64_t state = 1;
  float next(float low, float high) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * static_cast<float>(state >> 40) / static_cast<float>(1 << 24);
  }
  std::vector<float> draw(int64_t count, float low, float high) {
    std::vector<float> elements(count);
    for (float& element : elements) element = next(low, high);
    return elements;
  }
};

struct CountedCall {
  saccade::Plan plan;
  std::vector<float> value, locations, weights, grad_output;
  std::vector<float> output, grad_value, grad_locations, grad_weights;

  CountedCall(const std::vector<std::pair<int64_t, int64_t>>& shapes, int64_t num_queries) {
    saccade::Call call;
    call.batch_size = 1;
    call.num_heads = call.value_heads = 8;
    call.head_dim = 32;
    for (const auto& shape : shapes) {
      call.levels.push_back(
          {1, shape.first, shape.second, call.num_positions, call.total_points, 4});
      call.num_positions += shape.first * shape.second;
      call.total_points += 4;
    }
    if (num_queries == 0) num_queries = call.num_positions;
    call.first_queries = {0, num_queries};
    const int64_t points = num_queries * call.num_heads * call.total_points;
    const int64_t channels = call.num_heads * call.head_dim;
    Generator generator;
    value = generator.draw(call.num_positions * channels, -1, 1);
    // A few points lie outside of the map, as they do in a model.
    locations = generator.draw(2 * points, -0.05f, 1.05f);
    weights = generator.draw(points, 0, 0.125f);
    grad_output = generator.draw(num_queries * channels, -1, 1);
    output.resize(grad_output.size());
    grad_value.resize(value.size());
    grad_locations.resize(locations.size());
    grad_weights.resize(weights.size());
    plan = saccade::make_plan(std::move(call), 1);
  }

  saccade::Value described_value() const {
    const int64_t row = plan.call.num_heads * plan.call.head_dim;
    return {value.data(), plan.call.num_positions * row, row, plan.call.head_dim};
  }
  saccade::PointInputs inputs() const { return {nullptr, locations.data(), weights.data()}; }
};

void run(CountedCall& call, const saccade::Kernels& kernels, bool backward) {
  const saccade::Plan& plan = call.plan;
  if (!backward) {
    kernels.forward(plan, call.described_value(), call.inputs(), call.output.data(), 0,
                    plan.num_tiles());
    return;
  }
  kernels.backward_value(plan, call.grad_output.data(), call.inputs(), call.grad_value.data(), 0,
                         plan.num_value_tasks());
  kernels.backward_points(plan, call.described_value(), call.grad_output.data(), call.inputs(),
                          {nullptr, call.grad_locations.data(), call.grad_weights.data()}, 0,
                          plan.num_tiles());
}

}  // namespace

// valgrind counts in the function of this name.
extern "C" __attribute__((noinline)) void counted(CountedCall& call,
                                                  const saccade::Kernels& kernels, bool backward) {
  run(call, kernels, backward);
}

int main(int argc, char** argv) {
  if (argc != 4) {
    std::fprintf(stderr, "usage: count_instructions ISA encoder|decoder forward|backward\n");
    return 2;
  }
  saccade::set_active_kernels(argv[1]);
  const bool encoder = std::strcmp(argv[2], "encoder") == 0;
  const bool backward = std::strcmp(argv[3], "backward") == 0;
  CountedCall call = encoder ? CountedCall({{16, 20}, {8, 10}, {4, 5}, {2, 3}}, 0)
                             : CountedCall({{32, 40}, {16, 20}, {8, 10}, {4, 5}}, 50);
  // The first call of a thread makes its scratch memory; later calls are the ones to count.
  run(call, saccade::active_kernels(), backward);
  counted(call, saccade::active_kernels(), backward);
  double sum = 0;
  for (const auto* elements :
       {&call.output, &call.grad_value, &call.grad_locations, &call.grad_weights}) {
    for (const float element : *elements) sum += std::fabs(element);
  }
  std::printf("sum of all magnitudes: %.6g\n", sum);
  return sum > 0 ? 0 : 1;
}
