// What every CPU kernel needs: vector clones, bits and huge pages.
#pragma once

#include "fastshap/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// One source, three instruction sets, chosen when the library is loaded: nothing shipped needs a given CPU.
// GCC only: on clang the baseline build is used.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSHAP_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSHAP_CLONES
#endif

// A function without clones that is called from one must be inlined into it, or it runs as baseline code.
#define FASTSHAP_INLINE inline __attribute__((always_inline))

namespace fastshap {

FASTSHAP_INLINE bool is_present(const int32_t* bits, int64_t player) {
  return (static_cast<uint32_t>(bits[player >> 5]) >> (player & 31)) & 1u;
}

// Fresh memory costs a page fault every 4 KiB, more than a streaming kernel's own work. Asks for 2 MiB pages
// on the whole ones that a large new tensor holds; a kernel without them ignores the request. A tensor below
// 32 MiB gets memory that was used before, where asking only costs.
inline void use_huge_pages(const Tensor& fresh) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t(2) << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(fresh.data_ptr());
  const uintptr_t end = start + fresh.numel() * fresh.element_size();
  if (end - start < uintptr_t(32) << 20) return;
  const uintptr_t first = (start + page - 1) / page * page, last = end / page * page;
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastshap
