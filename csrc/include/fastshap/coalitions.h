// Sums over the players of every coalition, from one pass over their features.
//
// 32 players (one word of bits) of a strip of features stay in the first-level cache while each coalition
// adds up its own among them in registers; meanwhile the next 32 are fetched, a few cache lines for each
// coalition, because rows this far apart are not fetched ahead by the processor. Each sum has a fixed order,
// whatever the tiles and threads.
//
// Backward: four coalitions make 16 kinds of players, by which of the four they are in. The gradient of each
// kind is added up once, and a player's row is the sum of one kind's row for each four coalitions: no
// branches.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>
#include <vector>

#include "fastshap/cpu.h"

namespace fastshap {

constexpr int64_t word = 32;  // players that one word of bits picks from

struct alignas(64) CacheLine {
  char bytes[64];
};

// A strip is what one pass over the players adds up in registers: 256 bytes, in vectors of the clone's width.
template <typename Sum, int64_t kBytes>
struct Strip {
  typedef Sum Vector __attribute__((vector_size(kBytes), aligned(alignof(Sum)), may_alias));
  static constexpr int64_t lanes = kBytes / sizeof(Sum);
  static constexpr int64_t vectors = 256 / kBytes;
  Vector sums[vectors]{};

  FASTSHAP_INLINE void add(const Sum* row) {
#pragma GCC unroll 16
    for (int64_t i = 0; i < vectors; ++i) sums[i] += *reinterpret_cast<const Vector*>(row + i * lanes);
  }
  FASTSHAP_INLINE void store(Sum* to) const {
#pragma GCC unroll 16
    for (int64_t i = 0; i < vectors; ++i) *reinterpret_cast<Vector*>(to + i * lanes) = sums[i];
  }
};

template <typename Sum>
constexpr int64_t strip_width = 256 / sizeof(Sum);

struct Layout {
  int64_t images;      // B
  int64_t players;     // P
  int64_t coalitions;  // M
  int64_t features;    // L
  int64_t tile;        // features in a unit of work: whole strips whose sums stay in the second-level cache
};

inline Layout make_layout(int64_t images, int64_t players, int64_t coalitions, int64_t features) {
  constexpr int64_t width = strip_width<float>, most = 16 * width;
  const int64_t fitting = 8 * most / std::max<int64_t>(coalitions, 1) / width * width;
  const int64_t whole = (features + width - 1) / width * width;
  const int64_t tile = std::clamp(std::min(fitting, whole), width, most);
  return {images, players, coalitions, features, tile};
}

template <typename From, typename To>
FASTSHAP_INLINE void copy_run(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

FASTSHAP_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i, 0, 2);
}

// sum += Σ rows[i] over the set bits i, for one strip.
template <int64_t kBytes, typename Sum>
FASTSHAP_INLINE void add_present(const Sum* rows, int64_t step, uint32_t present, Sum* sum) {
  // The word's sum comes before the sum of all words: the rounding error grows with P / 32, not with P.
  Strip<Sum, kBytes> strip;
  for (; present != 0; present &= present - 1) strip.add(rows + std::countr_zero(present) * step);
  strip.add(sum);
  strip.store(sum);
}

// One tile of an image: sums[m] += Σ_p features[p] where player p is in coalition m; `sums` is (M, tile).
template <int64_t kBytes, typename From>
FASTSHAP_INLINE void pool_tile(const Layout& layout, const From* features, int64_t player_step,
                               const int32_t* bits, int64_t count, accumulate_t<From>* sums) {
  using Sum = accumulate_t<From>;
  constexpr int64_t width = strip_width<Sum>;
  const int64_t bit_words = words(layout.players);
  const int64_t share = (word + layout.coalitions - 1) / layout.coalitions;  // players to fetch per coalition
  Sum copies[word * width];
  for (int64_t w = 0; w < bit_words; ++w) {
    const From* block = features + w * word * player_step;
    const int64_t left = layout.players - w * word, players = std::min(word, left);
    const uint32_t valid = ~uint32_t(0) >> (word - players);
    for (int64_t start = 0; start < count; start += width) {
      const int64_t values = std::min(width, count - start);
      const Sum* rows = copies;
      int64_t step = width;
      if constexpr (std::is_same_v<From, Sum>) {
        if (values == width) rows = block + start, step = player_step;
      }
      if (rows == copies) {
        for (int64_t p = 0; p < players; ++p)
          copy_run(block + p * player_step + start, copies + p * width, values);
      }
      for (int64_t m = 0; m < layout.coalitions; ++m) {
        for (int64_t p = word + m * share; p < std::min(word + (m + 1) * share, std::min(2 * word, left));
             ++p) {
          prefetch(block + p * player_step + start, width * sizeof(From));
        }
        const uint32_t present = valid & static_cast<uint32_t>(bits[m * bit_words + w]);
        add_present<kBytes>(rows, step, present, sums + m * layout.tile + start);
      }
    }
  }
}

inline int64_t count_tiles(const Layout& layout) { return (layout.features + layout.tile - 1) / layout.tile; }

// body(image, first feature, number of features, zeroed sums) for every tile of every image.
template <typename Sum, typename Body>
void for_each_tile(const Layout& layout, int64_t rows, Body&& body) {
  const int64_t tiles = count_tiles(layout);
  torch::stable::parallel_for(0, layout.images * tiles, 1, [&](int64_t begin, int64_t end) {
    // From a cache line on: a vector that straddles two costs twice.
    std::vector<CacheLine> lines(rows * layout.tile * sizeof(Sum) / sizeof(CacheLine));
    Sum* sums = reinterpret_cast<Sum*>(lines.data());
    for (int64_t i = begin; i < end; ++i) {
      const int64_t start = i % tiles * layout.tile;
      std::fill(sums, sums + rows * layout.tile, Sum(0));
      body(i / tiles, start, std::min(layout.tile, layout.features - start), sums);
    }
  });
}

// finish(image, first feature, number of features, sums (M, tile)) for every tile of every image.
template <typename From, typename Finish>
void pool_images(const Layout& layout, const Tensor& features, const Tensor& bits, Finish&& finish) {
  using Sum = accumulate_t<From>;
  const From* feature_data = features.const_data_ptr<From>();
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  const int64_t image_step = features.stride(0), player_step = features.stride(1);
  for_each_tile<Sum>(layout, layout.coalitions, [&](int64_t image, int64_t start, int64_t count, Sum* sums) {
    FASTSHAP_CLONED(pool_tile<kBytes>(layout, feature_data + image * image_step + start, player_step,
                                      bit_data + image * layout.coalitions * words(layout.players), count,
                                      sums));
    finish(image, start, count, sums);
  });
}

// As it is where features lie one after the other: a slice of the players (tokens without their prefix) is no
// copy.
inline Tensor with_whole_rows(const Tensor& features) {
  return features.stride(2) == 1 ? features : torch::stable::contiguous(features);
}

constexpr int64_t group = 4;   // coalitions that sort the players into kinds
constexpr int64_t kinds = 16;  // subsets of a group

inline int64_t count_groups(const Layout& layout) { return (layout.coalitions + group - 1) / group; }

// One tile of an image: out[p] = Σ_m scale[m] grad[m] where player p is in coalition m. `kind` is (groups,
// P), `sums` (groups, kinds, tile), zero.
template <int64_t kBytes, typename From, typename To>
FASTSHAP_INLINE void scatter_tile(const Layout& layout, const From* grad, const accumulate_t<From>* scale,
                                  const uint8_t* kind, int64_t count, To* out, accumulate_t<From>* sums) {
  using Sum = accumulate_t<From>;
  constexpr int64_t width = strip_width<Sum>;
  const int64_t groups = count_groups(layout);
  std::vector<Sum> row(count);
  for (int64_t m = 0; m < layout.coalitions; ++m) {
    Sum* of_group = sums + m / group * kinds * layout.tile;
    copy_run(grad + m * layout.features, row.data(), count);
    if (scale != nullptr) {
      for (int64_t i = 0; i < count; ++i) row[i] *= scale[m];
    }
    for (int64_t k = 0; k < kinds; ++k) {
      if ((k >> (m % group) & 1) == 0) continue;
      for (int64_t i = 0; i < count; ++i) of_group[k * layout.tile + i] += row[i];
    }
  }
  for (int64_t player = 0; player < layout.players; ++player) {
    for (int64_t start = 0; start < count; start += width) {
      Strip<Sum, kBytes> strip;
      for (int64_t g = 0; g < groups; ++g) {
        strip.add(sums + (g * kinds + kind[g * layout.players + player]) * layout.tile + start);
      }
      To* to = out + player * layout.features + start;
      const int64_t values = std::min(width, count - start);
      if constexpr (std::is_same_v<To, Sum>) {
        if (values == width) {
          strip.store(to);
          continue;
        }
      }
      Sum sum[width];
      strip.store(sum);
      copy_run(sum, to, values);
    }
  }
}

// kind[b, g, p] = which coalitions of group g player p is in.
FASTSHAP_INLINE void find_kinds(const Layout& layout, const int32_t* bits, uint8_t* kind) {
  const int64_t groups = count_groups(layout);
  for (int64_t i = 0; i < layout.images * layout.coalitions; ++i) {
    const int64_t image = i / layout.coalitions, m = i % layout.coalitions;
    uint8_t* of_group = kind + (image * groups + m / group) * layout.players;
    for (int64_t first = 0; first < layout.players; first += word) {
      const uint32_t present = static_cast<uint32_t>(*bits++);
      const int64_t players = std::min(word, layout.players - first);
      for (int64_t p = 0; p < players; ++p) of_group[first + p] |= (present >> p & 1u) << (m % group);
    }
  }
}

// out[b, p] = Σ_m scale[b, m] grad[b, m] over the coalitions m that player p is in; a null scale is 1.
template <typename From, typename To>
void scatter_images(const Layout& layout, const Tensor& grad, const accumulate_t<From>* scale,
                    const Tensor& bits, Tensor& out) {
  using Sum = accumulate_t<From>;
  const From* grad_data = grad.const_data_ptr<From>();
  To* out_data = out.mutable_data_ptr<To>();
  const int64_t groups = count_groups(layout);
  if (grad.numel() == 0) {
    torch::stable::zero_(out);
    return;
  }
  std::vector<uint8_t> kind(layout.images * groups * layout.players);
  FASTSHAP_CLONED(find_kinds(layout, bits.const_data_ptr<int32_t>(), kind.data()));
  for_each_tile<Sum>(layout, groups * kinds, [&](int64_t image, int64_t start, int64_t count, Sum* sums) {
    FASTSHAP_CLONED(scatter_tile<kBytes>(layout,
                                         grad_data + image * layout.coalitions * layout.features + start,
                                         scale == nullptr ? nullptr : scale + image * layout.coalitions,
                                         kind.data() + image * groups * layout.players, count,
                                         out_data + image * layout.players * layout.features + start, sums));
  });
}

}  // namespace fastshap
