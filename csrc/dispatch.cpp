// Chooses the instruction set at run time: the best of the processor, or SACCADE_CPU_ISA.

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "isa_begin.h"

namespace saccade {
namespace {

std::vector<const Kernels*> find_available() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    found.push_back(&kAvx512Kernels);
  }
  // Every processor with AVX2 and FMA has F16C, which older compilers cannot ask for.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    found.push_back(&kAvx2Kernels);
  }
#elif defined(__aarch64__)
  found.push_back(&kNeonKernels);
#endif
  found.push_back(&kScalarKernels);
  return found;
}

const std::vector<const Kernels*>& available() {
  static const std::vector<const Kernels*> kernels = find_available();
  return kernels;
}

const Kernels& find(const std::string& name, const std::string& asked_by) {
  std::string names;
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) {
      return *kernels;
    }
    names += (names.empty() ? "" : ", ") + std::string(kernels->name);
  }
  throw std::runtime_error(asked_by + ": expected one of " + names +
                           ", which this processor runs, got '" + name + "'");
}

const Kernels& first_choice() {
  const char* asked = std::getenv("SACCADE_CPU_ISA");
  const bool is_asked = asked != nullptr && *asked != '\0';
  return is_asked ? find(asked, "SACCADE_CPU_ISA") : *available().front();
}

std::atomic<const Kernels*> active{nullptr};

}  // namespace

const Kernels& active_kernels() {
  const Kernels* kernels = active.load(std::memory_order_acquire);
  if (kernels == nullptr) {
    kernels = &first_choice();
    active.store(kernels, std::memory_order_release);
  }
  return *kernels;
}

void set_active_kernels(const std::string& name) {
  active.store(&find(name, "name"), std::memory_order_release);
}

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) {
    names.push_back(kernels->name);
  }
  return names;
}

}  // namespace saccade
