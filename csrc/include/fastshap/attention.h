// What the ways of computing packed attention on the CPU share: a head of a sequence, its memory, its layout.
#pragma once

#include <algorithm>
#include <memory>
#include <new>

#include "fastshap/tile.h"

namespace fastshap {

constexpr int64_t kQueries = 48;  // queries in a block, whole panels: its operands stay in the L1 cache

struct Heads {
  int64_t heads;
  int64_t head_dim;
  double scale;
};

FASTSHAP_INLINE int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// Aligned memory that a thread keeps for all its heads, dealt out anew to each in whole panels.
template <typename A>
class Scratch {
 public:
  explicit Scratch(int64_t values)
      : memory_(static_cast<A*>(::operator new(values * sizeof(A), std::align_val_t(64)))),
        free_(memory_.get()) {}
  void start() { free_ = memory_.get(); }
  A* take(int64_t values) {
    A* taken = free_;
    free_ += round_up(values, kPanel<A>);
    return taken;
  }

 private:
  struct Release {
    void operator()(A* memory) const { ::operator delete(memory, std::align_val_t(64)); }
  };
  std::unique_ptr<A, Release> memory_;
  A* free_;
};

// Pointers to one head of one sequence.
template <typename T>
struct Head {
  const T *query, *key, *value;
  int64_t length;
  int64_t stride;  // from one row's query to the next row's
};

// from (rows, wide) → to (columns, kQueries). Its rows are filled up with 0 to whole panels first.
template <typename A>
FASTSHAP_INLINE void transpose_body(A* __restrict from, int64_t wide, int64_t rows, int64_t columns,
                                    A* __restrict to) {
  const int64_t filled = round_up(rows, kPanel<A>);
  std::fill(from + rows * wide, from + filled * wide, A(0));
  for (int64_t row = 0; row < filled; row += 4) {
    const A *first = from + row * wide, *second = first + wide, *third = second + wide,
            *fourth = third + wide;
    for (int64_t i = 0; i < columns; ++i) {
      A* four = to + i * kQueries + row;
      four[0] = first[i];
      four[1] = second[i];
      four[2] = third[i];
      four[3] = fourth[i];
    }
  }
}
template <typename A>
void transpose(A* from, int64_t wide, int64_t rows, int64_t columns, A* to) {
  FASTSHAP_CLONED(transpose_body(from, wide, rows, columns, to));
}

// from (rows, wide), row r times scale[r], or times `factor` where there is no scale → to (rows, head_dim),
// rows `stride` apart.
template <typename T, typename A>
FASTSHAP_INLINE void write_rows_body(const A* from, int64_t wide, int64_t rows, int64_t head_dim, A factor,
                                     const A* scale, T* __restrict to, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    const A times = scale ? scale[row] : factor;
    for (int64_t i = 0; i < head_dim; ++i)
      to[row * stride + i] = static_cast<T>(from[row * wide + i] * times);
  }
}
template <typename T, typename A>
void write_rows(const A* from, int64_t wide, int64_t rows, int64_t head_dim, A factor, const A* scale, T* to,
                int64_t stride) {
  FASTSHAP_CLONED(write_rows_body(from, wide, rows, head_dim, factor, scale, to, stride));
}

// Σ body(row) over the rows, in blocks, so that a long sum loses no more digits than PyTorch's.
template <typename V, typename Body>
FASTSHAP_INLINE V sum_rows(int64_t rows, const Body& body) {
  constexpr int64_t kBlock = 32;
  V total = {};
  for (int64_t start = 0; start < rows; start += kBlock) {
    V sum = {};
    for (int64_t row = start; row < std::min(start + kBlock, rows); ++row) sum += body(row);
    total += sum;
  }
  return total;
}

// Whether this processor multiplies pairs of bfloat16, and the heads can be cut into pairs.
bool multiplies_bf16(const Heads& heads);

// 4-byte values that `attend_bf16` takes from its scratch for a head of at most this length.
int64_t bf16_scratch(const Heads& heads, int64_t length);

// out and logsumexp of one head, as `attend` of packed_attention.cpp, with products of bfloat16 pairs.
void attend_bf16(const Heads& heads, const Head<BFloat16>& head, Scratch<float>& scratch, BFloat16* out,
                 float* logsumexp);

}  // namespace fastshap
