// Sums over the players of every coalition on a CUDA device, from one pass over their features, and the same
// backward.
//
// Forward: the warps of a block share out the players of an image's tile: a lane keeps the sums of its
// neighbouring features for every coalition of a chunk in registers, so that a value is read once, in up to
// 16 bytes at a time, and each coalition that it is in costs one addition. Which those are is one 32-bit mask
// a player, the same for the whole warp. At the end the warps' sums are added through shared memory, in the
// order of the warps. Backward: a warp keeps the sums of a few players in registers while it reads the
// gradients of the coalitions, which the other warps of the block read too and stay in the first-level cache;
// each player's row is written once.
#pragma once

#include "fastshap/cuda.h"

namespace fastshap {

constexpr int kSumWarps = 8;
constexpr int kSumThreads = kSumWarps * kWarp;
constexpr int kSumPlayers = 4;  // rows that a warp fetches together

struct SumLayout {
  int64_t images;       // B
  int64_t players;      // P
  int64_t coalitions;   // M
  int64_t features;     // L
  int64_t image_step;   // from one image's features to the next's
  int64_t player_step;  // from one player's features to the next's
};

// As it is where features lie one after the other: a slice of the players (tokens without their prefix) is no
// copy.
inline Tensor with_whole_rows(const Tensor& features) {
  return features.stride(2) == 1 ? features : torch::stable::contiguous(features);
}

inline SumLayout make_sum_layout(const Tensor& rows, const Tensor& bits) {
  return {rows.size(0), rows.size(1), bits.size(1), rows.size(2), rows.stride(0), rows.stride(1)};
}

// masks[p] bit i = player p is in coalition first + i, for up to 32 coalitions: a warp transposes a word of
// each.
__device__ inline void transpose_bits(const SumLayout& layout, const int32_t* bits, int64_t first, int chunk,
                                      uint32_t* masks) {
  const int lane = threadIdx.x % kWarp;
  const int players = static_cast<int>(layout.players), bit_words = (players + kWarp - 1) / kWarp;
  for (int w = threadIdx.x / kWarp; w < bit_words; w += kSumWarps) {
    const bool exists = lane < chunk && first + lane < layout.coalitions;
    const uint32_t word = exists ? static_cast<uint32_t>(bits[(first + lane) * bit_words + w]) : 0u;
    uint32_t mine = 0;
#pragma unroll
    for (int p = 0; p < kWarp; ++p) {
      const uint32_t members = __ballot_sync(kAllLanes, (word >> p & 1u) != 0);
      if (lane == p) mine = members;
    }
    if (w * kWarp + lane < players) masks[w * kWarp + lane] = mine;
  }
}

// sum[m] += the features of this warp's players that are in coalition m, in the order of the players.
template <typename From, int chunk, int columns>
__device__ inline void add_players(const SumLayout& layout, const From* features, const uint32_t* masks,
                                   accumulate_t<From> (&sum)[chunk][columns]) {
  const int players = static_cast<int>(layout.players);
  for (int player = threadIdx.x / kWarp; player < players; player += kSumPlayers * kSumWarps) {
    Vector<From, columns> rows[kSumPlayers] = {};
    uint32_t members[kSumPlayers] = {};
#pragma unroll
    for (int i = 0; i < kSumPlayers; ++i) {
      const int p = player + i * kSumWarps;
      if (p >= players) continue;
      members[i] = masks[p];
      rows[i] = load_vector<columns>(features + p * layout.player_step);
    }
#pragma unroll
    for (int i = 0; i < kSumPlayers; ++i) {
#pragma unroll
      for (int m = 0; m < chunk; ++m) {
        if ((members[i] >> m & 1u) == 0) continue;
#pragma unroll
        for (int c = 0; c < columns; ++c) sum[m][c] += static_cast<accumulate_t<From>>(rows[i].values[c]);
      }
    }
  }
}

// finish(row of (B, M), feature, sum, whether there is such a sum) by whole warps on neighbouring features of
// one row.
template <typename From, int chunk, int columns, typename Finish>
__global__ void __launch_bounds__(kSumThreads)
    coalition_sums_kernel(SumLayout layout,
                          const From* __restrict__ features,  // [B, P, L]
                          const int32_t* __restrict__ bits,   // [B, M, W]
                          Finish finish) {
  using Sum = accumulate_t<From>;
  constexpr int tile = kWarp * columns, rows = kSumThreads / tile;  // rows that the block adds up together
  static_assert(chunk <= 32 && chunk % rows == 0);
  FASTSHAP_SHARED_MEMORY(memory);
  Sum* partial = reinterpret_cast<Sum*>(memory);  // [warps][rows][tile], and before it the masks
  uint32_t* masks = reinterpret_cast<uint32_t*>(memory);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  // Within an image 32 bits count: 64 would take registers from the sums.
  const unsigned tiles = ceil_div(layout.features, tile), chunks = ceil_div(layout.coalitions, chunk);
  const int64_t image = blockIdx.x / (chunks * tiles);
  const int start = blockIdx.x / chunks % tiles * tile, first = blockIdx.x % chunks * chunk;
  const int column = start + lane * columns;
  transpose_bits(layout, bits + image * layout.coalitions * ceil_div(layout.players, kWarp), first, chunk,
                 masks);
  __syncthreads();
  Sum sum[chunk][columns] = {};
  if (column < layout.features) {
    add_players<From, chunk, columns>(layout, features + image * layout.image_step + column, masks, sum);
  }
#pragma unroll
  for (int m = 0; m < chunk; m += rows) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < rows; ++r) {
      Vector<Sum, columns> mine;
      for (int c = 0; c < columns; ++c) mine.values[c] = sum[m + r][c];
      store_vector(partial + (warp * rows + r) * tile + lane * columns, mine);
    }
    __syncthreads();
    const int r = threadIdx.x / tile, at = threadIdx.x % tile;
    Sum total = 0;
#pragma unroll
    for (int w = 0; w < kSumWarps; ++w) total += partial[w * kSumThreads + threadIdx.x];
    const int coalition = first + m + r;
    finish(image * layout.coalitions + coalition, start + at, total,
           coalition < layout.coalitions && start + at < layout.features);
  }
}

template <typename From, int chunk, int columns, typename Finish>
void launch_sums(const char* op, const SumLayout& layout, const Tensor& rows, const Tensor& bits,
                 Finish finish) {
  const int64_t blocks =
      layout.images * ceil_div(layout.coalitions, chunk) * ceil_div(layout.features, kWarp * columns);
  const int64_t partial = kSumWarps * kSumThreads * sizeof(accumulate_t<From>);
  const int64_t masks = layout.players * sizeof(uint32_t);
  launch(op, coalition_sums_kernel<From, chunk, columns, Finish>, rows, blocks, kSumThreads,
         masks > partial ? masks : partial, layout, rows.const_data_ptr<From>(),
         bits.const_data_ptr<int32_t>(), finish);
}

// Sums every coalition of every image; `rows` are features with whole rows, `bits` contiguous.
template <typename From, typename Finish>
void sum_coalitions(const char* op, const Tensor& rows, const Tensor& bits, Finish finish) {
  constexpr int few = 8, many = 32;                    // coalitions of a chunk
  constexpr int widest = kVectorBytes / sizeof(From);  // features of a lane
  constexpr int narrow =
      sizeof(accumulate_t<From>) == 8 ? 1 : 2;  // those that leave registers for many coalitions
  const SumLayout layout = make_sum_layout(rows, bits);
  const auto fits = [&](int64_t columns) {
    return (layout.features | layout.image_step | layout.player_step) % columns == 0 &&
           reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % (columns * sizeof(From)) == 0;
  };
  if (layout.coalitions <= few) {
    return fits(widest) ? launch_sums<From, few, widest>(op, layout, rows, bits, finish)
                        : launch_sums<From, few, 1>(op, layout, rows, bits, finish);
  }
  return fits(narrow) ? launch_sums<From, many, narrow>(op, layout, rows, bits, finish)
                      : launch_sums<From, many, 1>(op, layout, rows, bits, finish);
}

// Players whose sums a warp keeps; they share a word of bits.
template <typename Sum, int columns>
constexpr int scatter_players = columns == 8 || sizeof(Sum) == 8 ? 8
                                : columns == 1                   ? 32
                                                                 : 16;

template <typename From, typename To, int columns>
__global__ void __launch_bounds__(kSumThreads, 2)
    coalition_scatter_kernel(SumLayout layout,
                             const From* __restrict__ grad,                 // [B, M, L]
                             const accumulate_t<From>* __restrict__ scale,  // [B, M] or null
                             const int32_t* __restrict__ bits,              // [B, M, W]
                             To* __restrict__ out) {                        // [B, P, L]
  using Sum = accumulate_t<From>;
  constexpr int tile = kWarp * columns, batch = scatter_players<Sum, columns>;
  const unsigned tiles = ceil_div(layout.features, tile),
                 blocks = ceil_div(layout.players, batch * kSumWarps);
  const int64_t image = blockIdx.x / (blocks * tiles);
  const int column = blockIdx.x / blocks % tiles * tile + threadIdx.x % kWarp * columns;
  const int first = (blockIdx.x % blocks * kSumWarps + threadIdx.x / kWarp) * batch;
  const int players = static_cast<int>(layout.players), coalitions = static_cast<int>(layout.coalitions);
  if (first >= players || column >= layout.features) return;
  const int bit_words = (players + kWarp - 1) / kWarp;
  const int32_t* word = bits + image * coalitions * bit_words + first / 32;
  Sum sum[batch][columns] = {};
#pragma unroll 4
  for (int m = 0; m < coalitions; ++m) {
    const int64_t row = image * coalitions + m;
    const Vector<From, columns> values = load_vector<columns>(grad + row * layout.features + column);
    const uint32_t present = static_cast<uint32_t>(word[m * bit_words]) >> (first % 32);
    const Sum factor = scale == nullptr ? Sum(1) : scale[row];
    Sum scaled[columns];
#pragma unroll
    for (int c = 0; c < columns; ++c) scaled[c] = static_cast<Sum>(values.values[c]) * factor;
#pragma unroll
    for (int p = 0; p < batch; ++p) {
      if ((present >> p & 1u) == 0) continue;
#pragma unroll
      for (int c = 0; c < columns; ++c) sum[p][c] += scaled[c];
    }
  }
#pragma unroll
  for (int p = 0; p < batch; ++p) {
    if (first + p >= players) break;
    Vector<To, columns> result;
#pragma unroll
    for (int c = 0; c < columns; ++c) result.values[c] = static_cast<To>(sum[p][c]);
    stream_vector(out + (image * layout.players + first + p) * layout.features + column, result);
  }
}

template <typename From, typename To, int columns>
void launch_scatter(const char* op, const SumLayout& layout, const Tensor& grad,
                    const accumulate_t<From>* scale, const Tensor& bits, Tensor& out) {
  constexpr int players = scatter_players<accumulate_t<From>, columns> * kSumWarps;
  const int64_t blocks =
      layout.images * ceil_div(layout.players, players) * ceil_div(layout.features, kWarp * columns);
  launch(op, coalition_scatter_kernel<From, To, columns>, out, blocks, kSumThreads, 0, layout,
         grad.const_data_ptr<From>(), scale, bits.const_data_ptr<int32_t>(), out.mutable_data_ptr<To>());
}

// out[b, p] = sum over the coalitions m that player p is in of scale[b, m] * grad[b, m], with scale 1 where
// it is null; all contiguous.
template <typename From, typename To>
void scatter_coalitions(const char* op, const Tensor& grad, const accumulate_t<From>* scale,
                        const Tensor& bits, Tensor& out) {
  constexpr int widest = kVectorBytes / (sizeof(From) > sizeof(To) ? sizeof(From) : sizeof(To));
  SumLayout layout = make_sum_layout(out, bits);
  if (layout.images * layout.players * layout.features == 0) return;
  const bool fits = layout.features % widest == 0 &&
                    reinterpret_cast<uintptr_t>(grad.const_data_ptr()) % (widest * sizeof(From)) == 0;
  return fits ? launch_scatter<From, To, widest>(op, layout, grad, scale, bits, out)
              : launch_scatter<From, To, 1>(op, layout, grad, scale, bits, out);
}

}  // namespace fastshap
