// sample_coalitions: a warp draws a coalition in registers, and writes its complement too.
//
// fastshap_kernels/reference/sample_coalitions.py defines the draw. Its layout of keys gives a lane the keys
// of one bit position in four words of bits: 32 lanes cast the words of bits themselves as votes. No key ever
// leaves its register and nothing is sorted: a limit with as many keys below it as the coalition has players
// is found bit by bit, in about log2(P) counts. The only traffic is the bits, 28 bytes a coalition at P =
// 196, so that arithmetic sets the time: about 60 instructions a lane for every four keys and ten for every
// count.

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kGroup = 4 * kWarp;  // players that 32 Philox blocks serve
constexpr int kMaxPlayers = 4096;
constexpr uint32_t kSizeStream = 0, kPlayerStream = 1;

struct Draw {
  int64_t coalitions;  // M
  int64_t drawn;       // of them, those that are no complement
  int64_t count;       // drawn in all images
  int players;         // P
  int bit_words;       // 32-bit words a coalition
  bool paired;
  uint64_t seed;
  uint64_t offset;
};

struct Words {
  uint32_t x[4];
};

// Philox4x32-10 with counter (index, block, stream).
__device__ __forceinline__ Words philox(uint64_t seed, uint64_t index, uint32_t block, uint32_t stream) {
  uint32_t x0 = static_cast<uint32_t>(index), x1 = static_cast<uint32_t>(index >> 32), x2 = block,
           x3 = stream;
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * x0, product1 = uint64_t{0xCD9E8D57u} * x2;
    x0 = static_cast<uint32_t>(product1 >> 32) ^ x1 ^ key0;
    x1 = static_cast<uint32_t>(product1);
    x2 = static_cast<uint32_t>(product0 >> 32) ^ x3 ^ key1;
    x3 = static_cast<uint32_t>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{x0, x1, x2, x3}};
}

// One more than the number of thresholds that are no larger than the draw. They rise, so that the lanes look
// at the ends of 32 equal parts, then into the part where they part: three looks at most, at 4 094
// thresholds.
__device__ __forceinline__ int draw_size(const Draw& draw, uint64_t index, int lane,
                                         const int64_t* thresholds) {  // [P - 2]
  const Words words = philox(draw.seed, index, 0, kSizeStream);
  const int64_t uniform = (static_cast<int64_t>(words.x[0]) << 31) + (words.x[1] >> 1);
  const int end = draw.players - 2;
  int first = 0;
  for (int left = end; left > 0;) {
    const int part = (left + kWarp - 1) / kWarp, at = first + (lane + 1) * part - 1;
    const bool passed = at < end && __ldg(thresholds + at) <= uniform;
    first += __popc(__ballot_sync(kAllLanes, passed)) * part;
    left = min(part - 1, end - first);
  }
  return 1 + first;
}

// Keys past the last player are as large as can be: never below a limit, and last among its equals.
template <int groups>
__device__ __forceinline__ void draw_keys(const Draw& draw, uint64_t index, int lane,
                                          uint32_t (&keys)[4 * groups]) {
#pragma unroll
  for (int group = 0; group < groups; ++group) {
    const Words words = philox(draw.seed, index, group * kWarp + lane, kPlayerStream);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int player = group * kGroup + i * kWarp + lane;
      keys[group * 4 + i] = player < draw.players ? words.x[i] : ~0u;
    }
  }
}

// Every player whose key is below `limit`, and the first `ties` of those whose key equals it.
struct Selection {
  uint32_t limit;
  int ties;
};

// The largest limit with no more than `size` keys below it, or the first with just as many.
template <int count>
__device__ __forceinline__ Selection select_smallest(const uint32_t (&keys)[count], int size) {
  uint32_t limit = 0;
  int below = 0;
  for (uint32_t bit = 1u << 31; bit != 0 && below != size; bit >>= 1) {
    const uint32_t candidate = limit | bit;
    unsigned smaller = 0;
#pragma unroll
    for (int i = 0; i < count; ++i) smaller += keys[i] < candidate;
    smaller = __reduce_add_sync(kAllLanes, smaller);
    if (static_cast<int>(smaller) <= size) {
      limit = candidate;
      below = static_cast<int>(smaller);
    }
  }
  return {limit, size - below};
}

// The word of bits that the lanes vote for; `selection.ties` are used up by those before it.
__device__ __forceinline__ uint32_t vote(uint32_t key, int lane, Selection& selection) {
  bool present = key < selection.limit;
  if (selection.ties > 0) {
    const unsigned equal = __ballot_sync(kAllLanes, key == selection.limit);
    present = present || (key == selection.limit && __popc(equal & ((1u << lane) - 1)) < selection.ties);
    selection.ties = max(selection.ties - __popc(equal), 0);
  }
  return __ballot_sync(kAllLanes, present);
}

template <int groups>
__global__ void __launch_bounds__(kThreads)
    sample_coalitions_kernel(Draw draw, const int64_t* __restrict__ thresholds,  // [P - 2]
                             uint32_t* __restrict__ out) {                       // [B, M, W]
  const int lane = threadIdx.x % kWarp;
  const int64_t drawn = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (drawn >= draw.count) return;
  const int64_t member = drawn % draw.drawn * (draw.paired ? 2 : 1);
  const int64_t row = drawn / draw.drawn * draw.coalitions + member;
  const uint64_t index = draw.offset + static_cast<uint64_t>(row);
  const bool has_complement = draw.paired && member + 1 < draw.coalitions;
  uint32_t keys[4 * groups];
  draw_keys<groups>(draw, index, lane, keys);
  Selection selection = select_smallest(keys, draw_size(draw, index, lane, thresholds));
  uint32_t* bits = out + row * draw.bit_words;
#pragma unroll
  for (int first = 0; first < 4 * groups; first += kWarp) {
    uint32_t mine = 0;  // lane l keeps word first + l
#pragma unroll
    for (int i = 0; i < min(kWarp, 4 * groups - first); ++i) {
      const uint32_t word = vote(keys[first + i], lane, selection);
      if (lane == i) mine = word;
    }
    const int word = first + lane;
    if (word < draw.bit_words) {
      const uint32_t used = ~0u >> (word == draw.bit_words - 1 ? (kWarp - draw.players % kWarp) % kWarp : 0);
      bits[word] = mine;
      if (has_complement) bits[draw.bit_words + word] = ~mine & used;
    }
  }
}

template <int groups>
void sample(const Draw& draw, const Tensor& thresholds, Tensor& out) {
  launch("sample_coalitions", sample_coalitions_kernel<groups>, out, ceil_div(draw.count, kWarps), kThreads,
         0, draw, thresholds.const_data_ptr<int64_t>(),
         reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>()));
}

// The first kernel that has room for the players: one with fewer keys a lane counts faster.
template <int groups, int... more>
void sample_with_room(const Draw& draw, const Tensor& thresholds, Tensor& out) {
  if constexpr (sizeof...(more) > 0) {
    if (draw.players > groups * kGroup) return sample_with_room<more...>(draw, thresholds, out);
  }
  sample<groups>(draw, thresholds, out);
}

Tensor sample_coalitions(const Tensor& thresholds, int64_t batch, int64_t coalitions, int64_t players,
                         int64_t seed, int64_t offset, bool paired) {
  STD_TORCH_CHECK(players >= 2 && players <= kMaxPlayers, "sample_coalitions: 2 to 4096 players expected");
  STD_TORCH_CHECK(thresholds.scalar_type() == ScalarType::Long && thresholds.numel() == players - 2,
                  "sample_coalitions: thresholds must be int64 (P - 2,)");
  const Tensor table = torch::stable::contiguous(thresholds);
  Tensor out = torch::stable::empty({batch, coalitions, words(players)}, ScalarType::Int, std::nullopt,
                                    thresholds.device());
  Draw draw;
  draw.coalitions = coalitions;
  draw.drawn = paired ? (coalitions + 1) / 2 : coalitions;
  draw.count = batch * draw.drawn;
  draw.players = static_cast<int>(players);
  draw.bit_words = static_cast<int>(words(players));
  draw.paired = paired;
  draw.seed = static_cast<uint64_t>(seed);
  draw.offset = static_cast<uint64_t>(offset);
  sample_with_room<1, 2, 3, 4, 6, 8, 12, 16, 24, 32>(draw, table, out);
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("sample_coalitions", TORCH_BOX(&fastshap::sample_coalitions));
}
