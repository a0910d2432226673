// packed_attention in bfloat16 on processors that multiply it: two products and their sum in one operation.
//
// As in packed_attention.cpp a head's scores lie transposed, (keys, queries), for a block of queries at a
// time. An operand is a matrix of pairs, two neighbours along the dimension that is summed, in one 4-byte
// word: keys and queries are pairs in memory already; values and probabilities are paired across keys.
// Probabilities are rounded to bfloat16, sums run in float32.

#include <cmath>
#include <cstring>

#include "fastshap/attention.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 11
#define FASTSHAP_BF16 \
  __attribute__((target("arch=x86-64-v4,avx512bf16,prefer-vector-width=512"), optimize("no-math-errno")))
// GCC takes its own header's undefined values for mistakes (its bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

namespace fastshap {
namespace {

using Pair = uint32_t;  // the first of two bfloat16 is the low half
using Floats = vector_t<float, 64>;

constexpr int64_t kLanes16 = 16;  // 4-byte values in a vector
constexpr int64_t kBlock = 64;    // probabilities added up at a time
constexpr int64_t kTileRows = 8;  // sums under way: as many as hide an operation's latency

// c (kRows × 16) = a (kRows × depth) · b (depth × 16), where a has element (i, k) at i · a_row + k ·
// a_column.
template <int64_t kRows>
FASTSHAP_BF16 void multiply_tile(int64_t depth, const Pair* a, int64_t a_row, int64_t a_column, const Pair* b,
                                 int64_t b_row, float* c, int64_t c_row) {
  __m512 sum[kRows] = {};
  for (int64_t k = 0; k < depth; ++k) {
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + k * b_row);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * a_row + k * a_column]));
      sum[i] = _mm512_dpbf16_ps(sum[i], left, right);
    }
  }
#pragma GCC unroll 8
  for (int64_t i = 0; i < kRows; ++i) _mm512_storeu_ps(c + i * c_row, sum[i]);
}

// c (rows × columns) = a (rows × depth) · b (depth × columns); columns are whole vectors.
template <int64_t kRows = kTileRows>
FASTSHAP_BF16 void multiply_pairs(int64_t rows, int64_t columns, int64_t depth, const Pair* a, int64_t a_row,
                                  int64_t a_column, const Pair* b, int64_t b_row, float* c, int64_t c_row) {
  for (; rows >= kRows; rows -= kRows, a += kRows * a_row, c += kRows * c_row) {
    for (int64_t column = 0; column < columns; column += kLanes16) {
      multiply_tile<kRows>(depth, a, a_row, a_column, b + column, b_row, c + column, c_row);
    }
  }
  if constexpr (kRows > 1) {
    multiply_pairs<kRows / 2>(rows, columns, depth, a, a_row, a_column, b, b_row, c, c_row);
  }
}

FASTSHAP_BF16 inline __m512i pair_up(__m256i first, __m256i second) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(first), _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// Values, rows `stride` apart → pairs of neighbouring rows (⌈length/2⌉, wide); what does not exist is 0.
FASTSHAP_BF16 void pair_values(const BFloat16* from, int64_t stride, int64_t length, int64_t head_dim,
                               int64_t wide, Pair* to) {
  for (int64_t row = 0; row < length; row += 2, from += 2 * stride, to += wide) {
    for (int64_t i = 0; i < wide; i += kLanes16) {
      const int64_t left = std::clamp<int64_t>(head_dim - i, 0, kLanes16);
      const __mmask16 inside = static_cast<__mmask16>((1u << left) - 1);
      const __m256i first = _mm256_maskz_loadu_epi16(inside, from + i);
      const __m256i second = _mm256_maskz_loadu_epi16(row + 1 < length ? inside : 0, from + stride + i);
      _mm512_storeu_si512(to + i, pair_up(first, second));
    }
  }
}

// Scores (keys, queries) → pairs of exp(scale · (score − largest)) along the keys, and for each query the
// largest, scaled, and the sum.
FASTSHAP_BF16 void exponentiate_pairs(const float* scores, int64_t keys, int64_t queries, float scale,
                                      Pair* powers, float* largest, float* sum) {
  const float sign = scale < 0 ? -1.0f : 1.0f, size = std::abs(scale);
  for (int64_t query = 0; query < queries; query += kLanes16) {
    const float* column = scores + query;
    // Scaled after the subtraction: a product and its sum may be one operation, and the difference of a huge
    // score from itself what rounding took from its product.
    Floats highest = load<64>(column) * sign;
    for (int64_t key = 1; key < keys; ++key) {
      highest = larger<Floats>(load<64>(column + key * kQueries) * sign, highest);
    }
    Floats total = {};
    // In blocks, so that a long sum loses no more digits than PyTorch's.
    for (int64_t start = 0; start < keys; start += kBlock) {
      Floats block = {};
      for (int64_t key = start; key < std::min(start + kBlock, keys); key += 2) {
        const Floats first =
            exponential<64>((load<64>(column + key * kQueries) * sign - highest) * size, 0.0f);
        Floats second = {};
        if (key + 1 < keys) {
          second = exponential<64>((load<64>(column + (key + 1) * kQueries) * sign - highest) * size, 0.0f);
        }
        block += first + second;
        const __m512i both =
            pair_up((__m256i)_mm512_cvtneps_pbh((__m512)first), (__m256i)_mm512_cvtneps_pbh((__m512)second));
        _mm512_storeu_si512(powers + key / 2 * kQueries + query, both);
      }
      total += block;
    }
    store(largest + query, highest * size);
    store(sum + query, total);
  }
}

// `rows` rows of pairs, `stride` bfloat16 apart → rows that follow one another.
void copy_pairs(const BFloat16* from, int64_t stride, int64_t rows, int64_t pairs, Pair* to) {
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(to + row * pairs, from + row * stride, pairs * sizeof(Pair));
  }
}

Pair* take_pairs(Scratch<float>& scratch, int64_t pairs) {
  return reinterpret_cast<Pair*>(scratch.take(pairs));
}

}  // namespace

bool multiplies_bf16(const Heads& heads) { return clone_in_use() == kAvx512Bf16 && heads.head_dim % 2 == 0; }

int64_t bf16_scratch(const Heads& heads, int64_t length) {
  const int64_t wide = round_up(heads.head_dim, kLanes16), half = heads.head_dim / 2, even = length + 1;
  return round_up(length * half, kLanes16) + even * wide + kQueries * (2 * half + 2 * even + wide + 2);
}

FASTSHAP_BF16 void attend_bf16(const Heads& heads, const Head<BFloat16>& head, Scratch<float>& scratch,
                               BFloat16* out, float* logsumexp) {
  const int64_t head_dim = heads.head_dim, length = head.length, width = heads.heads * head_dim;
  const int64_t half = head_dim / 2, wide = round_up(head_dim, kLanes16), key_pairs = (length + 1) / 2;
  scratch.start();
  Pair *key = take_pairs(scratch, length * half), *value = take_pairs(scratch, key_pairs * wide);
  Pair *query = take_pairs(scratch, kQueries * half), *columns = take_pairs(scratch, half * kQueries);
  Pair* powers = take_pairs(scratch, key_pairs * kQueries);
  float *scores = scratch.take(length * kQueries), *result = scratch.take(kQueries * wide);
  float *largest = scratch.take(kQueries), *sum = scratch.take(kQueries);
  copy_pairs(head.key, head.stride, length, half, key);
  pair_values(head.value, head.stride, length, head_dim, wide, value);
  for (int64_t first = 0; first < length; first += kQueries) {
    const int64_t rows = std::min(kQueries, length - first), queries = round_up(rows, kLanes16);
    copy_pairs(head.query + first * head.stride, head.stride, rows, half, query);
    transpose(query, half, rows, half, columns);
    multiply_pairs(length, queries, half, key, half, 1, columns, kQueries, scores, kQueries);
    exponentiate_pairs(scores, length, queries, static_cast<float>(heads.scale), powers, largest, sum);
    multiply_pairs(rows, wide, key_pairs, powers, 1, kQueries, value, wide, result, wide);
    for (int64_t row = 0; row < rows; ++row) {
      logsumexp[(first + row) * heads.heads] = largest[row] + std::log(sum[row]);
      sum[row] = 1 / sum[row];
    }
    write_rows(result, wide, rows, head_dim, 1.0f, sum, out + first * width, width);
  }
}

}  // namespace fastshap

#else

namespace fastshap {

bool multiplies_bf16(const Heads&) { return false; }
int64_t bf16_scratch(const Heads&, int64_t) { return 0; }
void attend_bf16(const Heads&, const Head<BFloat16>&, Scratch<float>&, BFloat16*, float*) {}

}  // namespace fastshap

#endif
