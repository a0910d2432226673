// What every CPU kernel needs: clones for instruction sets, bits and huge pages.
#pragma once

#include "fastshap/tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

// A function without clones that is called from one must be inlined into it, or it runs as baseline code.
#define FASTSHAP_INLINE inline __attribute__((always_inline))
#define FASTSHAP_INLINE_BODY __attribute__((always_inline))

// Calls a FASTSHAP_INLINE function, compiled for the instruction set in use.
#define FASTSHAP_CLONED(...) \
  ::fastshap::with_vectors([&]<int64_t kBytes>() FASTSHAP_INLINE_BODY { return __VA_ARGS__; })

namespace fastshap {

// One source, several instruction sets: nothing shipped needs a given processor. GCC only: elsewhere the
// baseline is all there is.
enum Clone : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The clone in use: the best of this processor, unless FASTSHAP_CPU_CAPABILITY names another (clones.cpp).
Clone clone_in_use();

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSHAP_HAS_CLONES
template <typename Body>
__attribute__((target("arch=x86-64-v4"))) auto run_v4(const Body& body) {
  return body.template operator()<64>();
}
template <typename Body>
__attribute__((target("arch=x86-64-v3"))) auto run_v3(const Body& body) {
  return body.template operator()<32>();
}
#endif

// Calls body.operator()<bytes>(), compiled for the clone in use, whose registers are so wide. The body must
// be FASTSHAP_INLINE_BODY, or it would not be compiled for it.
template <typename Body>
FASTSHAP_INLINE auto with_vectors(const Body& body) {
#ifdef FASTSHAP_HAS_CLONES
  const Clone clone = clone_in_use();
  if (clone >= kAvx512) return run_v4(body);
  if (clone == kAvx2) return run_v3(body);
#endif
  return body.template operator()<16>();
}

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
