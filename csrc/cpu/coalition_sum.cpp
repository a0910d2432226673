// coalition_sum: every coalition of an image from one pass over its features; see coalitions.h.

#include "fastshap/coalitions.h"

namespace fastshap {
namespace {

template <typename From, typename To>
void store_sums(const Layout& layout, const Tensor& features, const Tensor& bits, Tensor& out) {
  To* out_data = out.mutable_data_ptr<To>();
  pool_images<From>(layout, features, bits, [&](int64_t image, int64_t start, int64_t count, auto* sums) {
    for (int64_t m = 0; m < layout.coalitions; ++m) {
      copy_run(sums + m * layout.tile, out_data + (image * layout.coalitions + m) * layout.features + start,
               count);
    }
  });
}

Tensor coalition_sum(const Tensor& features, const Tensor& bits, ScalarType dtype) {
  const Tensor rows = with_whole_rows(features), packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(rows.size(0), rows.size(1), bits.size(1), rows.size(2));
  Tensor out = torch::stable::empty({layout.images, layout.coalitions, layout.features}, dtype, std::nullopt,
                                    features.device());
  if (out.numel() == 0) return out;
  dispatch_floating(features.scalar_type(), "coalition_sum", [&]<typename From>() {
    if (dtype == ScalarType::Float) {
      store_sums<From, float>(layout, rows, packed, out);
    } else {
      STD_TORCH_CHECK(dtype == features.scalar_type(), "coalition_sum converts to float32 only");
      store_sums<From, From>(layout, rows, packed, out);
    }
  });
  return out;
}

Tensor coalition_sum_backward(const Tensor& grad, const Tensor& bits, int64_t players, ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(grad);
  const Tensor packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(rows.size(0), players, rows.size(1), rows.size(2));
  Tensor out = torch::stable::empty({layout.images, layout.players, layout.features}, dtype, std::nullopt,
                                    grad.device());
  use_huge_pages(out);
  dispatch_floating(dtype, "coalition_sum_backward", [&]<typename To>() {
    if (grad.scalar_type() == ScalarType::Float) {
      scatter_images<float, To>(layout, rows, nullptr, packed, out);
    } else {
      STD_TORCH_CHECK(dtype == grad.scalar_type(), "coalition_sum converts to float32 only");
      scatter_images<To, To>(layout, rows, nullptr, packed, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("coalition_sum", TORCH_BOX(&fastshap::coalition_sum));
  m.impl("coalition_sum_backward", TORCH_BOX(&fastshap::coalition_sum_backward));
}
