// Two small calls of fixed numbers, for counting the instructions of the kernels (see
// tests/test_instruction_counts.py): an encoder-like one, where every position of the map is a
// query, and a decoder-like one with few queries on a larger map.
//
// Usage: count_instructions ISA encoder|decoder forward|backward. What it computed is printed as a
// sum, and it exits with 1 if that is 0: a kernel that does nothing is not a fast one.

#include <cmath>
#include <cstdio>
#include <cstring>
#include <utility>
#include <vector>

#include "deformable_attention.h"

namespace {

// Knuth's linear congruential generator: the same numbers with every standard library.
struct Numbers {
  uint64_t state = 1;
  float next(float low, float high) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return low + (high - low) * static_cast<float>(state >> 40) / static_cast<float>(1 << 24);
  }
  std::vector<float> many(int64_t count, float low, float high) {
    std::vector<float> drawn(count);
    for (float& number : drawn) number = next(low, high);
    return drawn;
  }
};

struct Call {
  saccade::Problem problem;
  std::vector<float> value, locations, weights, grad_output;
  std::vector<float> output, grad_value, grad_locations, grad_weights;

  Call(const std::vector<std::pair<int64_t, int64_t>>& shapes, int64_t num_queries) {
    problem.batch_size = 1;
    problem.num_heads = problem.value_heads = 8;
    problem.head_dim = 32;
    for (const auto& shape : shapes) {
      problem.levels.push_back(
          {1, shape.first, shape.second, problem.num_positions, problem.total_points, 4});
      problem.num_positions += shape.first * shape.second;
      problem.total_points += 4;
    }
    if (num_queries == 0) num_queries = problem.num_positions;
    problem.first_queries = {0, num_queries};
    problem.prepare(1);
    const int64_t points = num_queries * problem.num_heads * problem.total_points;
    const int64_t channels = problem.num_heads * problem.head_dim;
    Numbers numbers;
    value = numbers.many(problem.num_positions * channels, -1, 1);
    // A few points lie outside of the map, as they do in a model.
    locations = numbers.many(2 * points, -0.05f, 1.05f);
    weights = numbers.many(points, 0, 0.125f);
    grad_output = numbers.many(num_queries * channels, -1, 1);
    output.resize(grad_output.size());
    grad_value.resize(value.size());
    grad_locations.resize(locations.size());
    grad_weights.resize(weights.size());
  }

  saccade::Value described() const {
    const int64_t row = problem.num_heads * problem.head_dim;
    return {value.data(), problem.num_positions * row, row, problem.head_dim};
  }
  saccade::PointInputs points() const { return {nullptr, locations.data(), weights.data()}; }
};

void run(Call& call, const saccade::Kernels& kernels, bool backward) {
  const saccade::Problem& problem = call.problem;
  if (!backward) {
    kernels.forward(problem, call.described(), call.points(), call.output.data(), 0,
                    problem.forward_units());
    return;
  }
  kernels.backward_value(problem, call.grad_output.data(), call.points(), call.grad_value.data(), 0,
                         problem.backward_value_units());
  kernels.backward_points(problem, call.described(), call.grad_output.data(), call.points(),
                          {nullptr, call.grad_locations.data(), call.grad_weights.data()}, 0,
                          problem.backward_points_units());
}

}  // namespace

// valgrind is told to count in the function of this name.
extern "C" __attribute__((noinline)) void counted(Call& call, const saccade::Kernels& kernels,
                                                  bool backward) {
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
  Call call = encoder ? Call({{16, 20}, {8, 10}, {4, 5}, {2, 3}}, 0)
                      : Call({{32, 40}, {16, 20}, {8, 10}, {4, 5}}, 50);
  // The first call of a thread makes its scratch memory; what is counted is every later one.
  run(call, saccade::active_kernels(), backward);
  counted(call, saccade::active_kernels(), backward);
  double sum = 0;
  for (const auto* numbers :
       {&call.output, &call.grad_value, &call.grad_locations, &call.grad_weights}) {
    for (const float number : *numbers) sum += std::fabs(number);
  }
  std::printf("sum of all magnitudes: %.6g\n", sum);
  return sum > 0 ? 0 : 1;
}
