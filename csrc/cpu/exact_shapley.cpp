// exact_shapley: every player's value in one pass over the coalitions.
//
// With kernel weights c(s) = 1 / ((P − 1) · C(P − 2, s − 1)) and sums_p = Σ c(|S|) (v(S) − v(∅)) over the S ≠
// N that hold p,
//
//   φ_p = (v(N) − v(∅)) / P + sums_p − mean of sums,
//
// so a coalition's value is weighted once, not once a player. And no player is added to for every coalition:
// the index splits into low and high bits, values add up per low part and per high part, players from those.

#include <algorithm>
#include <vector>

#include "fastshap/cpu.h"

namespace fastshap {
namespace {

constexpr int64_t max_low_players = 7;
// Classes at a time: the sums per low part, 128 × 64 doubles, stay in the second-level cache.
constexpr int64_t max_columns = 64;

struct Game {
  int64_t players;                 // P
  int64_t classes;                 // K, the step from one coalition to the next
  int64_t low_players;             // bits of the low part of an index
  std::vector<double> weights;     // [P + 1], by coalition size; 0 for ∅ and N
  std::vector<int64_t> low_sizes;  // [2^low_players], players in each low part
};

FASTSHAP_INLINE int64_t count_players(int64_t coalition) { return __builtin_popcountll(coalition); }

Game make_game(int64_t players, int64_t classes) {
  Game game{players, classes, std::min(players, max_low_players), std::vector<double>(players + 1, 0.0), {}};
  double binomial = 1.0;  // C(P − 2, s − 1): a whole number below 2^53 for P ≤ 20
  for (int64_t size = 1; size < players; ++size) {
    game.weights[size] = 1.0 / (static_cast<double>(players - 1) * binomial);
    binomial = binomial * static_cast<double>(players - 1 - size) / static_cast<double>(size);
  }
  for (int64_t low = 0; low < int64_t(1) << game.low_players; ++low) {
    game.low_sizes.push_back(count_players(low));
  }
  return game;
}

// Adds the weighted values of the coalitions with one high part to `low_sums` [low parts, columns] and to
// `high_sum` [columns].
template <typename T>
FASTSHAP_INLINE void add_values(const Game& game, const double* weights, const T* __restrict__ values,
                                int64_t columns, const double* __restrict__ null,
                                double* __restrict__ low_sums, double* __restrict__ high_sum) {
  for (int64_t low_size : game.low_sizes) {
    for (int64_t k = 0; k < columns; ++k) {
      const double gain = weights[low_size] * (static_cast<double>(values[k]) - null[k]);
      low_sums[k] += gain;
      high_sum[k] += gain;
    }
    values += game.classes;
    low_sums += columns;
  }
}

// sums[first + p] += part for every player p in `coalition`.
void add_to_players(int64_t coalition, int64_t first, int64_t columns, const double* part, double* sums) {
  for (int64_t left = coalition; left != 0; left &= left - 1) {
    double* sum = sums + (first + __builtin_ctzll(left)) * columns;
    for (int64_t k = 0; k < columns; ++k) sum[k] += part[k];
  }
}

// `columns` classes of one image. values [2^P, K], out [P, K], both at the first of these classes.
template <typename T>
void explain(const Game& game, const T* values, int64_t columns, T* out) {
  const int64_t low_parts = int64_t(1) << game.low_players;
  const int64_t high_parts = int64_t(1) << (game.players - game.low_players);
  std::vector<double> null(values, values + columns), high_sum(columns);
  std::vector<double> low_sums(low_parts * columns, 0.0), sums(game.players * columns, 0.0);
  for (int64_t high = 0; high < high_parts; ++high) {
    std::fill(high_sum.begin(), high_sum.end(), 0.0);
    FASTSHAP_CLONED(add_values(game, game.weights.data() + count_players(high),
                               values + high * low_parts * game.classes, columns, null.data(),
                               low_sums.data(), high_sum.data()));
    add_to_players(high, game.low_players, columns, high_sum.data(), sums.data());
  }
  for (int64_t low = 0; low < low_parts; ++low) {
    add_to_players(low, 0, columns, low_sums.data() + low * columns, sums.data());
  }
  const T* grand = values + (low_parts * high_parts - 1) * game.classes;
  for (int64_t k = 0; k < columns; ++k) {
    double sum = 0.0;
    for (int64_t p = 0; p < game.players; ++p) sum += sums[p * columns + k];
    const double shift = (static_cast<double>(grand[k]) - null[k] - sum) / static_cast<double>(game.players);
    for (int64_t p = 0; p < game.players; ++p) {
      out[p * game.classes + k] = static_cast<T>(sums[p * columns + k] + shift);
    }
  }
}

Tensor exact_shapley(const Tensor& values) {
  const Tensor rows = torch::stable::contiguous(values);
  const int64_t ndim = rows.dim(), coalitions = rows.size(ndim - 2), classes = rows.size(ndim - 1);
  const Game game = make_game(__builtin_ctzll(coalitions), classes);
  std::vector<int64_t> shape;
  int64_t images = 1;
  for (int64_t i = 0; i < ndim - 2; ++i) {
    shape.push_back(rows.size(i));
    images *= rows.size(i);
  }
  shape.insert(shape.end(), {game.players, classes});
  Tensor out = torch::stable::new_empty(rows, shape);
  const int64_t tiles = (classes + max_columns - 1) / max_columns;
  dispatch_floating(rows.scalar_type(), "exact_shapley", [&]<typename T>() {
    const T* value_data = rows.const_data_ptr<T>();
    T* out_data = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(0, images * tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t image = i / tiles, first = i % tiles * max_columns;
        explain(game, value_data + image * coalitions * classes + first,
                std::min(max_columns, classes - first), out_data + image * game.players * classes + first);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) { m.impl("exact_shapley", TORCH_BOX(&fastshap::exact_shapley)); }
