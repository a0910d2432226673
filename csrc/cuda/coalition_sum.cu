// coalition_sum: see coalition_sums.h. The floor is the bytes of the features read once (the sums are M / P
// of them); backward, those of their gradient written once.

#include "fastshap/coalition_sums.h"

namespace fastshap {
namespace {

template <typename To>
struct StoreSum {
  To* out;           // [B, M, L]
  int64_t features;  // L

  template <typename Sum>
  __device__ void operator()(int64_t row, int64_t feature, Sum sum, bool exists) const {
    if (exists) out[row * features + feature] = static_cast<To>(sum);
  }
};

Tensor coalition_sum(const Tensor& features, const Tensor& bits, ScalarType dtype) {
  const Tensor rows = with_whole_rows(features), packed = torch::stable::contiguous(bits);
  Tensor out = torch::stable::empty({rows.size(0), bits.size(1), rows.size(2)}, dtype, std::nullopt,
                                    features.device());
  if (out.numel() == 0) return out;
  dispatch_floating(features.scalar_type(), "coalition_sum", [&]<typename From>() {
    if (dtype == ScalarType::Float) {
      sum_coalitions<From>("coalition_sum", rows, packed,
                           StoreSum<float>{out.mutable_data_ptr<float>(), rows.size(2)});
    } else {
      STD_TORCH_CHECK(dtype == features.scalar_type(), "coalition_sum converts to float32 only");
      sum_coalitions<From>("coalition_sum", rows, packed,
                           StoreSum<From>{out.mutable_data_ptr<From>(), rows.size(2)});
    }
  });
  return out;
}

Tensor coalition_sum_backward(const Tensor& grad, const Tensor& bits, int64_t players, ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(grad), packed = torch::stable::contiguous(bits);
  Tensor out =
      torch::stable::empty({rows.size(0), players, rows.size(2)}, dtype, std::nullopt, grad.device());
  dispatch_floating(dtype, "coalition_sum_backward", [&]<typename To>() {
    if (grad.scalar_type() == ScalarType::Float) {
      scatter_coalitions<float, To>("coalition_sum_backward", rows, nullptr, packed, out);
    } else {
      STD_TORCH_CHECK(dtype == grad.scalar_type(), "coalition_sum converts to float32 only");
      scatter_coalitions<To, To>("coalition_sum_backward", rows, nullptr, packed, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("coalition_sum", TORCH_BOX(&fastshap::coalition_sum));
  m.impl("coalition_sum_backward", TORCH_BOX(&fastshap::coalition_sum_backward));
}
