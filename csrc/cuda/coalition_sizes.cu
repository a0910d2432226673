// coalition_sizes: a thread counts the set bits of a coalition, and a few neighbours share one of many words.
//
// Floor: the words read once, 28 bytes a coalition at P = 196, and a number written for each. The words of a
// warp's coalitions lie one after the other, so that what one read leaves of a cache line serves the next. A
// training step's coalitions, some thousands, are counted in the time of a launch.

#include <vector>

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 128;
constexpr int kReads = 8;  // most of a thread: all of them are on their way at once

struct Counting {
  int64_t coalitions;
  int bit_words;  // 32-bit words a coalition
  int lane_bits;  // 2^lane_bits neighbours in a warp share a coalition
  uint32_t used;  // bits of its last word that stand for players
};

template <int size>
__global__ void __launch_bounds__(kThreads)
    coalition_sizes_kernel(Counting counting, const uint32_t* __restrict__ bits,  // [coalitions, W]
                           int32_t* __restrict__ out) {                           // [coalitions]
  const int lanes = 1 << counting.lane_bits, lane = threadIdx.x & (lanes - 1);
  const int64_t coalition = thread_index() >> counting.lane_bits;
  const bool inside = coalition < counting.coalitions;
  int count = 0;
  if (inside) {
    const uint32_t* from = bits + coalition * counting.bit_words;
#pragma unroll 4
    for (int word = lane * size; word < counting.bit_words; word += lanes * size) {
      Vector<uint32_t, size> words = load_vector<size>(from + word);
      if (word + size == counting.bit_words) words.values[size - 1] &= counting.used;
#pragma unroll
      for (int i = 0; i < size; ++i) count += __popc(words.values[i]);
    }
  }
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    count += __shfl_xor_sync(kAllLanes, count, distance);
  }
  if (inside && lane == 0) out[coalition] = count;
}

template <int size>
void count_players(Counting counting, const uint32_t* bits, Tensor& out) {
  while (kReads * size << counting.lane_bits < counting.bit_words) ++counting.lane_bits;
  launch("coalition_sizes", coalition_sizes_kernel<size>, out,
         ceil_div(counting.coalitions << counting.lane_bits, kThreads), kThreads, 0, counting, bits,
         out.mutable_data_ptr<int32_t>());
}

Tensor coalition_sizes(const Tensor& bits, int64_t players) {
  const Tensor packed = torch::stable::contiguous(bits);
  const int64_t ndim = packed.dim(), bit_words = words(players);
  STD_TORCH_CHECK(players > 0 && ndim > 0 && packed.size(ndim - 1) == bit_words,
                  "coalition_sizes: argument `bits` must be (..., ", bit_words, ") for ", players,
                  " players.");
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < ndim - 1; ++i) shape.push_back(packed.size(i));
  Tensor out = torch::stable::new_empty(packed, shape);
  Counting counting = {};
  counting.coalitions = out.numel();
  counting.bit_words = static_cast<int>(bit_words);
  counting.used = used_bits(players);
  const uint32_t* from = reinterpret_cast<const uint32_t*>(packed.const_data_ptr<int32_t>());
  const int size = vector_size(bit_words, from);
  if (size == 4) {
    count_players<4>(counting, from, out);
  } else if (size == 2) {
    count_players<2>(counting, from, out);
  } else {
    count_players<1>(counting, from, out);
  }
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("coalition_sizes", TORCH_BOX(&fastshap::coalition_sizes));
}
