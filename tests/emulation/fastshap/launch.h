// Runs CUDA kernels on the processor, so that their tests need no GPU: it takes the place of
// csrc/include/fastshap/launch.h. A block's threads are fibers that take turns at barriers and warp exchanges
// only, in rising or (FASTSHAP_EMULATE_ORDER=falling) falling order: what is right in both needs no more
// barriers. Stricter than a GPU: a warp exchange needs all 32 lanes, a barrier all threads of the block.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "fastshap/tensor.h"

#define FASTSHAP_KEY CPU
#define FASTSHAP_SHARED_MEMORY(name) unsigned char* const name = ::emulation::block().shared.get()

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
// In a section of its own, so that it can be filled before each block.
#define __shared__ static __attribute__((section("fastshap_shared")))
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x = 0, y = 0, z = 0;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
using dim3 = uint3;
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

using std::max;
using std::min;

// The linker's names for both ends of the section; null where no kernel has static shared memory.
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __start_fastshap_shared[];
extern "C" __attribute__((weak, visibility("hidden"))) unsigned char __stop_fastshap_shared[];

namespace emulation {

constexpr size_t kStack = 128 * 1024;
constexpr int kLanes = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};
  bool finished = false;
};

// What threads leave for one another: a barrier's count, and two sets of slots, because a lane that reads the
// last exchange may still be waiting when the next one begins.
struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
  uint64_t slots[2][kLanes] = {};
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Barrier> warps;
  Barrier barrier;
  std::unique_ptr<unsigned char[]> shared;  // operator new aligns to 16
  ucontext_t scheduler;
  std::function<void()> body;
  int threads = 0, current = 0;
  int64_t events = 0;  // arrivals and ends: a round without one is a deadlock
};

inline Block& block() {
  static Block instance;
  return instance;
}

inline void yield() {
  Block& b = block();
  swapcontext(&b.fibers[b.current].context, &b.scheduler);
}

inline void wait(Barrier& barrier, int expected) {
  const int64_t generation = barrier.generation;
  ++block().events;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  }
  while (barrier.generation == generation) yield();
}

inline void run_thread() {
  Block& b = block();
  b.body();
  b.fibers[b.current].finished = true;
  ++b.events;
  swapcontext(&b.fibers[b.current].context, &b.scheduler);
}

inline void start_threads(Block& b) {
  for (int i = 0; i < b.threads; ++i) {
    Fiber& fiber = b.fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    fiber.finished = false;
    makecontext(&fiber.context, run_thread, 0);
  }
  b.barrier = Barrier();
  b.warps.assign(b.threads / kLanes, Barrier());
}

// NaN in every floating type: what is read before it is written shows. Red zones of the AddressSanitizer lie
// between the arrays of the section, so that it must not look here.
__attribute__((no_sanitize_address)) inline void poison_static_memory() {
  for (volatile unsigned char* byte = __start_fastshap_shared; byte < __stop_fastshap_shared; ++byte) {
    *byte = 0xff;
  }
}

inline void run_block(Block& b, const char* op, bool falling) {
  start_threads(b);
  for (int left = b.threads; left > 0;) {
    const int64_t before = b.events;
    for (int i = 0; i < b.threads; ++i) {
      b.current = falling ? b.threads - 1 - i : i;
      Fiber& fiber = b.fibers[b.current];
      if (fiber.finished) continue;
      threadIdx.x = static_cast<unsigned>(b.current);
      swapcontext(&b.scheduler, &fiber.context);
      if (fiber.finished) --left;
    }
    STD_TORCH_CHECK(left == 0 || b.events != before, op,
                    ": a barrier or warp exchange that some threads never reach");
  }
}

// Bits of `value` to every lane of this thread's warp; returns the slots of all of them.
inline const uint64_t* exchange(uint64_t value) {
  Barrier& warp = block().warps[threadIdx.x / kLanes];
  uint64_t* slots = warp.slots[warp.generation % 2];
  slots[threadIdx.x % kLanes] = value;
  wait(warp, kLanes);
  return slots;
}

template <typename T>
T from_lane(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::runtime_error("a warp exchange must name all 32 lanes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(bits)[lane];
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

inline void __syncthreads() { emulation::wait(emulation::block().barrier, emulation::block().threads); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulation::from_lane(mask, 0, 0); }

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp exchange must name all 32 lanes");
  const uint64_t* votes = emulation::exchange(predicate);
  unsigned result = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) result |= static_cast<unsigned>(votes[lane]) << lane;
  return result;
}

inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  if (mask != 0xffffffffu) throw std::runtime_error("a warp exchange must name all 32 lanes");
  const uint64_t* values = emulation::exchange(value);
  unsigned result = 0;
  for (int lane = 0; lane < emulation::kLanes; ++lane) result += static_cast<unsigned>(values[lane]);
  return result;
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return emulation::from_lane(mask, value, lane % emulation::kLanes);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return emulation::from_lane(mask, value, static_cast<int>(threadIdx.x % emulation::kLanes) ^ distance);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % emulation::kLanes);
  return emulation::from_lane(mask, value, lane + distance < emulation::kLanes ? lane + distance : lane);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, int distance) {
  const int lane = static_cast<int>(threadIdx.x % emulation::kLanes);
  return emulation::from_lane(mask, value, lane >= distance ? lane - distance : lane);
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1; }
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
void __stcs(T* to, T value) {
  *to = value;
}

namespace fastshap {

template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Tensor&, int64_t blocks, int threads,
            int64_t shared_bytes, Arguments... arguments) {
  STD_TORCH_CHECK(threads % emulation::kLanes == 0 && threads <= 1024, op,
                  ": whole warps, 1024 threads at most");
  STD_TORCH_CHECK(shared_bytes <= 99 * 1024, op, ": more shared memory than the smallest device has");
  const char* order = std::getenv("FASTSHAP_EMULATE_ORDER");
  const bool falling = order != nullptr && std::string(order) == "falling";
  emulation::Block& block = emulation::block();
  block.threads = threads;
  block.body = [=] { kernel(arguments...); };
  block.shared.reset(new unsigned char[shared_bytes]);
  while (static_cast<int>(block.fibers.size()) < threads) block.fibers.emplace_back();
  blockDim.x = static_cast<unsigned>(threads);
  gridDim.x = static_cast<unsigned>(blocks);
  for (int64_t i = 0; i < blocks; ++i) {
    blockIdx.x = static_cast<unsigned>(i);
    std::memset(block.shared.get(), 0xff, shared_bytes);
    emulation::poison_static_memory();
    emulation::run_block(block, op, falling);
  }
}

inline int64_t read_back(const char*, const int64_t* value, const Tensor&) { return *value; }

}  // namespace fastshap
