// Vectors as wide as the processor's, and the small matrix product of which packed attention is made.
//
// The vectors are GCC's generic ones. One wider than the registers would go through memory (64 bytes ran six
// times slower with AVX2, 32 bytes thirty times slower with SSE), so their width is a template parameter:
// code that uses them is a body of `with_vectors`. Memory is laid out in panels
// of 64 bytes, whole vectors at any width.
#pragma once

#include <cmath>
#include <cstring>

#include "fastshap/cpu.h"

namespace fastshap {

template <typename A>
constexpr int64_t kPanel = 64 / sizeof(A);  // values
template <typename A, int64_t kBytes>
constexpr int64_t kLanes = kBytes / sizeof(A);

template <typename A, int64_t kBytes>
struct Vector {
  typedef A type __attribute__((vector_size(kBytes)));
};
template <typename A, int64_t kBytes>
using vector_t = typename Vector<A, kBytes>::type;

template <int64_t kBytes, typename A>
FASTSHAP_INLINE vector_t<A, kBytes> load(const A* from) {
  vector_t<A, kBytes> vector;
  std::memcpy(&vector, from, kBytes);
  return vector;
}

template <typename V, typename A>
FASTSHAP_INLINE void store(A* to, V vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

template <typename V>
FASTSHAP_INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

// exp(x) for x ≤ 0 to about one unit in the last place; NaN stays NaN, below −87 the result is 0.
// exp(x) = 2^n · e^r with n = round(x / ln 2): adding 1.5 · 2^23 + 127 rounds, and leaves n + 127, the
// exponent bits of 2^n, in the low bits. A product with that power keeps NaN, which a sum of bits would not.
template <int64_t kBytes>
FASTSHAP_INLINE vector_t<float, kBytes> exponential(vector_t<float, kBytes> x, float) {
  constexpr float kRound = 12583039.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  using V = vector_t<float, kBytes>;
  const V shifted = x * 1.44269504088896341f + kRound;
  const V whole = shifted - kRound;
  const V r = x - whole * kLn2High - whole * kLn2Low;
  V power = r * 1.9875691500e-4f + 1.3981999507e-3f;
  power = power * r + 8.3334519073e-3f;
  power = power * r + 4.1665795894e-2f;
  power = power * r + 1.6666665459e-1f;
  power = power * r + 5.0000001201e-1f;
  power = power * r * r + r + 1.0f;
  vector_t<uint32_t, kBytes> bits;  // bits that leave a signed number are an overflow
  std::memcpy(&bits, &shifted, kBytes);
  bits <<= 23;
  V scale;
  std::memcpy(&scale, &bits, kBytes);
  return x < -87.0f ? V{} : power * scale;
}

template <int64_t kBytes>
FASTSHAP_INLINE vector_t<double, kBytes> exponential(vector_t<double, kBytes> x, double) {
  for (int64_t i = 0; i < kLanes<double, kBytes>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// A matrix whose element (i, k) is at data[i · row + k · column].
template <typename A>
struct Strided {
  const A* data;
  int64_t row, column;
};

// Sums of at most kDepth products each are added up, so that a long sum loses no more digits than PyTorch's.
template <int64_t kBytes, int64_t kRows, typename A>
FASTSHAP_INLINE void multiply_tile(int64_t depth, Strided<A> a, const A* b, int64_t b_row, bool accumulate,
                                   A* c, int64_t c_row) {
  constexpr int64_t kDepth = 128, kVectors = 64 / kBytes, kStep = kLanes<A, kBytes>;
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t end = start + kDepth < depth ? start + kDepth : depth;
    vector_t<A, kBytes> sum[kRows][kVectors] = {};
    for (int64_t k = start; k < end; ++k) {
      vector_t<A, kBytes> right[kVectors];
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) right[j] = load<kBytes>(b + k * b_row + j * kStep);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kRows; ++i) {
        const A left = a.data[i * a.row + k * a.column];
#pragma GCC unroll 4
        for (int64_t j = 0; j < kVectors; ++j) sum[i][j] += left * right[j];
      }
    }
    const bool add = accumulate || start > 0;
#pragma GCC unroll 6
    for (int64_t i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int64_t j = 0; j < kVectors; ++j) {
        A* to = c + i * c_row + j * kStep;
        store(to, add ? sum[i][j] + load<kBytes>(to) : sum[i][j]);
      }
    }
  }
}

template <int64_t kBytes, int64_t kRows, typename A>
FASTSHAP_INLINE void multiply_rows(int64_t rows, int64_t columns, int64_t depth, Strided<A> a, const A* b,
                                   int64_t b_row, bool accumulate, A* c, int64_t c_row) {
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row) {
    for (int64_t column = 0; column < columns; column += kPanel<A>) {
      multiply_tile<kBytes, kRows>(depth, a, b + column, b_row, accumulate, c + column, c_row);
    }
  }
  if constexpr (kRows > 1) {
    multiply_rows<kBytes, kRows - 1>(rows, columns, depth, a, b, b_row, accumulate, c, c_row);
  }
}

// c (rows × columns) = a (rows × depth) · b (depth × columns), or added to c. Columns are whole panels;
// rows of b and of c are b_row and c_row apart.
//
// A tile of c is a panel of six rows, or of three where a panel is four vectors: with a row of b and an
// element of a, its twelve sums then just fit the sixteen registers of AVX2 and SSE.
template <typename A>
void multiply(int64_t rows, int64_t columns, int64_t depth, Strided<A> a, const A* b, int64_t b_row,
              bool accumulate, A* c, int64_t c_row) {
  with_vectors([&]<int64_t kBytes>() FASTSHAP_INLINE_BODY {
    multiply_rows<kBytes, kBytes == 16 ? 3 : 6>(rows, columns, depth, a, b, b_row, accumulate, c, c_row);
  });
}

}  // namespace fastshap
