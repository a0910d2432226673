// Which of the clones of every CPU kernel runs, by the names that FASTSHAP_CPU_CAPABILITY takes.

#include <atomic>
#include <cstring>

#include "fastshap/cpu.h"

namespace fastshap {
namespace {

constexpr const char* kNames[] = {"default", "avx2", "avx512", "avx512_bf16"};

Clone best_clone() {
#ifdef FASTSHAP_HAS_CLONES
  if (__builtin_cpu_supports("x86-64-v4"))
    return __builtin_cpu_supports("avx512bf16") ? kAvx512Bf16 : kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return kAvx2;
#endif
  return kBaseline;
}

std::atomic<Clone>& chosen_clone() {
  static std::atomic<Clone> clone{best_clone()};
  return clone;
}

}  // namespace

Clone clone_in_use() { return chosen_clone().load(std::memory_order_relaxed); }

}  // namespace fastshap

extern "C" {

__attribute__((visibility("default"))) const char* fastshap_cpu_capability() {
  return fastshap::kNames[fastshap::clone_in_use()];
}

// The best of this processor; it has those of the names before it too.
__attribute__((visibility("default"))) const char* fastshap_best_cpu_capability() {
  return fastshap::kNames[fastshap::best_clone()];
}

// False, and nothing changes, where this processor lacks what the name says.
__attribute__((visibility("default"))) bool fastshap_set_cpu_capability(const char* name) {
  for (int clone = fastshap::kBaseline; clone <= fastshap::best_clone(); ++clone) {
    if (std::strcmp(name, fastshap::kNames[clone]) == 0) {
      fastshap::chosen_clone() = static_cast<fastshap::Clone>(clone);
      return true;
    }
  }
  return false;
}
}
