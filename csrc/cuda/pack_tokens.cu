// pack_tokens: a block holds a few neighbouring tokens of an image and writes them for several coalitions.
//
// Floor: each token read once, each row written once (forward); each row read once, each token written once
// (backward). A token's row follows from its coalition's bits alone, so blocks wait for nothing: a pair of
// complements has P + 2Q rows whatever its bits are, and only unpaired coalitions need a sum over sequences.

#include <algorithm>
#include <tuple>

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 128;
constexpr int kTokens = 8;       // held by a block: they share a word of bits
constexpr int kCoalitions = 64;  // whose places a block looks up at a time
constexpr int kTogether = 4;     // rows read at a time, to have enough of them on their way
constexpr int kScanThreads = 1024;

struct Packing {
  int64_t images;      // B
  int64_t coalitions;  // M
  int64_t players;     // P
  int64_t prefix;      // Q
  int64_t width;       // values of a row that are moved one by one: D, or a multiple
  int64_t bit_words;   // 32-bit words a coalition
  int64_t total;       // T
  bool paired;

  __host__ __device__ int64_t prefix_groups() const { return ceil_div(prefix, kTokens); }
  __host__ __device__ int64_t groups() const { return prefix_groups() + ceil_div(players, kTokens); }
};

Packing make_packing(const Tensor& bits, int64_t length, int64_t prefix, int64_t width, bool paired) {
  Packing packing = {};
  packing.images = bits.size(0);
  packing.coalitions = bits.size(1);
  packing.players = length - prefix;
  packing.prefix = prefix;
  packing.width = width;
  packing.bit_words = words(packing.players);
  packing.paired = paired;
  STD_TORCH_CHECK(packing.players > 0 && bits.size(2) == packing.bit_words,
                  "pack_tokens: argument `bits` must be (B, M, ", packing.bit_words, ") for ",
                  packing.players, " players.");
  STD_TORCH_CHECK(
      !paired || packing.coalitions % 2 == 0,
      "pack_tokens: argument `bits` must be pairs of complements (M even), since `paired` is True.");
  return packing;
}

// kTokens tokens of an image: prefix tokens or players.
struct Group {
  int64_t token;   // the first of them
  int count;       // fewer at the end
  int64_t player;  // the first of them as a player; −1 in the prefix
};

__device__ inline Group group_at(const Packing& packing, int64_t index) {
  const bool in_prefix = index < packing.prefix_groups();
  const int64_t player = (index - packing.prefix_groups()) * kTokens;
  Group group;
  group.token = in_prefix ? index * kTokens : packing.prefix + player;
  group.player = in_prefix ? -1 : player;
  const int64_t end = in_prefix ? packing.prefix : packing.prefix + packing.players;
  group.count = static_cast<int>(min(static_cast<int64_t>(kTokens), end - group.token));
  return group;
}

// Where a coalition has a group's tokens: row `first` and on, those whose bit is set.
struct Place {
  int32_t first;
  uint32_t present;
};

__device__ inline uint32_t below(int bit) { return (1u << bit) - 1; }

__device__ inline int64_t row_of(const Place& place, int token) {
  return static_cast<int64_t>(place.first) + __popc(place.present & below(token));
}

// Bits of one word that stand for players.
__device__ inline uint32_t valid_bits(int64_t word, int64_t players) {
  const int64_t left = players - 32 * word;
  return left >= 32 ? ~0u : below(static_cast<int>(left));
}

// Players present before `player` (low half) and in all (high half), at every lane of the warp.
__device__ inline int count_present(const int32_t* bits, const Packing& packing, int64_t player) {
  int counts = 0;
  for (int64_t word = threadIdx.x % kWarp; word < packing.bit_words; word += kWarp) {
    const uint32_t present = static_cast<uint32_t>(bits[word]) & valid_bits(word, packing.players);
    const uint32_t earlier = 32 * word + 32 <= player ? ~0u : 32 * word >= player ? 0 : below(player & 31);
    counts += __popc(present & earlier) + (__popc(present) << 16);
  }
  return warp_sum(counts);
}

// The place of a group in sequence s, found by one warp. Of a pair only the first coalition's bits are read,
// so that no promise, true or not, makes a row lie outside the batch. `starts` is null in pairs.
__device__ inline Place find_place(const Packing& packing, const Group& group, const int32_t* bits,
                                   const int32_t* starts, int64_t s, int32_t* start) {
  const bool complement = packing.paired && s % 2 == 1;
  const int32_t* coalition = bits + (complement ? s - 1 : s) * packing.bit_words;
  const int64_t player = max(group.player, static_cast<int64_t>(0));
  const int counts = count_present(coalition, packing, player);
  const int before = counts & 0xffff, all = counts >> 16;
  const int64_t pair = s / 2 * (packing.players + 2 * packing.prefix);
  *start = starts ? starts[s] : static_cast<int32_t>(complement ? pair + packing.prefix + all : pair);
  if (group.player < 0) return {static_cast<int32_t>(*start + group.token), ~0u};
  const uint32_t word = static_cast<uint32_t>(coalition[player >> 5]) >> (player & 31);
  const int64_t earlier = complement ? player - before : before;
  return {static_cast<int32_t>(*start + packing.prefix + earlier), complement ? ~word : word};
}

// The places of the coalitions from `first` on; those that don't exist have no token. All threads of a block.
__device__ inline void find_places(const Packing& packing, const Group& group, const int32_t* bits,
                                   const int32_t* starts, int64_t image, int64_t first, int32_t* cu_seqlens,
                                   Place* places) {
  const int64_t sequences = packing.images * packing.coalitions;
  for (int m = threadIdx.x / kWarp; m < kCoalitions; m += kThreads / kWarp) {
    Place place = {0, 0};
    if (first + m < packing.coalitions) {
      const int64_t s = image * packing.coalitions + first + m;
      int32_t start;
      place = find_place(packing, group, bits, starts, s, &start);
      if (cu_seqlens && threadIdx.x % kWarp == 0) {
        cu_seqlens[s] = start;
        if (s + 1 == sequences) cu_seqlens[sequences] = static_cast<int32_t>(packing.total);
      }
    }
    if (threadIdx.x % kWarp == 0) places[m] = place;
  }
  __syncthreads();
}

template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    pack_tokens_kernel(Packing packing, const T* __restrict__ tokens,  // [B, Q + P, width]
                       const int32_t* __restrict__ bits,               // [B, M, W]
                       const int32_t* __restrict__ starts,             // [B·M + 1], or null: in pairs
                       int32_t* __restrict__ cu_seqlens,               // [B·M + 1], written in pairs
                       T* __restrict__ rows) {                         // [T, width]
  __shared__ Place places[kCoalitions];
  const int64_t chunks = ceil_div(packing.coalitions, kCoalitions), block = blockIdx.x;
  const int64_t index = block / chunks % packing.groups(), image = block / chunks / packing.groups();
  const Group group = group_at(packing, index);
  find_places(packing, group, bits, starts, image, block % chunks * kCoalitions,
              index == 0 ? cu_seqlens : nullptr, places);
  const int count = static_cast<int>(
      min(static_cast<int64_t>(kCoalitions), packing.coalitions - block % chunks * kCoalitions));
  uint32_t wanted = 0;
  for (int m = 0; m < count; ++m) wanted |= places[m].present;
  const T* from = tokens + (image * (packing.prefix + packing.players) + group.token) * packing.width;
  const int vectors = static_cast<int>(packing.width / size);
  for (int i = threadIdx.x; i < group.count * vectors; i += kThreads) {
    const int token = i / vectors, at = i % vectors * size;
    if (!(wanted >> token & 1u)) continue;
    const Vector<T, size> values = load_vector<size>(from + token * packing.width + at);
#pragma unroll 4
    for (int m = 0; m < count; ++m) {
      const Place place = places[m];
      const int64_t row = row_of(place, token);
      // Where the caller has said how many rows there are, more tokens may be present.
      if ((place.present >> token & 1u) && row < packing.total)
        store_vector(rows + row * packing.width + at, values);
    }
  }
}

// out[b, t] = Σ grad[row of t in coalition m of image b], in the order of m.
// Eight blocks a multiprocessor: for a ninth the compiler would spill registers.
template <typename T, int size>
__global__ void __launch_bounds__(kThreads, 8)
    pack_tokens_backward_kernel(Packing packing, const T* __restrict__ grad,  // [T, D]
                                const int32_t* __restrict__ bits,             // [B, M, W]
                                const int32_t* __restrict__ cu_seqlens,       // [B·M + 1]
                                T* __restrict__ out) {                        // [B, Q + P, D]
  __shared__ Place places[kCoalitions];
  const int64_t image = blockIdx.x / packing.groups();
  const Group group = group_at(packing, blockIdx.x % packing.groups());
  T* to = out + (image * (packing.prefix + packing.players) + group.token) * packing.width;
  const int vectors = static_cast<int>(packing.width / size), values = group.count * vectors;
  for (int i = threadIdx.x; i - static_cast<int>(threadIdx.x) < values; i += kThreads) {
    const int token = i / vectors, at = i % vectors * size;
    accumulate_t<T> sum[size] = {};
    for (int64_t first = 0; first < packing.coalitions; first += kCoalitions) {
      // One chunk of coalitions is looked up once.
      if (packing.coalitions > kCoalitions || i < kThreads) {
        __syncthreads();
        find_places(packing, group, bits, cu_seqlens, image, first, nullptr, places);
      }
      // Threads past the last value help to look up places only.
      const int left = static_cast<int>(min(static_cast<int64_t>(kCoalitions), packing.coalitions - first));
      const int count = i < values ? left : 0;
      for (int m = 0; m < count; m += kTogether) {
        Vector<T, size> read[kTogether] = {};
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
          const Place place = places[m + j];
          const int64_t row = row_of(place, token);
          const bool present = (place.present >> token & 1u) && row < packing.total;
          if (present) read[j] = load_vector<size>(grad + row * packing.width + at);
        }
#pragma unroll
        for (int j = 0; j < kTogether; ++j) {
#pragma unroll
          for (int k = 0; k < size; ++k) sum[k] += static_cast<accumulate_t<T>>(read[j].values[k]);
        }
      }
    }
    if (i >= values) continue;
    Vector<T, size> result;
#pragma unroll
    for (int k = 0; k < size; ++k) result.values[k] = static_cast<T>(sum[k]);
    store_vector(to + token * packing.width + at, result);
  }
}

// cu_seqlens of unpaired coalitions, and T in 64 bits; one block, a sequence a thread.
__global__ void __launch_bounds__(kScanThreads)
    count_rows_kernel(Packing packing, const int32_t* __restrict__ bits,  // [B·M, W]
                      int32_t* __restrict__ cu_seqlens,                   // [B·M + 1]
                      int64_t* __restrict__ total) {                      // [1], or null
  __shared__ int64_t warp_rows[kScanThreads / kWarp];
  const int64_t sequences = packing.images * packing.coalitions;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t rows = 0;
  for (int64_t first = 0; first < sequences; first += kScanThreads) {
    const int64_t s = first + threadIdx.x;
    int64_t length = s < sequences ? packing.prefix : 0;
    for (int64_t word = 0; s < sequences && word < packing.bit_words; ++word) {
      const uint32_t present = static_cast<uint32_t>(bits[s * packing.bit_words + word]);
      length += __popc(present & valid_bits(word, packing.players));
    }
    for (int distance = 1; distance < kWarp; distance *= 2) {
      const int64_t before = __shfl_up_sync(kAllLanes, length, distance);
      if (lane >= distance) length += before;
    }
    if (lane == kWarp - 1) warp_rows[warp] = length;
    __syncthreads();
    int64_t end = rows + length;
    for (int w = 0; w < kScanThreads / kWarp; ++w) {
      if (w < warp) end += warp_rows[w];
      rows += warp_rows[w];
    }
    if (s < sequences) cu_seqlens[s + 1] = static_cast<int32_t>(end);
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    cu_seqlens[0] = 0;
    if (total) *total = rows;
  }
}

// T; the host waits for it only where neither pairs nor the caller (`given`, else −1) have said it.
int64_t count_rows(const Packing& packing, const Tensor& bits, int64_t given, Tensor& cu_seqlens) {
  if (packing.paired)
    return packing.images * (packing.coalitions / 2) * (packing.players + 2 * packing.prefix);
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  int32_t* starts = cu_seqlens.mutable_data_ptr<int32_t>();
  if (given >= 0) {
    launch("pack_tokens", count_rows_kernel, bits, 1, kScanThreads, 0, packing, bit_data, starts,
           static_cast<int64_t*>(nullptr));
    return given;
  }
  Tensor total = torch::stable::empty({1}, ScalarType::Long, std::nullopt, bits.device());
  launch("pack_tokens", count_rows_kernel, bits, 1, kScanThreads, 0, packing, bit_data, starts,
         total.mutable_data_ptr<int64_t>());
  return read_back("pack_tokens", total.const_data_ptr<int64_t>(), total);
}

std::tuple<Tensor, Tensor> pack_tokens(const Tensor& tokens, const Tensor& bits, int64_t prefix, bool paired,
                                       int64_t given) {
  const Tensor source = torch::stable::contiguous(tokens), coalitions = torch::stable::contiguous(bits);
  // Values are moved as pairs of bytes, whatever their type.
  using Unit = uint16_t;
  const int64_t width = tokens.size(2) * (tokens.element_size() / sizeof(Unit));
  Packing packing = make_packing(coalitions, tokens.size(1), prefix, width, paired);
  const int64_t sequences = packing.images * packing.coalitions;
  Tensor cu_seqlens = torch::stable::empty({sequences + 1}, ScalarType::Int, std::nullopt, tokens.device());
  if (sequences == 0) torch::stable::zero_(cu_seqlens);
  packing.total =
      sequences == 0 ? std::max<int64_t>(given, 0) : count_rows(packing, coalitions, given, cu_seqlens);
  STD_TORCH_CHECK(
      packing.total <= INT32_MAX,
      "pack_tokens: the packed batch must have fewer than 2^31 rows. Pass fewer images or coalitions.");
  Tensor rows = torch::stable::empty({packing.total, tokens.size(2)}, tokens.scalar_type(), std::nullopt,
                                     tokens.device());
  if (given >= 0) torch::stable::zero_(rows);
  const Unit* from = static_cast<const Unit*>(source.const_data_ptr());
  dispatch_vector(vector_size(width, from), [&]<int size>() {
    if constexpr (size <= kVectorBytes / sizeof(Unit)) {
      launch("pack_tokens", pack_tokens_kernel<Unit, size>, rows,
             packing.images * packing.groups() * ceil_div(packing.coalitions, kCoalitions), kThreads, 0,
             packing, from, coalitions.const_data_ptr<int32_t>(),
             static_cast<const int32_t*>(paired ? nullptr : cu_seqlens.const_data_ptr<int32_t>()),
             paired ? cu_seqlens.mutable_data_ptr<int32_t>() : nullptr,
             static_cast<Unit*>(rows.mutable_data_ptr()));
    }
  });
  return {rows, cu_seqlens};
}

// grad (T, D) → (B, length, D).
Tensor pack_tokens_backward(const Tensor& grad, const Tensor& bits, const Tensor& cu_seqlens, int64_t prefix,
                            int64_t length, bool paired) {
  const Tensor source = torch::stable::contiguous(grad), coalitions = torch::stable::contiguous(bits);
  const Tensor starts = torch::stable::contiguous(cu_seqlens);
  Packing packing = make_packing(coalitions, length, prefix, grad.size(1), paired);
  packing.total = grad.size(0);
  STD_TORCH_CHECK(
      starts.size(0) == packing.images * packing.coalitions + 1,
      "pack_tokens_backward: argument `cu_seqlens` must be what pack_tokens made of these `bits`.");
  Tensor out = torch::stable::empty({packing.images, length, packing.width}, grad.scalar_type(), std::nullopt,
                                    grad.device());
  if (out.numel() == 0) return out;
  dispatch_floating(grad.scalar_type(), "pack_tokens_backward", [&]<typename T>() {
    const T* from = source.const_data_ptr<T>();
    dispatch_vector(vector_size(packing.width, from), [&]<int size>() {
      if constexpr (size <= kVectorBytes / sizeof(T)) {
        launch("pack_tokens_backward", pack_tokens_backward_kernel<T, size>, out,
               packing.images * packing.groups(), kThreads, 0, packing, from,
               coalitions.const_data_ptr<int32_t>(), starts.const_data_ptr<int32_t>(),
               out.mutable_data_ptr<T>());
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("pack_tokens", TORCH_BOX(&fastshap::pack_tokens));
  m.impl("pack_tokens_backward", TORCH_BOX(&fastshap::pack_tokens_backward));
}
