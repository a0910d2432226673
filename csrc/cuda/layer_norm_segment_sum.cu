// layer_norm_segment_sum: a block has one sequence, a warp a row of it at a time, whole in its registers.
//
// Floor: each row read once (forward), or read once and its gradient written once (backward): the normalised
// rows, which plain PyTorch writes and reads again, exist in registers only. Weight and bias come after the
// sum.

#include <optional>
#include <tuple>

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

template <typename T>
constexpr int kSize = kVectorBytes / static_cast<int>(sizeof(T));  // values in one access

struct Layout {
  int64_t sequences;  // S
  int64_t prefix;     // Q
  int width;          // D, whole accesses
  double eps;
};

// Rows that a warp has in work together: while one is summed up the other one is on its way.
template <typename T, int vectors>
constexpr int kTogether = vectors * kSize<T> <= 32 ? 2 : 1;

// Blocks on a multiprocessor that registers must be left for; double takes too many of them.
template <typename T, int vectors>
constexpr int kBlocks = sizeof(T) < 8 && vectors * (kSize<T> * sizeof(float) + kVectorBytes) <= 192 ? 2 : 1;

// One row, or what it is multiplied with: `vectors` accesses of a lane, 32 lanes apart.
template <typename T, int vectors>
struct Row {
  Vector<T, kSize<T>> values[vectors];
};

template <int vectors, typename T>
__device__ inline Row<T, vectors> load_row(const T* from, int width) {
  Row<T, vectors> row = {};
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int column = (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kSize<T>;
    if (column < width) row.values[i] = load_vector<kSize<T>>(from + column);
  }
  return row;
}

// body(column, i, k) for each value k of access i of this lane.
template <typename T, int vectors, typename Body>
__device__ inline void for_each_value(int width, Body&& body) {
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const int column = (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kSize<T>;
    if (column < width) {
#pragma unroll
      for (int k = 0; k < kSize<T>; ++k) body(column + k, i, k);
    }
  }
}

template <typename Sum>
struct Statistics {
  Sum mean, scale;  // 1 / √(variance + eps)
};

__device__ inline float inverse_root(float x) { return rsqrtf(x); }
__device__ inline double inverse_root(double x) { return rsqrt(x); }

// The variance is taken around the mean: nothing cancels. All lanes of a warp.
template <typename T, int vectors>
__device__ inline Statistics<accumulate_t<T>> measure(const Row<T, vectors>& row, const Layout& layout) {
  using Sum = accumulate_t<T>;
  Sum sum = 0, squares = 0;
  for_each_value<T, vectors>(layout.width,
                             [&](int, int i, int k) { sum += static_cast<Sum>(row.values[i].values[k]); });
  const Sum mean = warp_sum(sum) / static_cast<Sum>(layout.width);
  for_each_value<T, vectors>(layout.width, [&](int, int i, int k) {
    const Sum centred = static_cast<Sum>(row.values[i].values[k]) - mean;
    squares += centred * centred;
  });
  const Sum variance = warp_sum(squares) / static_cast<Sum>(layout.width);
  return {mean, inverse_root(variance + static_cast<Sum>(layout.eps))};
}

template <typename T, int vectors>
__global__ void __launch_bounds__(kThreads, kBlocks<T, vectors>)
    layer_norm_segment_sum_kernel(Layout layout, const T* __restrict__ rows,   // [T, D]
                                  const int32_t* __restrict__ cu_seqlens,      // [S + 1]
                                  const accumulate_t<T>* __restrict__ weight,  // [D] or null
                                  const accumulate_t<T>* __restrict__ bias,    // [D] or null
                                  T* __restrict__ out,                         // [S, D]
                                  accumulate_t<T>* __restrict__ normalized) {  // [S, D]
  using Sum = accumulate_t<T>;
  constexpr int together = kTogether<T, vectors>;
  FASTSHAP_SHARED_MEMORY(memory);
  Sum* total = reinterpret_cast<Sum*>(memory);  // [D]
  const int64_t s = blockIdx.x;
  const int64_t end = cu_seqlens[s + 1], first = min(cu_seqlens[s] + layout.prefix, end);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  Sum sum[vectors][kSize<T>] = {};
  for (int64_t row = first + warp; row < end; row += together * kWarps) {
    Row<T, vectors> values[together];
#pragma unroll
    for (int j = 0; j < together; ++j) {
      // Past the end the last row is read once more, and counts for nothing.
      values[j] = load_row<vectors>(rows + min(row + j * kWarps, end - 1) * layout.width, layout.width);
    }
#pragma unroll
    for (int j = 0; j < together; ++j) {
      const Statistics<Sum> statistics = measure<T, vectors>(values[j], layout);
      if (row + j * kWarps >= end) break;
      for_each_value<T, vectors>(layout.width, [&](int, int i, int k) {
        sum[i][k] += (static_cast<Sum>(values[j].values[i].values[k]) - statistics.mean) * statistics.scale;
      });
    }
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    if (warp == turn) {
      for_each_value<T, vectors>(layout.width, [&](int column, int i, int k) {
        total[column] = turn == 0 ? sum[i][k] : total[column] + sum[i][k];
      });
    }
    __syncthreads();
  }
  const Sum count = static_cast<Sum>(end - first);
#pragma unroll 1
  for (int column = threadIdx.x; column < layout.width; column += kThreads) {
    const Sum scaled = weight ? total[column] * weight[column] : total[column];
    normalized[s * layout.width + column] = total[column];
    out[s * layout.width + column] = static_cast<T>(bias ? scaled + count * bias[column] : scaled);
  }
}

// With x̂ the normalised row and g = grad · weight: scale · (g − mean(g) − x̂ · mean(g · x̂)); 0 in the prefix.
template <typename T, int vectors>
__global__ void __launch_bounds__(kThreads, kBlocks<T, vectors>)
    layer_norm_segment_sum_backward_kernel(Layout layout, const T* __restrict__ grad,   // [S, D]
                                           const T* __restrict__ rows,                  // [T, D]
                                           const int32_t* __restrict__ cu_seqlens,      // [S + 1]
                                           const accumulate_t<T>* __restrict__ weight,  // [D] or null
                                           T* __restrict__ out) {                       // [T, D]
  using Sum = accumulate_t<T>;
  const int64_t s = blockIdx.x;
  const int64_t start = cu_seqlens[s], end = cu_seqlens[s + 1];
  const int64_t first = min(start + layout.prefix, end);
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const Sum width = static_cast<Sum>(layout.width);
  const Row<T, vectors> unscaled = load_row<vectors>(grad + s * layout.width, layout.width);
  Sum g[vectors][kSize<T>] = {}, g_sum = 0;
  for_each_value<T, vectors>(layout.width, [&](int column, int i, int k) {
    g[i][k] = static_cast<Sum>(unscaled.values[i].values[k]) * (weight ? weight[column] : Sum(1));
    g_sum += g[i][k];
  });
  const Sum g_mean = warp_sum(g_sum) / width;
  const auto store_row = [&](int64_t row, const Row<T, vectors>& values) {
#pragma unroll
    for (int i = 0; i < vectors; ++i) {
      const int column = (i * kWarp + static_cast<int>(threadIdx.x) % kWarp) * kSize<T>;
      if (column < layout.width) store_vector(out + row * layout.width + column, values.values[i]);
    }
  };
  for (int64_t row = start + warp; row < first; row += kWarps) store_row(row, Row<T, vectors>{});
  for (int64_t row = first + warp; row < end; row += kWarps) {
    Row<T, vectors> values = load_row<vectors>(rows + row * layout.width, layout.width);
    const Statistics<Sum> statistics = measure<T, vectors>(values, layout);
    Sum along = 0;
    for_each_value<T, vectors>(layout.width, [&](int, int i, int k) {
      along += g[i][k] * (static_cast<Sum>(values.values[i].values[k]) - statistics.mean);
    });
    const Sum slope = warp_sum(along) * statistics.scale * statistics.scale / width;
    for_each_value<T, vectors>(layout.width, [&](int, int i, int k) {
      const Sum centred = static_cast<Sum>(values.values[i].values[k]) - statistics.mean;
      values.values[i].values[k] = static_cast<T>(statistics.scale * (g[i][k] - g_mean - centred * slope));
    });
    store_row(row, values);
  }
}

// Which rows have kernels of their own: those of the usual widths (384, 768, 1024, 2048); others take the
// next.
template <typename T, int vectors>
constexpr bool kServed = sizeof(T) == 2   ? vectors <= 8 && vectors != 6
                         : sizeof(T) == 4 ? vectors >= 2 && vectors != 4
                                          : vectors == 2 || vectors == 8;

// Calls `body.template operator()<vectors>()` with the accesses a lane needs for a row.
template <typename T, typename Body>
void dispatch_width(int64_t width, Body&& body) {
  STD_TORCH_CHECK(width % kSize<T> == 0, "layer_norm_segment_sum: D must be a multiple of ", kSize<T>,
                  ", not ", width, ".");
  const int64_t needed = ceil_div(width, kWarp * kSize<T>);
  bool served = false;
  const auto attempt = [&]<int vectors>() {
    if constexpr (kServed<T, vectors>) {
      if (!served && needed <= vectors) {
        served = true;
        body.template operator()<vectors>();
      }
    }
  };
  attempt.template operator()<1>();
  attempt.template operator()<2>();
  attempt.template operator()<3>();
  attempt.template operator()<4>();
  attempt.template operator()<6>();
  attempt.template operator()<8>();
  attempt.template operator()<16>();
  STD_TORCH_CHECK(served, "layer_norm_segment_sum: D = ", width, " is too wide.");
}

// Rows can be read 16 bytes at a time: a contiguous slice may begin anywhere.
Tensor aligned(const Tensor& tensor) {
  const Tensor whole = torch::stable::contiguous(tensor);
  const auto address = reinterpret_cast<uintptr_t>(whole.const_data_ptr());
  return address % kVectorBytes == 0 ? whole : torch::stable::clone(whole);
}

template <typename Sum>
const Sum* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<Sum>() : nullptr;
}

std::optional<Tensor> contiguous_or_none(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? std::optional<Tensor>(torch::stable::contiguous(*tensor)) : std::nullopt;
}

std::tuple<Tensor, Tensor> layer_norm_segment_sum(const Tensor& rows, const Tensor& cu_seqlens,
                                                  std::optional<Tensor> weight, std::optional<Tensor> bias,
                                                  int64_t prefix, double eps) {
  const Tensor source = aligned(rows), starts = torch::stable::contiguous(cu_seqlens);
  const auto scale = contiguous_or_none(weight), shift = contiguous_or_none(bias);
  const Layout layout = {starts.size(0) - 1, prefix, static_cast<int>(rows.size(1)), eps};
  const bool is_double = rows.scalar_type() == ScalarType::Double;
  const auto make = [&](ScalarType dtype) {
    return torch::stable::empty({layout.sequences, layout.width}, dtype, std::nullopt, rows.device());
  };
  Tensor out = make(rows.scalar_type());
  Tensor normalized = make(is_double ? ScalarType::Double : ScalarType::Float);
  if (out.numel() == 0) return {out, normalized};
  dispatch_floating(rows.scalar_type(), "layer_norm_segment_sum", [&]<typename T>() {
    using Sum = accumulate_t<T>;
    dispatch_width<T>(layout.width, [&]<int vectors>() {
      launch("layer_norm_segment_sum", layer_norm_segment_sum_kernel<T, vectors>, out, layout.sequences,
             kThreads, layout.width * static_cast<int64_t>(sizeof(Sum)), layout, source.const_data_ptr<T>(),
             starts.const_data_ptr<int32_t>(), data_or_null<Sum>(scale), data_or_null<Sum>(shift),
             out.mutable_data_ptr<T>(), normalized.mutable_data_ptr<Sum>());
    });
  });
  return {out, normalized};
}

// grad (S, D) → (T, D).
Tensor layer_norm_segment_sum_backward(const Tensor& grad, const Tensor& rows, const Tensor& cu_seqlens,
                                       std::optional<Tensor> weight, int64_t prefix, double eps) {
  const Tensor source = aligned(rows), cotangent = aligned(grad);
  const Tensor starts = torch::stable::contiguous(cu_seqlens);
  const auto scale = contiguous_or_none(weight);
  const Layout layout = {starts.size(0) - 1, prefix, static_cast<int>(rows.size(1)), eps};
  STD_TORCH_CHECK(grad.size(0) == layout.sequences,
                  "layer_norm_segment_sum_backward: `grad` must be (S, D).");
  Tensor out =
      torch::stable::empty({rows.size(0), layout.width}, rows.scalar_type(), std::nullopt, rows.device());
  if (out.numel() == 0) return out;
  dispatch_floating(rows.scalar_type(), "layer_norm_segment_sum_backward", [&]<typename T>() {
    using Sum = accumulate_t<T>;
    dispatch_width<T>(layout.width, [&]<int vectors>() {
      launch("layer_norm_segment_sum_backward", layer_norm_segment_sum_backward_kernel<T, vectors>, out,
             layout.sequences, kThreads, 0, layout, cotangent.const_data_ptr<T>(), source.const_data_ptr<T>(),
             starts.const_data_ptr<int32_t>(), data_or_null<Sum>(scale), out.mutable_data_ptr<T>());
    });
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("layer_norm_segment_sum", TORCH_BOX(&fastshap::layer_norm_segment_sum));
  m.impl("layer_norm_segment_sum_backward", TORCH_BOX(&fastshap::layer_norm_segment_sum_backward));
}
