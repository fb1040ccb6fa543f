// The cache of plans: an equal call for as many threads gets the same plan, any other its own; the
// cache forgets, and a plan in use outlives that. Exits with 1 at the first difference.

#include <cstdio>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "plan.h"

namespace {

using saccade::Call;
using saccade::Plan;

Call make_call() {
  Call call;
  call.batch_size = 2;
  call.num_heads = call.value_heads = 3;
  call.head_dim = 8;
  call.levels = {{1, 6, 7, 0, 0, 2}, {1, 3, 4, 42, 2, 2}};
  call.num_positions = 54;
  call.total_points = 4;
  call.first_queries = {0, 5, 10};
  call.num_references = 2;
  call.reference_index = {0, 1, 0, 1};
  return call;
}

int num_failures = 0;

void expect(bool condition, const char* what) {
  if (!condition) {
    std::printf("expected: %s\n", what);
    ++num_failures;
  }
}

void check_plan(const Call& call, const Plan& plan, int64_t num_threads, const char* what) {
  expect(plan.call == call && plan.num_threads == num_threads, what);
}

}  // namespace

int main() {
  const Call call = make_call();
  const std::shared_ptr<const Plan> first = saccade::find_plan(Call(call), 2);
  check_plan(call, *first, 2, "the plan of the call");
  expect(saccade::find_plan(Call(call), 2) == first, "the same plan for an equal call");

  // Every field that a plan depends on, or that kernels read from it.
  const std::vector<std::function<void(Call&)>> changes = {
      [](Call& c) { c.spatial_dims = 3; },
      [](Call& c) { c.batch_size = 1, c.first_queries = {0, 5}; },
      [](Call& c) { c.value_heads = 1; },
      [](Call& c) { c.num_heads = c.value_heads = 4; },
      [](Call& c) { c.head_dim = 16; },
      [](Call& c) { c.levels[0].height = 7, c.levels[0].width = 6; },
      [](Call& c) { c.levels[0].num_points = 1, c.levels[1].num_points = 3; },
      [](Call& c) { c.first_queries = {0, 4, 10}; },
      [](Call& c) { c.num_references = 3; },
      [](Call& c) { c.num_references = 0, c.reference_index.clear(); },
      [](Call& c) { c.references_are_boxes = true; },
      [](Call& c) { c.reference_index = {1, 0, 0, 1}; },
      [](Call& c) { c.softmax = true; },
      [](Call& c) { c.interpolation = saccade::Interpolation::nearest; },
      [](Call& c) { c.padding = saccade::Padding::border; },
      [](Call& c) { c.coordinates = saccade::Coordinates::pixel; },
      [](Call& c) { c.storage = saccade::Storage::float16; },
  };
  std::vector<std::shared_ptr<const Plan>> plans = {first, saccade::find_plan(Call(call), 3)};
  check_plan(call, *plans[1], 3, "a plan of its own for another number of threads");
  for (const auto& change : changes) {
    Call changed = make_call();
    change(changed);
    plans.push_back(saccade::find_plan(Call(changed), 2));
    check_plan(changed, *plans.back(), 2, "the plan of the changed call");
  }
  for (size_t i = 0; i < plans.size(); ++i) {
    for (size_t j = 0; j < i; ++j) expect(plans[i] != plans[j], "a plan of its own");
    const std::shared_ptr<const Plan> again =
        saccade::find_plan(Call(plans[i]->call), plans[i]->num_threads);
    expect(again == plans[i], "the same plan after other calls");
  }

  std::shared_ptr<const Plan> other;
  std::thread([&] { other = saccade::find_plan(Call(call), 2); }).join();
  expect(other == first, "the same plan on another thread");

  // More calls than the cache holds: the first one is forgotten, and its plan is still whole.
  for (int64_t head_dim = 100; head_dim < 2000; ++head_dim) {
    Call changed = make_call();
    changed.head_dim = head_dim;
    check_plan(changed, *saccade::find_plan(Call(changed), 2), 2, "the plan of one call of many");
  }
  // The owners that are left: first, plans and other.
  expect(first.use_count() == 3, "the cache to have let go of the first plan");
  check_plan(call, *first, 2, "a plan that outlives the cache's entry");

  // Tables of many points are not kept.
  Call large = make_call();
  large.levels[1].num_points = 1 << 16;
  large.total_points = (1 << 16) + 2;
  large.reference_index.assign(large.total_points, 1);
  const std::shared_ptr<const Plan> uncached = saccade::find_plan(Call(large), 2);
  check_plan(large, *uncached, 2, "the plan of a call with many points");
  expect(uncached.use_count() == 1, "no other owner of a large plan");
  return num_failures == 0 ? 0 : 1;
}
