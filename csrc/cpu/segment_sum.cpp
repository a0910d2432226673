// segment_sum: each sequence's rows summed in blocks, so that long sequences lose no more digits than short
// ones.

#include <algorithm>
#include <cstring>

#include "fastshap/sequences.h"

namespace fastshap {
namespace {

constexpr int64_t kColumns = 64;  // sums held in registers at a time
constexpr int64_t kRows = 32;     // rows summed before they are added to the total

// out[i] = Σ rows[r, i] for `columns` ≤ kColumns neighbours; the count is a constant where it is a full
// block.
template <typename T>
FASTSHAP_INLINE void sum_columns(const T* rows, int64_t count, int64_t width, int64_t columns, T* out) {
  accumulate_t<T> total[kColumns] = {};
  for (int64_t start = 0; start < count; start += kRows) {
    accumulate_t<T> sum[kColumns] = {};
    for (int64_t row = start; row < std::min(start + kRows, count); ++row) {
      const T* from = rows + row * width;
      for (int64_t i = 0; i < columns; ++i) sum[i] += static_cast<accumulate_t<T>>(from[i]);
    }
    for (int64_t i = 0; i < columns; ++i) total[i] += sum[i];
  }
  for (int64_t i = 0; i < columns; ++i) out[i] = static_cast<T>(total[i]);
}

// rows (count, width) → out (width).
template <typename T>
FASTSHAP_INLINE void sum_sequence(const T* rows, int64_t count, int64_t width, T* out) {
  int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns) {
    sum_columns(rows + column, count, width, kColumns, out + column);
  }
  if (column < width) sum_columns(rows + column, count, width, width - column, out + column);
}

Tensor segment_sum(const Tensor& rows, const Tensor& cu_seqlens, int64_t prefix) {
  const Tensor source = torch::stable::contiguous(rows), boundaries = torch::stable::contiguous(cu_seqlens);
  check_cu_seqlens("segment_sum", boundaries, rows.size(0));
  const int64_t sequences = boundaries.size(0) - 1, width = rows.size(1);
  const int32_t* starts = boundaries.const_data_ptr<int32_t>();
  Tensor out = torch::stable::empty({sequences, width}, rows.scalar_type());
  if (rows.numel() == 0) return torch::stable::zero_(out);
  dispatch_floating(rows.scalar_type(), "segment_sum", [&]<typename T>() {
    const T* from = source.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    torch::stable::parallel_for(
        0, sequences, grain(sequences, rows.numel()), [&](int64_t begin, int64_t end) {
          for (int64_t s = begin; s < end; ++s) {
            const int64_t first = std::min<int64_t>(starts[s] + prefix, starts[s + 1]);
            FASTSHAP_CLONED(sum_sequence(from + first * width, starts[s + 1] - first, width, to + s * width));
          }
        });
  });
  return out;
}

// grad (S, D) → (T, D): each sequence's gradient at each of its rows, 0 at its prefix.
Tensor segment_sum_backward(const Tensor& grad, const Tensor& cu_seqlens, int64_t prefix, int64_t total) {
  const Tensor source = torch::stable::contiguous(grad), boundaries = torch::stable::contiguous(cu_seqlens);
  check_cu_seqlens("segment_sum_backward", boundaries, total);
  STD_TORCH_CHECK(grad.size(0) == boundaries.size(0) - 1, "segment_sum_backward: `grad` must be (S, D).");
  const int64_t row_bytes = grad.size(1) * grad.element_size();
  const int32_t* starts = boundaries.const_data_ptr<int32_t>();
  Tensor out = torch::stable::empty({total, grad.size(1)}, grad.scalar_type());
  if (out.numel() == 0) return out;
  use_huge_pages(out);
  const char* from = static_cast<const char*>(source.const_data_ptr());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, grad.size(0), grain(grad.size(0), out.numel()),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t s = begin; s < end; ++s) {
                                  const int64_t first = std::min<int64_t>(starts[s] + prefix, starts[s + 1]);
                                  std::memset(to + starts[s] * row_bytes, 0, (first - starts[s]) * row_bytes);
                                  for (int64_t row = first; row < starts[s + 1]; ++row) {
                                    std::memcpy(to + row * row_bytes, from + s * row_bytes, row_bytes);
                                  }
                                }
                              });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("segment_sum", TORCH_BOX(&fastshap::segment_sum));
  m.impl("segment_sum_backward", TORCH_BOX(&fastshap::segment_sum_backward));
}
