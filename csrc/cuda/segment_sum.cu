// segment_sum: a block has one sequence and a tile of its columns; the rows are shared among its threads.
//
// Floor: each row read once (forward) or written once (backward), in accesses of 16 bytes, with a few of them
// on their way in every thread. Partial sums meet in shared memory in the order of the threads.

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 256;
constexpr int kTogether = 4;  // rows that a thread reads at a time

struct Layout {
  int64_t sequences;  // S
  int64_t width;      // values of a row: D, or a multiple
  int64_t prefix;     // Q
  int lanes;          // threads side by side in a row: a power of two, a warp at most
  unsigned tiles;     // of columns
};

Layout make_layout(const Tensor& cu_seqlens, int64_t width, int64_t prefix, int size) {
  Layout layout = {cu_seqlens.size(0) - 1, width, prefix, 1, 0};
  while (layout.lanes < kWarp && layout.lanes * size < width) layout.lanes *= 2;
  layout.tiles = static_cast<unsigned>(ceil_div(width, layout.lanes * size));
  return layout;
}

// What one thread has to do: every `step`-th row of a sequence, in `size` columns.
struct Share {
  int64_t sequence;
  int64_t start, first, end;  // its first row, its first row past the prefix, and the row after its last
  int64_t tile;               // the block's first column
  int64_t column;             // the thread's
  int slot, step;
};

__device__ inline Share make_share(const Layout& layout, int size, const int32_t* cu_seqlens) {
  Share share;
  share.sequence = blockIdx.x / layout.tiles;
  share.start = cu_seqlens[share.sequence];
  share.end = cu_seqlens[share.sequence + 1];
  share.first = min(share.start + layout.prefix, share.end);
  const int thread = static_cast<int>(threadIdx.x);
  share.tile = static_cast<int64_t>(blockIdx.x % layout.tiles) * (layout.lanes * size);
  share.column = share.tile + thread % layout.lanes * size;
  share.slot = thread / layout.lanes;
  share.step = kThreads / layout.lanes;
  return share;
}

template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    segment_sum_kernel(Layout layout, const T* __restrict__ rows,  // [T, D]
                       const int32_t* __restrict__ cu_seqlens,     // [S + 1]
                       T* __restrict__ out) {                      // [S, D]
  using Sum = accumulate_t<T>;
  __shared__ Vector<Sum, size> partial[kThreads];  // [slots, lanes]
  const Share share = make_share(layout, size, cu_seqlens);
  const bool inside = share.column < layout.width;
  Vector<Sum, size> sum = {};
  for (int64_t row = share.first + share.slot; inside && row < share.end; row += kTogether * share.step) {
    Vector<T, size> read[kTogether] = {};
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
      const int64_t at = row + j * share.step;
      if (at < share.end) read[j] = load_vector<size>(rows + at * layout.width + share.column);
    }
#pragma unroll
    for (int j = 0; j < kTogether; ++j) {
#pragma unroll
      for (int k = 0; k < size; ++k) sum.values[k] += static_cast<Sum>(read[j].values[k]);
    }
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  const Sum* sums = partial[0].values;  // [slots, columns]
  const int columns = layout.lanes * size;
  for (int column = threadIdx.x; column < columns; column += kThreads) {
    if (share.tile + column >= layout.width) break;
    Sum total = 0;
    for (int slot = 0; slot < share.step; ++slot) total += sums[slot * columns + column];
    out[share.sequence * layout.width + share.tile + column] = static_cast<T>(total);
  }
}

// out[t] = grad[s] for the rows t of sequence s, 0 in its prefix. Bytes, since a copy needs no element type.
template <typename T, int size>
__global__ void __launch_bounds__(kThreads)
    segment_sum_backward_kernel(Layout layout, const T* __restrict__ grad,  // [S, D]
                                const int32_t* __restrict__ cu_seqlens,     // [S + 1]
                                T* __restrict__ out) {                      // [T, D]
  const Share share = make_share(layout, size, cu_seqlens);
  if (share.column >= layout.width) return;
  const Vector<T, size> zeros = {};
  const Vector<T, size> values = load_vector<size>(grad + share.sequence * layout.width + share.column);
  T* to = out + share.column;
  for (int64_t row = share.start + share.slot; row < share.first; row += share.step) {
    store_vector(to + row * layout.width, zeros);
  }
#pragma unroll 4
  for (int64_t row = share.first + share.slot; row < share.end; row += share.step) {
    store_vector(to + row * layout.width, values);
  }
}

Tensor segment_sum(const Tensor& rows, const Tensor& cu_seqlens, int64_t prefix) {
  const Tensor source = torch::stable::contiguous(rows), starts = torch::stable::contiguous(cu_seqlens);
  const int64_t width = rows.size(1);
  Tensor out =
      torch::stable::empty({starts.size(0) - 1, width}, rows.scalar_type(), std::nullopt, rows.device());
  if (out.numel() == 0) return out;
  dispatch_floating(rows.scalar_type(), "segment_sum", [&]<typename T>() {
    const T* from = source.const_data_ptr<T>();
    dispatch_vector(vector_size(width, from), [&]<int size>() {
      if constexpr (size <= kVectorBytes / sizeof(T)) {
        const Layout layout = make_layout(starts, width, prefix, size);
        launch("segment_sum", segment_sum_kernel<T, size>, out, layout.sequences * layout.tiles, kThreads, 0,
               layout, from, starts.const_data_ptr<int32_t>(), out.mutable_data_ptr<T>());
      }
    });
  });
  return out;
}

// grad (S, D) → (T, D).
Tensor segment_sum_backward(const Tensor& grad, const Tensor& cu_seqlens, int64_t prefix, int64_t total) {
  const Tensor source = torch::stable::contiguous(grad), starts = torch::stable::contiguous(cu_seqlens);
  STD_TORCH_CHECK(grad.size(0) == starts.size(0) - 1, "segment_sum_backward: `grad` must be (S, D).");
  Tensor out = torch::stable::empty({total, grad.size(1)}, grad.scalar_type(), std::nullopt, grad.device());
  if (out.numel() == 0) return out;
  // Values are moved as pairs of bytes, whatever their type.
  using Unit = uint16_t;
  const int64_t width = grad.size(1) * (grad.element_size() / sizeof(Unit));
  const Unit* from = static_cast<const Unit*>(source.const_data_ptr());
  dispatch_vector(vector_size(width, from), [&]<int size>() {
    if constexpr (size <= kVectorBytes / sizeof(Unit)) {
      const Layout layout = make_layout(starts, width, prefix, size);
      launch("segment_sum_backward", segment_sum_backward_kernel<Unit, size>, out,
             layout.sequences * layout.tiles, kThreads, 0, layout, from, starts.const_data_ptr<int32_t>(),
             static_cast<Unit*>(out.mutable_data_ptr()));
    }
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("segment_sum", TORCH_BOX(&fastshap::segment_sum));
  m.impl("segment_sum_backward", TORCH_BOX(&fastshap::segment_sum_backward));
}
