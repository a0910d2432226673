// sample_coalitions: each coalition is drawn in registers and one small buffer of keys, without sorting.
//
// fastshap_kernels/reference/sample_coalitions.py defines the draw. Its layout of keys puts players p … p +
// 31, one word of bits, into 32 neighbouring Philox lanes: every loop here is over contiguous lanes and
// vectorises.

#include <algorithm>

#include "fastshap/cpu.h"

namespace fastshap {
namespace {

constexpr int64_t kLanes = 32;  // Philox blocks at a time: a word of bits for each of their four outputs
constexpr int64_t kGroup = 4 * kLanes;  // players that those blocks serve
constexpr int64_t kMaxPlayers = 4096;   // a multiple of kGroup
// About 2 ms of work. On a busy machine the wait for a second thread takes 10 ms and more, so that threads
// come in only where the work is worth them.
constexpr int64_t kKeysPerThread = int64_t{1} << 20;
constexpr uint32_t kSizeStream = 0, kPlayerStream = 1;

struct Draw {
  int64_t coalitions;  // M
  int64_t drawn;       // of them, those that are no complement
  int64_t players;     // P
  uint64_t seed;
  uint64_t offset;
  bool paired;
};

// The coalition is every player whose key is below `limit` and the first `ties` whose key equals it.
struct Selection {
  uint32_t limit;
  int64_t ties;
};

// Philox4x32-10 with counter (index, first_block + lane, stream); word w of each lane goes to out[w * lanes +
// lane].
template <int64_t lanes>
FASTSHAP_INLINE void philox(uint64_t seed, uint64_t index, uint32_t first_block, uint32_t stream,
                            uint32_t* out) {
  uint32_t *x0 = out, *x1 = out + lanes, *x2 = out + 2 * lanes, *x3 = out + 3 * lanes;
  for (int64_t lane = 0; lane < lanes; ++lane) {
    x0[lane] = static_cast<uint32_t>(index);
    x1[lane] = static_cast<uint32_t>(index >> 32);
    x2[lane] = first_block + static_cast<uint32_t>(lane);
    x3[lane] = stream;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * x0[lane];
      const uint64_t product1 = uint64_t{0xCD9E8D57u} * x2[lane];
      x0[lane] = static_cast<uint32_t>(product1 >> 32) ^ x1[lane] ^ key0;
      x1[lane] = static_cast<uint32_t>(product1);
      x2[lane] = static_cast<uint32_t>(product0 >> 32) ^ x3[lane] ^ key1;
      x3[lane] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

FASTSHAP_INLINE int64_t draw_size(const Draw& draw, uint64_t index, const int64_t* thresholds) {
  uint32_t x[4];
  philox<1>(draw.seed, index, 0, kSizeStream, x);
  const int64_t uniform = (static_cast<int64_t>(x[0]) << 31) + (x[1] >> 1);
  return 1 + (std::upper_bound(thresholds, thresholds + draw.players - 2, uniform) - thresholds);
}

// Keys past the last player are as large as can be: never below a limit.
FASTSHAP_INLINE void draw_keys(const Draw& draw, uint64_t index, uint32_t* keys) {
  for (int64_t first = 0; first < draw.players; first += kGroup) {
    philox<kLanes>(draw.seed, index, static_cast<uint32_t>(first / 4), kPlayerStream, keys + first);
  }
  std::fill(keys + draw.players, keys + words(draw.players) * 32, ~uint32_t{0});
}

// Bit by bit from the top, the largest limit with fewer than `size` keys below it: about log2(P) counts
// suffice.
FASTSHAP_INLINE Selection select_smallest(const uint32_t* keys, int64_t count, int32_t size) {
  uint32_t limit = 0;
  int32_t below = 0;
  for (uint32_t bit = 1u << 31; bit != 0; bit >>= 1) {
    const uint32_t candidate = limit | bit;
    int32_t smaller = 0;
    for (int64_t i = 0; i < count; ++i) smaller += keys[i] < candidate;
    if (smaller == size) return {candidate, 0};
    if (smaller < size) {
      limit = candidate;
      below = smaller;
    }
  }
  return {limit, size - below};
}

FASTSHAP_INLINE void write_bits(const uint32_t* keys, int64_t bit_words, Selection selection,
                                uint32_t* bits) {
  for (int64_t word = 0; word < bit_words; ++word) {
    uint32_t packed = 0;
    for (int64_t i = 0; i < 32; ++i) packed |= uint32_t{keys[word * 32 + i] < selection.limit} << i;
    bits[word] = packed;
  }
  for (int64_t player = 0; selection.ties > 0; ++player) {
    if (keys[player] != selection.limit) continue;
    bits[player / 32] |= 1u << (player % 32);
    --selection.ties;
  }
}

FASTSHAP_INLINE void write_complement(const uint32_t* bits, int64_t players, uint32_t* complement) {
  const int64_t last = words(players) - 1;
  for (int64_t word = 0; word <= last; ++word) complement[word] = ~bits[word];
  complement[last] &= used_bits(players);
}

FASTSHAP_INLINE void sample_range(const Draw& draw, const int64_t* thresholds, int64_t begin, int64_t end,
                                  uint32_t* out) {
  alignas(64) uint32_t keys[kMaxPlayers];
  const int64_t bit_words = words(draw.players);
  for (int64_t i = begin; i < end; ++i) {
    const int64_t member = i % draw.drawn * (draw.paired ? 2 : 1);
    const int64_t row = i / draw.drawn * draw.coalitions + member;
    const uint64_t index = draw.offset + static_cast<uint64_t>(row);
    uint32_t* bits = out + row * bit_words;
    draw_keys(draw, index, keys);
    const int64_t size = draw_size(draw, index, thresholds);
    write_bits(keys, bit_words, select_smallest(keys, bit_words * 32, static_cast<int32_t>(size)), bits);
    if (draw.paired && member + 1 < draw.coalitions) write_complement(bits, draw.players, bits + bit_words);
  }
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
  draw.players = players;
  draw.seed = static_cast<uint64_t>(seed);
  draw.offset = static_cast<uint64_t>(offset);
  draw.paired = paired;
  const int64_t* table_data = table.const_data_ptr<int64_t>();
  uint32_t* out_data = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>());
  torch::stable::parallel_for(0, batch * draw.drawn, 1 + kKeysPerThread / players,
                              [&](int64_t begin, int64_t end) {
                                FASTSHAP_CLONED(sample_range(draw, table_data, begin, end, out_data));
                              });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("sample_coalitions", TORCH_BOX(&fastshap::sample_coalitions));
}
