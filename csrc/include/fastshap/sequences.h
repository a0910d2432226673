// Packed sequences: rows cu_seqlens[s] … cu_seqlens[s + 1] − 1 are sequence s.
#pragma once

#include <algorithm>

#include "fastshap/cpu.h"

namespace fastshap {

// Kernels read and write where the boundaries point, so their values are checked before anything is touched.
inline void check_cu_seqlens(const char* op, const Tensor& cu_seqlens, int64_t total) {
  STD_TORCH_CHECK(
      cu_seqlens.dim() == 1 && cu_seqlens.size(0) > 0 && cu_seqlens.scalar_type() == ScalarType::Int, op,
      ": argument `cu_seqlens` must be int32 (S + 1).");
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t sequences = cu_seqlens.size(0) - 1;
  bool rising = starts[0] == 0 && starts[sequences] == total;
  for (int64_t s = 0; s < sequences; ++s) rising = rising && starts[s] <= starts[s + 1];
  STD_TORCH_CHECK(rising, op, ": argument `cu_seqlens` must rise from 0 to T = ", total,
                  ", but its first value is ", starts[0], ", its last ", starts[sequences],
                  ", or it falls in between. Take it from pack_tokens.");
}

// Rows of the longest sequence.
inline int64_t longest(const Tensor& cu_seqlens) {
  const int32_t* starts = cu_seqlens.const_data_ptr<int32_t>();
  int64_t length = 0;
  for (int64_t s = 0; s + 1 < cu_seqlens.size(0); ++s)
    length = std::max<int64_t>(length, starts[s + 1] - starts[s]);
  return length;
}

// Tasks that a thread should have at least, where `tasks` move `values` in all: less work than that costs
// less than waking a thread.
inline int64_t grain(int64_t tasks, int64_t values) {
  return std::max<int64_t>(1, 32768 * tasks / std::max<int64_t>(1, values));
}

}  // namespace fastshap
