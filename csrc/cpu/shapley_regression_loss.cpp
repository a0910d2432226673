// shapley_regression_loss: coalition_sum's pass over phi, and what is missing to the target while it is in
// the cache.

#include <numeric>
#include <tuple>

#include "fastshap/coalitions.h"

namespace fastshap {
namespace {

// One coalition's tile: residual = sums - target. Returns the sum of its squares, lane by lane and then in
// order.
template <typename Sum>
FASTSHAP_INLINE Sum subtract_target(const Sum* sums, const Sum* target, int64_t count, Sum* residual) {
  constexpr int64_t lanes = strip_width<Sum>;
  Sum squares[lanes] = {};
  for (int64_t start = 0; start < count; start += lanes) {
    const int64_t values = std::min(lanes, count - start);
    for (int64_t i = 0; i < values; ++i) {
      const Sum missing = sums[start + i] - target[start + i];
      residual[start + i] = missing;
      squares[i] += missing * missing;
    }
  }
  return std::accumulate(squares, squares + lanes, Sum(0));
}

template <typename From>
void subtract_targets(const Layout& layout, const Tensor& phi, const Tensor& bits, const Tensor& target,
                      Tensor& residual, Tensor& errors) {
  using Sum = accumulate_t<From>;
  const int64_t rows = layout.images * layout.coalitions, tiles = count_tiles(layout);
  const Sum* target_data = target.const_data_ptr<Sum>();
  Sum* residual_data = residual.mutable_data_ptr<Sum>();
  std::vector<Sum> tile_errors(rows * tiles);
  pool_images<From>(layout, phi, bits, [&](int64_t image, int64_t start, int64_t count, const Sum* sums) {
    for (int64_t m = 0; m < layout.coalitions; ++m) {
      const int64_t row = image * layout.coalitions + m, at = row * layout.features + start;
      tile_errors[row * tiles + start / layout.tile] = FASTSHAP_CLONED(
          subtract_target(sums + m * layout.tile, target_data + at, count, residual_data + at));
    }
  });
  Sum* error_data = errors.mutable_data_ptr<Sum>();
  for (int64_t row = 0; row < rows; ++row) {
    const Sum* of_row = tile_errors.data() + row * tiles;
    error_data[row] = std::accumulate(of_row, of_row + tiles, Sum(0));
  }
}

// residual[b, m] = Σ_{p in S} phi[b, p] - target[b, m] and errors[b, m] = Σ_k residual², in the dtype of
// `target`.
std::tuple<Tensor, Tensor> shapley_regression_loss(const Tensor& phi, const Tensor& bits,
                                                   const Tensor& target) {
  const Tensor rows = with_whole_rows(phi), packed = torch::stable::contiguous(bits);
  const Tensor goal = torch::stable::contiguous(target);
  const Layout layout = make_layout(rows.size(0), rows.size(1), bits.size(1), rows.size(2));
  Tensor residual = torch::stable::empty({layout.images, layout.coalitions, layout.features},
                                         target.scalar_type(), std::nullopt, phi.device());
  Tensor errors = torch::stable::empty({layout.images, layout.coalitions}, target.scalar_type(), std::nullopt,
                                       phi.device());
  if (errors.numel() == 0) return {residual, errors};
  const bool is_double = phi.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(target.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                  "shapley_regression_loss: target must have the dtype that phi is summed in");
  dispatch_floating(phi.scalar_type(), "shapley_regression_loss", [&]<typename From>() {
    subtract_targets<From>(layout, rows, packed, goal, residual, errors);
  });
  return {residual, errors};
}

// out[b, p] = Σ_m scale[b, m] residual[b, m] over the coalitions m that player p is in.
Tensor shapley_regression_loss_backward(const Tensor& residual, const Tensor& scale, const Tensor& bits,
                                        int64_t players, ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(residual), packed = torch::stable::contiguous(bits);
  const Tensor factors = torch::stable::contiguous(scale);
  const Layout layout = make_layout(rows.size(0), players, rows.size(1), rows.size(2));
  Tensor out = torch::stable::empty({layout.images, layout.players, layout.features}, dtype, std::nullopt,
                                    residual.device());
  use_huge_pages(out);
  dispatch_floating(dtype, "shapley_regression_loss_backward", [&]<typename To>() {
    using Sum = accumulate_t<To>;
    STD_TORCH_CHECK(rows.scalar_type() == (sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float),
                    "shapley_regression_loss: the residual must have the dtype that phi is summed in");
    scatter_images<Sum, To>(layout, rows, factors.const_data_ptr<Sum>(), packed, out);
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("shapley_regression_loss", TORCH_BOX(&fastshap::shapley_regression_loss));
  m.impl("shapley_regression_loss_backward", TORCH_BOX(&fastshap::shapley_regression_loss_backward));
}
