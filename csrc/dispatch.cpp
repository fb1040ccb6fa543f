// Chooses the instruction set at run time: the best of the processor, or SACCADE_CPU_ISA.

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa_begin.h"

namespace saccade {
namespace {

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> kernels;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    kernels.push_back(&kAvx512Kernels);
  }
  // Every processor with AVX2 and FMA has F16C, which older compilers have no name for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    kernels.push_back(&kAvx2Kernels);
  }
#elif defined(__aarch64__)
  kernels.push_back(&kNeonKernels);
#endif
  kernels.push_back(&kScalarKernels);
  return kernels;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> kernels = find_available();
  return kernels;
}

// `source`: the argument or environment variable that names the instruction set.
const Kernels& find_kernels(const std::string& name, const std::string& source) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) {
      return *kernels;
    }
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error(source + ": expected one of " + names +
                           ", which this processor runs, got '" + name + "'");
}

const Kernels& get_default_kernels() {
  const char* name = std::getenv("SACCADE_CPU_ISA");
  const bool is_set = name != nullptr && *name != '\0';
  return is_set ? find_kernels(name, "SACCADE_CPU_ISA") : *available().front();
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = &get_default_kernels();
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void set_active_kernels(const std::string& name) {
  active.store(&find_kernels(name, "name"), std::memory_order_release);
}

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) {
    names.push_back(kernels->name);
  }
  return names;
}

}  // namespace saccade
