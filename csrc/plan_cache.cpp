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

class Hash {
 public:
  void add(int64_t element) {
    // The 64-bit step of FNV-1a, by whole elements.
    hash_ = (hash_ ^ static_cast<uint64_t>(element)) * 1099511628211u;
    hash_ ^= hash_ >> 29;
  }
  uint64_t get() const { return hash_; }

 private:
  uint64_t hash_ = 14695981039346656037u;
};

uint64_t get_hash(const Call& call, int64_t num_threads) {
  Hash hash;
  hash.add(num_threads);
  hash.add(call.batch_size);
  hash.add(call.num_heads);
  hash.add(call.value_heads);
  hash.add(call.head_dim);
  hash.add(call.num_references);
  hash.add(static_cast<int64_t>(call.storage) + 8 * static_cast<int64_t>(call.interpolation) +
           64 * static_cast<int64_t>(call.padding) + 512 * static_cast<int64_t>(call.coordinates) +
           4096 * call.softmax + 8192 * call.references_are_boxes);
  for (const Level& level : call.levels) {
    hash.add(level.depth);
    hash.add(level.height);
    hash.add(level.width);
    hash.add(level.num_points);
  }
  for (const int64_t query : call.first_queries) {
    hash.add(query);
  }
  for (const int32_t index : call.reference_index) {
    hash.add(index);
  }
  return hash.get();
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
