// pack_tokens: each sequence's rows copied from its image's tokens; the gradient summed back, token by token.

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <vector>

#include "fastshap/sequences.h"

namespace fastshap {
namespace {

struct Packing {
  int64_t images;      // B
  int64_t coalitions;  // M
  int64_t players;     // P
  int64_t prefix;      // Q
  int64_t width;       // D
  int64_t bit_words;   // 32-bit words a coalition
};

Packing make_packing(const Tensor& bits, int64_t length, int64_t prefix, int64_t width) {
  Packing packing;
  packing.images = bits.size(0);
  packing.coalitions = bits.size(1);
  packing.players = length - prefix;
  packing.prefix = prefix;
  packing.width = width;
  packing.bit_words = words(packing.players);
  STD_TORCH_CHECK(packing.players > 0 && bits.size(2) == packing.bit_words,
                  "pack_tokens: argument `bits` must be (B, M, ", packing.bit_words, ") for ",
                  packing.players, " players.");
  return packing;
}

// One word of a coalition; bits past the last player don't count.
uint32_t present_players(const int32_t* bits, int64_t word, int64_t players) {
  const int64_t left = players - 32 * word;
  return static_cast<uint32_t>(bits[word]) & (left >= 32 ? ~0u : (1u << left) - 1);
}

// Players present among those of the first `bit_words` words.
int64_t count_present(const int32_t* bits, int64_t bit_words, int64_t players) {
  int64_t present = 0;
  for (int64_t word = 0; word < bit_words; ++word) {
    present += std::popcount(present_players(bits, word, players));
  }
  return present;
}

// Whether coalitions 2j and 2j + 1 of each image are complements.
bool is_paired(const Packing& packing, const Tensor& bits) {
  const int32_t* first = bits.const_data_ptr<int32_t>();
  for (int64_t pair = 0; pair < packing.images * packing.coalitions / 2; ++pair) {
    const int32_t* second = first + packing.bit_words;
    for (int64_t word = 0; word < packing.bit_words; ++word) {
      const uint32_t one = present_players(first, word, packing.players);
      const uint32_t other = present_players(second, word, packing.players);
      if ((one & other) != 0) return false;
      if (std::popcount(one | other) != std::min<int64_t>(32, packing.players - 32 * word)) return false;
    }
    first = second + packing.bit_words;
  }
  return packing.coalitions % 2 == 0;
}

// tokens (B, Q + P, row_bytes) → rows (T, row_bytes). Bytes, since a copy needs no element type.
void copy_tokens(const Packing& packing, int64_t row_bytes, const char* tokens, const int32_t* bits,
                 const int32_t* cu_seqlens, char* rows) {
  const int64_t image_bytes = (packing.prefix + packing.players) * row_bytes;
  const int64_t sequences = packing.images * packing.coalitions;
  const int64_t values = cu_seqlens[sequences] * packing.width;
  torch::stable::parallel_for(0, sequences, grain(sequences, values), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const char* image = tokens + s / packing.coalitions * image_bytes;
      const int32_t* present = bits + s * packing.bit_words;
      char* to = rows + cu_seqlens[s] * row_bytes;
      std::memcpy(to, image, packing.prefix * row_bytes);
      to += packing.prefix * row_bytes;
      for (int64_t word = 0; word < packing.bit_words; ++word) {
        const char* players = image + (packing.prefix + 32 * word) * row_bytes;
        for (uint32_t left = present_players(present, word, packing.players); left; left &= left - 1) {
          std::memcpy(to, players + std::countr_zero(left) * row_bytes, row_bytes);
          to += row_bytes;
        }
      }
    }
  });
}

// out = Σ grad[rows[i]], in that order.
template <typename T>
FASTSHAP_INLINE void sum_rows(const T* grad, const std::vector<int64_t>& rows, int64_t width, T* out,
                              accumulate_t<T>* sum) {
  std::fill(sum, sum + width, accumulate_t<T>(0));
  for (const int64_t row : rows) {
    const T* from = grad + row * width;
    for (int64_t i = 0; i < width; ++i) sum[i] += static_cast<accumulate_t<T>>(from[i]);
  }
  for (int64_t i = 0; i < width; ++i) out[i] = static_cast<T>(sum[i]);
}

// grad (T, D) → the gradient of one image's tokens (Q + P, D), as far as they share a word of bits; the
// prefix goes with the first word. A token's rows are found by walking each coalition's sequence along the
// players.
template <typename T>
void sum_word(const Packing& packing, const T* grad, const int32_t* bits, const int32_t* starts, int64_t word,
              T* out) {
  const int64_t width = packing.width, last = std::min(32 * word + 32, packing.players);
  std::vector<accumulate_t<T>> sum(width);
  std::vector<int64_t> rows(packing.coalitions), next(packing.coalitions);
  for (int64_t token = 0; word == 0 && token < packing.prefix; ++token) {
    for (int64_t m = 0; m < packing.coalitions; ++m) rows[m] = starts[m] + token;
    FASTSHAP_CLONED(sum_rows(grad, rows, width, out + token * width, sum.data()));
  }
  for (int64_t m = 0; m < packing.coalitions; ++m) {
    next[m] = starts[m] + packing.prefix + count_present(bits + m * packing.bit_words, word, packing.players);
  }
  for (int64_t player = 32 * word; player < last; ++player) {
    rows.clear();
    for (int64_t m = 0; m < packing.coalitions; ++m) {
      if (is_present(bits + m * packing.bit_words, player)) rows.push_back(next[m]++);
    }
    FASTSHAP_CLONED(sum_rows(grad, rows, width, out + (packing.prefix + player) * width, sum.data()));
  }
}

// cu_seqlens (B·M + 1) of the coalitions; the last is T.
Tensor make_cu_seqlens(const Packing& packing, const Tensor& bits) {
  const int64_t sequences = packing.images * packing.coalitions;
  Tensor cu_seqlens = torch::stable::empty({sequences + 1}, ScalarType::Int);
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  int32_t* starts = cu_seqlens.mutable_data_ptr<int32_t>();
  int64_t total = 0;
  starts[0] = 0;
  for (int64_t s = 0; s < sequences; ++s) {
    total +=
        packing.prefix + count_present(bit_data + s * packing.bit_words, packing.bit_words, packing.players);
    STD_TORCH_CHECK(
        total <= std::numeric_limits<int32_t>::max(),
        "pack_tokens: the packed batch must have fewer than 2^31 rows. Pass fewer images or coalitions.");
    starts[s + 1] = static_cast<int32_t>(total);
  }
  return cu_seqlens;
}

// The boundaries must be those of these coalitions: the gradient is read where they point.
void check_boundaries(const Packing& packing, const Tensor& bits, const Tensor& cu_seqlens, int64_t total) {
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  // Rows past the last sequence are those that the caller asked for and no token fills.
  const int64_t end = cu_seqlens.numel() ? starts[cu_seqlens.numel() - 1] : 0;
  check_cu_seqlens("pack_tokens_backward", cu_seqlens, std::min(end, total));
  bool same = cu_seqlens.size(0) == packing.images * packing.coalitions + 1;
  for (int64_t s = 0; same && s < packing.images * packing.coalitions; ++s) {
    const int32_t* coalition = bit_data + s * packing.bit_words;
    same = starts[s + 1] - starts[s] ==
           packing.prefix + count_present(coalition, packing.bit_words, packing.players);
  }
  STD_TORCH_CHECK(
      same, "pack_tokens_backward: argument `cu_seqlens` must be what pack_tokens made of these `bits`.");
}

std::tuple<Tensor, Tensor> pack_tokens(const Tensor& tokens, const Tensor& bits, int64_t prefix, bool paired,
                                       int64_t given) {
  const Tensor source = torch::stable::contiguous(tokens), coalitions = torch::stable::contiguous(bits);
  const Packing packing = make_packing(coalitions, tokens.size(1), prefix, tokens.size(2));
  Tensor cu_seqlens = make_cu_seqlens(packing, coalitions);
  const int64_t total = cu_seqlens.const_data_ptr<int32_t>()[packing.images * packing.coalitions];
  STD_TORCH_CHECK(
      !paired || is_paired(packing, coalitions),
      "pack_tokens: argument `bits` must be pairs of complements, since `paired` is True, but it is "
      "not. Sample with paired=True, or leave `paired` out.");
  STD_TORCH_CHECK(given < 0 || total <= given, "pack_tokens: argument `rows` must be at least ", total,
                  ", the tokens present, but it is ", given, ".");
  Tensor rows = torch::stable::empty({given < 0 ? total : given, packing.width}, tokens.scalar_type());
  if (rows.numel() == 0) return {rows, cu_seqlens};
  use_huge_pages(rows);
  char* to = static_cast<char*>(rows.mutable_data_ptr());
  const int64_t row_bytes = packing.width * tokens.element_size();
  std::memset(to + total * row_bytes, 0, (rows.size(0) - total) * row_bytes);
  copy_tokens(packing, row_bytes, static_cast<const char*>(source.const_data_ptr()),
              coalitions.const_data_ptr<int32_t>(), cu_seqlens.const_data_ptr<int32_t>(), to);
  return {rows, cu_seqlens};
}

// grad (T, D) → (B, length, D). Pairs need nothing of their own: pack_tokens has checked the promise.
Tensor pack_tokens_backward(const Tensor& grad, const Tensor& bits, const Tensor& cu_seqlens, int64_t prefix,
                            int64_t length, bool /* paired */) {
  const Tensor rows = torch::stable::contiguous(grad), coalitions = torch::stable::contiguous(bits);
  const Tensor boundaries = torch::stable::contiguous(cu_seqlens);
  const Packing packing = make_packing(coalitions, length, prefix, grad.size(1));
  check_boundaries(packing, coalitions, boundaries, grad.size(0));
  Tensor out = torch::stable::empty({packing.images, length, packing.width}, grad.scalar_type());
  const int32_t* starts = boundaries.const_data_ptr<int32_t>();
  const int32_t* bit_data = coalitions.const_data_ptr<int32_t>();
  dispatch_floating(grad.scalar_type(), "pack_tokens_backward", [&]<typename T>() {
    const T* from = rows.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    const int64_t tasks = packing.images * packing.bit_words;
    torch::stable::parallel_for(0, tasks, grain(tasks, grad.numel()), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / packing.bit_words, first = image * packing.coalitions;
        sum_word(packing, from, bit_data + first * packing.bit_words, starts + first,
                 task % packing.bit_words, to + image * length * packing.width);
      }
    });
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("pack_tokens", TORCH_BOX(&fastshap::pack_tokens));
  m.impl("pack_tokens_backward", TORCH_BOX(&fastshap::pack_tokens_backward));
}
