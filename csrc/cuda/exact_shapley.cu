// exact_shapley: every value is read once, by neighbouring threads, and costs three operations in float64.
//
// With kernel weights c(s) = 1 / ((P − 1) · C(P − 2, s − 1)) and sums_p = Σ c(|S|) (v(S) − v(∅)) over the S ≠
// N that hold p, φ_p = (v(N) − v(∅)) / P + sums_p − mean of sums: a coalition's value is weighted once, not
// once a player. And no player is added to for every coalition. The bits of a coalition's index are, from the
// lowest up,
//
//   row      which of the rows of threads reads it: rows · classes neighbours in memory at a time
//   kept     which of a thread's 8 running sums it goes to
//   step     which of the 8 loads of a thread it is among: their sum goes to the players of the step
//   slice    which thread block reads it
//
// so that a value is added to two sums: its own of the eight, and its step's. A second kernel adds up the
// slices. Bytes set the time where float64 runs at half the rate of float32; where it runs at 1/64, the
// operations do.

#include <algorithm>
#include <vector>

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxPlayers = 20;
constexpr int kMaxKeptBits = 3;  // 8 loads of a thread in flight
constexpr int kMaxStepBits = 6;
constexpr int kMaxColumns = 64;   // classes at a time
constexpr int kColumnStep = 8;    // where classes are split, a warp's loads start at whole sectors of float
constexpr int64_t kBlocks = 512;  // enough to fill a device: with longer slices, fewer sums are written
constexpr int kItems = kWarp;     // values that one block of the second kernel makes

struct Game {
  int players;      // P
  int64_t images;   // product of the leading dimensions
  int64_t classes;  // K, the step from one coalition to the next
  int columns;      // classes of a block
  int64_t tiles;    // blocks for all classes of a slice
  int row_bits;     // players of each part of the index
  int step_bits;
  int64_t slices;                   // blocks for all coalitions of an image
  double weights[kMaxPlayers + 1];  // by coalition size; 0 for ∅ and N

  // The sums of a block's rows add up in two levels, of about √rows each.
  __host__ __device__ int inner_bits() const { return row_bits / 2; }
  __host__ __device__ int outer_bits() const { return row_bits - inner_bits(); }
};

// Where a block is.
struct Place {
  int64_t image;
  int64_t slice;
  int64_t first_class;
  int columns;  // of those, in the tile
};

__device__ __forceinline__ Place place_of(const Game& game, int64_t block) {
  Place place;
  place.first_class = block % game.tiles * game.columns;
  place.slice = block / game.tiles % game.slices;
  place.image = block / game.tiles / game.slices;
  place.columns = static_cast<int>(min(static_cast<int64_t>(game.columns), game.classes - place.first_class));
  return place;
}

// What a thread adds up over its coalitions, of one class: `sums` is [1 + players of kept and step].
template <typename T, int kept_bits>
__device__ __forceinline__ void add_values(const Game& game, const double* weights, const T* values,
                                           int64_t first, double null,
                                           double (&sums)[1 + kept_bits + kMaxStepBits]) {
  constexpr int kept = 1 << kept_bits;
  double own[kept] = {};
#pragma unroll
  for (int i = 0; i < 1 + kept_bits + kMaxStepBits; ++i) sums[i] = 0.0;
#pragma unroll 1
  for (int step = 0; step < 1 << game.step_bits; ++step) {
    const int64_t coalition = first + (static_cast<int64_t>(step) << (game.row_bits + kept_bits));
    const T* from = values + coalition * game.classes;
    T loaded[kept];
#pragma unroll
    for (int j = 0; j < kept; ++j)
      loaded[j] = from[(static_cast<int64_t>(j) << game.row_bits) * game.classes];
    const double* by_size = weights + __popc(static_cast<unsigned>(coalition));
    double total = 0.0;
#pragma unroll
    for (int j = 0; j < kept; ++j) {
      const double gain = static_cast<double>(loaded[j]) - null, weight = by_size[__popc(j)];
      own[j] = fma(weight, gain, own[j]);
      total = fma(weight, gain, total);
    }
#pragma unroll
    for (int i = 0; i < kMaxStepBits; ++i) {
      if (step >> i & 1) sums[1 + kept_bits + i] += total;
    }
  }
#pragma unroll
  for (int j = 0; j < kept; ++j) {
    sums[0] += own[j];
#pragma unroll
    for (int i = 0; i < kept_bits; ++i) {
      if (j >> i & 1) sums[1 + i] += own[j];
    }
  }
}

// What a block keeps in shared memory.
struct Sums {
  double* threads;  // [sums, rows, columns]
  double* outer;    // [sums, outer rows, columns]: over the inner rows
  double* inner;    // [inner rows, columns]: of all values, over the outer rows
  double* players;  // [P + 1, columns], in the place of `threads`; the last is their mean
};

__device__ __forceinline__ Sums sums_in(double* memory, const Game& game, int count) {
  Sums sums;
  sums.threads = sums.players = memory;
  sums.outer = memory + max(count << game.row_bits, game.players + 1) * game.columns;
  sums.inner = sums.outer + (count << game.outer_bits()) * game.columns;
  return sums;
}

__device__ __forceinline__ void add_rows(const Game& game, const Sums& sums, int count) {
  const int outer_rows = 1 << game.outer_bits(), inner_rows = 1 << game.inner_bits(), columns = game.columns;
  const int outer_items = count * outer_rows * columns;
  for (int item = threadIdx.x; item < outer_items + inner_rows * columns; item += blockDim.x) {
    const int column = item % columns, row = item / columns;
    double sum = 0.0;
    if (item < outer_items) {
      for (int i = 0; i < inner_rows; ++i) sum += sums.threads[(row * inner_rows + i) * columns + column];
      sums.outer[item] = sum;
    } else {
      const int inner = row - count * outer_rows;
      for (int i = 0; i < outer_rows; ++i) sum += sums.threads[(i * inner_rows + inner) * columns + column];
      sums.inner[inner * columns + column] = sum;
    }
  }
}

// The sum over `rows` [rows, columns] with the bit set, or over all of them.
__device__ __forceinline__ double add_column(const double* rows, int count, int columns, int bit) {
  double sum = 0.0;
  for (int i = 0; i < count; ++i) {
    if (bit < 0 || (i >> bit & 1)) sum += rows[i * columns];
  }
  return sum;
}

// The player's sum over the coalitions of the block.
__device__ __forceinline__ double player_sum(const Game& game, const Sums& sums, int player, int column,
                                             int64_t slice, int count) {
  const int outer_rows = 1 << game.outer_bits(), inner_bits = game.inner_bits();
  const double* all = sums.outer + column;
  if (player < inner_bits) return add_column(sums.inner + column, 1 << inner_bits, game.columns, player);
  if (player < game.row_bits) return add_column(all, outer_rows, game.columns, player - inner_bits);
  const int number = 1 + player - game.row_bits;
  if (number < count)
    return add_column(all + number * outer_rows * game.columns, outer_rows, game.columns, -1);
  return slice >> (number - count) & 1 ? add_column(all, outer_rows, game.columns, -1) : 0.0;
}

template <typename T, int kept_bits>
__global__ void __launch_bounds__(kThreads, 4)
    exact_shapley_kernel(Game game, const T* __restrict__ values,  // [images, 2^P, K]
                         double* __restrict__ partial) {           // [images, slices, P, K]
  FASTSHAP_SHARED_MEMORY(memory);
  double* weights = reinterpret_cast<double*>(memory);  // [P + 1]
  const Place place = place_of(game, blockIdx.x);
  const int row = threadIdx.x / game.columns, column = threadIdx.x % game.columns;
  const int count = 1 + kept_bits + game.step_bits;
  const Sums sums = sums_in(weights + kMaxPlayers + 1, game, count);
  if (static_cast<int>(threadIdx.x) <= game.players) weights[threadIdx.x] = game.weights[threadIdx.x];
  __syncthreads();
  if (row < 1 << game.row_bits && column < place.columns) {
    const T* from = values + (place.image << game.players) * game.classes + place.first_class + column;
    const int64_t first = place.slice << (game.row_bits + kept_bits + game.step_bits) | row;
    double of_thread[1 + kept_bits + kMaxStepBits];
    add_values<T, kept_bits>(game, weights, from, first, static_cast<double>(*from), of_thread);
#pragma unroll
    for (int i = 0; i < 1 + kept_bits + kMaxStepBits; ++i) {
      if (i < count) sums.threads[((i << game.row_bits) + row) * game.columns + column] = of_thread[i];
    }
  }
  __syncthreads();
  add_rows(game, sums, count);
  __syncthreads();
  for (int item = threadIdx.x; item < game.players * game.columns; item += blockDim.x) {
    const int player = item / game.columns;
    sums.players[item] = player_sum(game, sums, player, item % game.columns, place.slice, count);
  }
  __syncthreads();
  double* mean = sums.players + game.players * game.columns;
  for (int k = threadIdx.x; k < place.columns; k += blockDim.x) {
    mean[k] = add_column(sums.players + k, game.players, game.columns, -1) / game.players;
  }
  __syncthreads();
  double* to =
      partial + (place.image * game.slices + place.slice) * game.players * game.classes + place.first_class;
  for (int item = threadIdx.x; item < game.players * game.columns; item += blockDim.x) {
    const int player = item / game.columns, k = item % game.columns;
    if (k < place.columns) to[player * game.classes + k] = sums.players[item] - mean[k];
  }
}

// Warp w adds up the w-th eighth of the slices; the eighths follow in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_slices_kernel(Game game, const T* __restrict__ values,  // [images, 2^P, K]
                      const double* __restrict__ partial,       // [images, slices, P, K]
                      T* __restrict__ out) {                    // [images, P, K]
  constexpr int parts = kThreads / kItems;
  __shared__ double sums[parts][kItems];
  const int64_t size = game.players * game.classes, blocks = ceil_div(size, kItems);
  const int64_t image = blockIdx.x / blocks, item = blockIdx.x % blocks * kItems + threadIdx.x % kItems;
  const int part = threadIdx.x / kItems;
  if (item < size) {
    const double* from = partial + image * game.slices * size + item;
    double sum = 0.0;
#pragma unroll 4
    for (int64_t s = game.slices * part / parts; s < game.slices * (part + 1) / parts; ++s)
      sum += from[s * size];
    sums[part][threadIdx.x % kItems] = sum;
  }
  __syncthreads();
  if (part > 0 || item >= size) return;
  const T* first = values + (image << game.players) * game.classes + item % game.classes;
  const T* last = first + ((int64_t{1} << game.players) - 1) * game.classes;
  double sum = (static_cast<double>(*last) - static_cast<double>(*first)) / game.players;
  for (int i = 0; i < parts; ++i) sum += sums[i][threadIdx.x];
  out[image * size + item] = static_cast<T>(sum);
}

void set_weights(Game& game) {
  double binomial = 1.0;  // C(P − 2, s − 1): a whole number below 2^53 for P ≤ 20
  for (int size = 0; size <= kMaxPlayers; ++size) game.weights[size] = 0.0;
  for (int size = 1; size < game.players; ++size) {
    game.weights[size] = 1.0 / ((game.players - 1) * binomial);
    binomial = binomial * (game.players - 1 - size) / size;
  }
}

Game make_game(int players, int64_t images, int64_t classes, int kept_bits) {
  Game game;
  game.players = players;
  game.images = images;
  game.classes = classes;
  game.tiles = ceil_div(classes, kMaxColumns);
  game.columns = static_cast<int>(classes);
  if (game.tiles > 1) {
    game.columns = static_cast<int>(ceil_div(ceil_div(classes, game.tiles), kColumnStep) * kColumnStep);
    game.tiles = ceil_div(classes, game.columns);
  }
  int left = players - kept_bits;
  for (game.row_bits = 0; left > 0 && (2 << game.row_bits) * game.columns <= kThreads; --left)
    ++game.row_bits;
  const int64_t blocks = images * game.tiles;
  for (game.step_bits = 0; left > 0 && game.step_bits < kMaxStepBits && (blocks << (left - 1)) >= kBlocks;
       --left) {
    ++game.step_bits;
  }
  game.slices = int64_t{1} << left;
  set_weights(game);
  return game;
}

template <typename T, int kept_bits>
void explain(const Tensor& values, int players, int64_t images, Tensor& out) {
  const Game game = make_game(players, images, values.size(values.dim() - 1), kept_bits);
  const int rows = 1 << game.row_bits, count = 1 + kept_bits + game.step_bits;
  const int64_t threads = ceil_div(rows * game.columns, kWarp) * kWarp;
  const int64_t sums =
      (max(count * rows, players + 1) + (count << game.outer_bits()) + (1 << game.inner_bits()));
  Tensor partial = torch::stable::empty({images, game.slices, players, game.classes}, ScalarType::Double,
                                        std::nullopt, values.device());
  launch("exact_shapley", exact_shapley_kernel<T, kept_bits>, out, images * game.slices * game.tiles,
         static_cast<int>(threads), (kMaxPlayers + 1 + sums * game.columns) * sizeof(double), game,
         values.const_data_ptr<T>(), partial.mutable_data_ptr<double>());
  launch("exact_shapley", add_slices_kernel<T>, out, images * ceil_div(players * game.classes, kItems),
         kThreads, 0, game, values.const_data_ptr<T>(), partial.const_data_ptr<double>(),
         out.mutable_data_ptr<T>());
}

Tensor exact_shapley(const Tensor& values) {
  const Tensor rows = torch::stable::contiguous(values);
  const int64_t ndim = rows.dim(), coalitions = rows.size(ndim - 2), classes = rows.size(ndim - 1);
  int players = 0;
  while (int64_t{1} << players < coalitions) ++players;
  std::vector<int64_t> shape;
  int64_t images = 1;
  for (int64_t i = 0; i < ndim - 2; ++i) {
    shape.push_back(rows.size(i));
    images *= rows.size(i);
  }
  shape.insert(shape.end(), {players, classes});
  Tensor out = torch::stable::new_empty(rows, shape);
  if (out.numel() == 0) return out;
  dispatch_floating(rows.scalar_type(), "exact_shapley", [&]<typename T>() {
    if (players >= kMaxKeptBits) return explain<T, kMaxKeptBits>(rows, players, images, out);
    if (players == 2) return explain<T, 2>(rows, players, images, out);
    explain<T, 1>(rows, players, images, out);
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("exact_shapley", TORCH_BOX(&fastshap::exact_shapley));
}
