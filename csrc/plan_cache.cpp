// Plans are made once for each combination of sizes, options and number of threads.

#include <mutex>
#include <unordered_map>
#include <utility>

#include "plan.h"

namespace saccade {
namespace {

// A program calls the operator with a few dozen sizes; one whose sizes never repeat gains nothing
// from a cache, and must not fill the memory.
constexpr std::size_t kMaxPlans = 256;
constexpr int64_t kMaxBytes = int64_t(16) << 20;

// Bytes of a plan's vectors, within a small factor: the tables are the only large part.
int64_t estimate_bytes(const Call& call) {
  const int64_t elements_per_point = 6 * call.spatial_dims + 4;
  const int64_t elements = 2 * elements_per_point * (call.total_points + 64) +
                           24 * static_cast<int64_t>(call.levels.size()) + 2 * call.batch_size;
  return static_cast<int64_t>(sizeof(Plan)) + 8 * elements;
}

// Of the sizes: options are left to the comparison, since few of them occur with the same sizes.
uint64_t get_hash(const Call& call, int64_t num_threads) {
  uint64_t hash = 0;
  const auto add = [&](int64_t element) {
    hash = (hash ^ static_cast<uint64_t>(element)) * 0x9e3779b97f4a7c15u;
    hash ^= hash >> 32;
  };
  add(num_threads);
  add(call.num_heads);
  add(call.head_dim);
  for (const Level& level : call.levels) {
    add(level.depth);
    add(level.height);
    add(level.width);
    add(level.num_points);
  }
  for (const int64_t query : call.first_queries) {
    add(query);
  }
  return hash;
}

bool matches(const Plan& plan, const Call& call, int64_t num_threads) {
  return plan.num_threads == num_threads && plan.call == call;
}

// Shared by all threads; emptied when it is full.
class PlanCache {
 public:
  std::shared_ptr<const Plan> find(const Call& call, int64_t num_threads, uint64_t hash) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return find_locked(call, num_threads, hash);
  }

  std::shared_ptr<const Plan> insert(std::shared_ptr<const Plan> plan, uint64_t hash) {
    const int64_t bytes = estimate_bytes(plan->call);
    const std::lock_guard<std::mutex> lock(mutex_);
    // Another thread may have made an equal plan in the meantime.
    if (std::shared_ptr<const Plan> equal = find_locked(plan->call, plan->num_threads, hash)) {
      return equal;
    }
    if (plans_.size() >= kMaxPlans || total_bytes_ + bytes > kMaxBytes) {
      plans_.clear();
      total_bytes_ = 0;
    }
    total_bytes_ += bytes;
    plans_.emplace(hash, plan);
    return plan;
  }

 private:
  std::shared_ptr<const Plan> find_locked(const Call& call, int64_t num_threads, uint64_t hash) {
    const auto range = plans_.equal_range(hash);
    for (auto entry = range.first; entry != range.second; ++entry) {
      if (matches(*entry->second, call, num_threads)) {
        return entry->second;
      }
    }
    return nullptr;
  }

  std::mutex mutex_;
  std::unordered_multimap<uint64_t, std::shared_ptr<const Plan>> plans_;  // by hash
  int64_t total_bytes_ = 0;
};

// Never destroyed: threads may still run calls while the process exits.
PlanCache& plan_cache() {
  static PlanCache* const cache = new PlanCache;
  return *cache;
}

}  // namespace

std::shared_ptr<const Plan> find_plan(Call&& call, int64_t num_threads) {
  // Most calls repeat the one before: compared first, without a lock.
  thread_local std::shared_ptr<const Plan> last_used;
  if (last_used != nullptr && matches(*last_used, call, num_threads)) {
    return last_used;
  }
  // A plan that would fill a good part of the cache is made for its call alone.
  if (estimate_bytes(call) > kMaxBytes / 16) {
    return std::make_shared<const Plan>(make_plan(std::move(call), num_threads));
  }
  const uint64_t hash = get_hash(call, num_threads);
  std::shared_ptr<const Plan> plan = plan_cache().find(call, num_threads, hash);
  if (plan == nullptr) {
    plan = plan_cache().insert(
        std::make_shared<const Plan>(make_plan(std::move(call), num_threads)), hash);
  }
  last_used = plan;
  return plan;
}

}  // namespace saccade
