// What every CUDA kernel needs: launches, bits, and 16-byte access to memory.
#pragma once

#include <cstring>

#include "fastshap/launch.h"

namespace fastshap {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kVectorBytes = 16;  // the widest access of one thread

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The numbers of consecutive blocks are those of consecutive pieces of work: a 1-dimensional grid has no
// limit that matters (y and z end at 65 535).
__device__ inline int64_t thread_index() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline bool is_present(const int32_t* bits, int64_t player) {
  return (static_cast<uint32_t>(bits[player >> 5]) >> (player & 31)) & 1u;
}

// `size` neighbours in memory, moved in accesses of up to 16 bytes. Its address must be a multiple of
// `alignment`.
template <typename T, int size>
struct alignas(sizeof(T) * size < kVectorBytes ? sizeof(T) * size : kVectorBytes) Vector {
  T values[size];
};

template <int size, typename T>
__device__ inline Vector<T, size> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, size>*>(from);
}

template <int size, typename T>
__device__ inline void store_vector(T* to, const Vector<T, size>& vector) {
  *reinterpret_cast<Vector<T, size>*>(to) = vector;
}

// store_vector of what is not read soon. It is one access whatever surrounds it: the compiler may split
// store_vector's.
template <int size, typename T>
__device__ inline void stream_vector(T* to, const Vector<T, size>& vector) {
  if constexpr (sizeof(vector) == 16) {
    uint4 words;
    memcpy(&words, &vector, sizeof(words));
    __stcs(reinterpret_cast<uint4*>(to), words);
  } else if constexpr (sizeof(vector) == 8) {
    uint2 words;
    memcpy(&words, &vector, sizeof(words));
    __stcs(reinterpret_cast<uint2*>(to), words);
  } else {
    store_vector(to, vector);
  }
}

// How many neighbours a thread may move at a time: the largest power of two up to `most` that divides `run`.
inline int vector_size(int64_t run, int most) {
  int size = most;
  while (run % size != 0) size /= 2;
  return size;
}

// At most `size`, for values of which the first is at `start`: a slice may begin anywhere.
template <typename T>
int aligned_size(int size, const T* start) {
  const auto bytes = [&] { return size * sizeof(T) < kVectorBytes ? size * sizeof(T) : kVectorBytes; };
  while (reinterpret_cast<uintptr_t>(start) % bytes() != 0) size /= 2;
  return size;
}

// For rows of `run` values, the first of which is at `start`.
template <typename T>
int vector_size(int64_t run, const T* start) {
  return aligned_size(vector_size(run, static_cast<int>(kVectorBytes / sizeof(T))), start);
}

// The sum over a warp, at every lane.
template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// Calls `body.template operator()<size>()` with a power of two up to 16 as a constant.
template <typename Body>
void dispatch_vector(int size, Body&& body) {
  switch (size) {
    case 16:
      return body.template operator()<16>();
    case 8:
      return body.template operator()<8>();
    case 4:
      return body.template operator()<4>();
    case 2:
      return body.template operator()<2>();
    default:
      return body.template operator()<1>();
  }
}

}  // namespace fastshap
