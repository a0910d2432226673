// Vectors of 64 bytes and the small matrix product of which packed attention is made.
//
// GCC's vector extension, since it compiles to whatever registers a clone has: one of AVX-512, two of AVX2,
// four of SSE. Everything here is inlined into functions that carry FASTSHAP_CLONES.
#pragma once

#include <cmath>
#include <cstring>

#include "fastshap/cpu.h"

namespace fastshap {

template <typename A>
struct Vector;
template <>
struct Vector<float> {
  typedef float type __attribute__((vector_size(64)));
  typedef int32_t integer __attribute__((vector_size(64)));
};
template <>
struct Vector<double> {
  typedef double type __attribute__((vector_size(64)));
  typedef int64_t integer __attribute__((vector_size(64)));
};
template <typename A>
using vector_t = typename Vector<A>::type;
template <typename A>
constexpr int64_t kLanes = 64 / sizeof(A);

template <typename A>
FASTSHAP_INLINE vector_t<A> load(const A* from) {
  vector_t<A> vector;
  std::memcpy(&vector, from, sizeof(vector));
  return vector;
}

template <typename A>
FASTSHAP_INLINE void store(A* to, vector_t<A> vector) {
  std::memcpy(to, &vector, sizeof(vector));
}

template <typename A>
FASTSHAP_INLINE vector_t<A> larger(vector_t<A> a, vector_t<A> b) {
  return a > b ? a : b;
}

// exp(x) for x ≤ 0 to about one unit in the last place; NaN stays NaN, below −87 the result is 0.
// exp(x) = 2^n · e^r with n = round(x / ln 2): adding 1.5 · 2^23 rounds, and leaves n in the low bits.
FASTSHAP_INLINE vector_t<float> exponential(vector_t<float> x) {
  using integers = Vector<float>::integer;
  constexpr float kRound = 12582912.0f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  const vector_t<float> shifted = x * 1.44269504088896341f + kRound;
  const vector_t<float> whole = shifted - kRound;
  const vector_t<float> r = x - whole * kLn2High - whole * kLn2Low;
  vector_t<float> power = r * 1.9875691500e-4f + 1.3981999507e-3f;
  power = power * r + 8.3334519073e-3f;
  power = power * r + 4.1665795894e-2f;
  power = power * r + 1.6666665459e-1f;
  power = power * r + 5.0000001201e-1f;
  power = power * r * r + r + 1.0f;
  integers exponent, bits;
  std::memcpy(&exponent, &shifted, sizeof(exponent));
  std::memcpy(&bits, &power, sizeof(bits));
  bits += exponent << 23;
  std::memcpy(&power, &bits, sizeof(power));
  return x < -87.0f ? vector_t<float>{} : power;
}

FASTSHAP_INLINE vector_t<double> exponential(vector_t<double> x) {
  for (int64_t i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

// A matrix whose element (i, k) is at data[i · row + k · column].
template <typename A>
struct Strided {
  const A* data;
  int64_t row, column;
};

// Sums of at most kDepth products each are added up, so that a long sum loses no more digits than PyTorch's.
template <int64_t kRows, typename A>
FASTSHAP_INLINE void multiply_tile(int64_t depth, Strided<A> a, const A* b, int64_t b_row, bool accumulate,
                                   A* c, int64_t c_row) {
  constexpr int64_t kDepth = 128;
  for (int64_t start = 0; start < depth; start += kDepth) {
    const int64_t end = start + kDepth < depth ? start + kDepth : depth;
    vector_t<A> sum[kRows] = {};
    for (int64_t k = start; k < end; ++k) {
      const vector_t<A> right = load(b + k * b_row);
#pragma GCC unroll 6
      for (int64_t i = 0; i < kRows; ++i) sum[i] += a.data[i * a.row + k * a.column] * right;
    }
    const bool add = accumulate || start > 0;
    for (int64_t i = 0; i < kRows; ++i) store(c + i * c_row, add ? sum[i] + load(c + i * c_row) : sum[i]);
  }
}

template <int64_t kRows, typename A>
FASTSHAP_INLINE void multiply_tiles(int64_t columns, int64_t depth, Strided<A> a, const A* b, int64_t b_row,
                                    bool accumulate, A* c, int64_t c_row) {
  for (int64_t column = 0; column < columns; column += kLanes<A>) {
    multiply_tile<kRows>(depth, a, b + column, b_row, accumulate, c + column, c_row);
  }
}

// c (rows × columns) = a (rows × depth) · b (depth × columns), or added to c. Columns are whole vectors;
// rows of b and of c are b_row and c_row apart.
//
// Six rows at a time: with AVX2 their twelve sums, a row of b and an element of a just fit the sixteen
// registers.
template <typename A>
FASTSHAP_CLONES void multiply(int64_t rows, int64_t columns, int64_t depth, Strided<A> a, const A* b,
                              int64_t b_row, bool accumulate, A* c, int64_t c_row) {
  constexpr int64_t kRows = 6;
  for (; rows >= kRows; rows -= kRows, a.data += kRows * a.row, c += kRows * c_row) {
    multiply_tiles<kRows>(columns, depth, a, b, b_row, accumulate, c, c_row);
  }
  switch (rows) {
    case 5:
      return multiply_tiles<5>(columns, depth, a, b, b_row, accumulate, c, c_row);
    case 4:
      return multiply_tiles<4>(columns, depth, a, b, b_row, accumulate, c, c_row);
    case 3:
      return multiply_tiles<3>(columns, depth, a, b, b_row, accumulate, c, c_row);
    case 2:
      return multiply_tiles<2>(columns, depth, a, b, b_row, accumulate, c, c_row);
    case 1:
      return multiply_tiles<1>(columns, depth, a, b, b_row, accumulate, c, c_row);
  }
}

}  // namespace fastshap
