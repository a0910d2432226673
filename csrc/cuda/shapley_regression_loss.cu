// shapley_regression_loss: coalition_sum's pass over phi, and what is missing to the target while the sums
// are in registers. The floor is phi and the target read once and the residual written once; backward, the
// residual read once and phi's gradient written once.

#include <tuple>

#include "fastshap/coalition_sums.h"

namespace fastshap {
namespace {

template <typename Sum>
struct SubtractTarget {
  const Sum* target;  // [B, M, K]
  Sum* residual;      // [B, M, K]
  Sum* partial;       // [B, M, ceil(K / 32)] sums of squares, one a warp
  int64_t classes;    // K

  // Whole warps come here: each adds up its squares.
  __device__ void operator()(int64_t row, int64_t at, Sum sum, bool exists) const {
    Sum missing = 0;
    if (exists) {
      missing = sum - target[row * classes + at];
      residual[row * classes + at] = missing;
    }
    Sum squares = missing * missing;
#pragma unroll
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      squares += __shfl_xor_sync(kAllLanes, squares, distance);
    }
    if (exists && threadIdx.x % kWarp == 0) partial[row * ceil_div(classes, kWarp) + at / kWarp] = squares;
  }
};

// residual[b, m] = sum over p in S of phi[b, p] - target[b, m] and errors[b, m] = sum over k of residual
// squared, in the dtype of `target`.
std::tuple<Tensor, Tensor> shapley_regression_loss(const Tensor& phi, const Tensor& bits,
                                                   const Tensor& target) {
  const Tensor rows = with_whole_rows(phi), packed = torch::stable::contiguous(bits);
  const Tensor goal = torch::stable::contiguous(target);
  const int64_t images = goal.size(0), coalitions = goal.size(1), classes = goal.size(2);
  const auto empty = [&](std::initializer_list<int64_t> sizes) {
    return torch::stable::empty(sizes, target.scalar_type(), std::nullopt, phi.device());
  };
  Tensor residual = empty({images, coalitions, classes});
  Tensor partial = empty({images, coalitions, ceil_div(classes, kWarp)});
  const bool is_double = phi.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(target.scalar_type() == (is_double ? ScalarType::Double : ScalarType::Float),
                  "shapley_regression_loss: target must have the dtype that phi is summed in");
  if (residual.numel() != 0) {
    dispatch_floating(phi.scalar_type(), "shapley_regression_loss", [&]<typename From>() {
      using Sum = accumulate_t<From>;
      sum_coalitions<From>("shapley_regression_loss", rows, packed,
                           SubtractTarget<Sum>{goal.const_data_ptr<Sum>(), residual.mutable_data_ptr<Sum>(),
                                               partial.mutable_data_ptr<Sum>(), classes});
    });
  }
  const int64_t last = 2;
  return {residual, torch::stable::sum(partial, torch::headeronly::IntHeaderOnlyArrayRef(&last, 1))};
}

// out[b, p] = sum over the coalitions m that player p is in of scale[b, m] * residual[b, m].
Tensor shapley_regression_loss_backward(const Tensor& residual, const Tensor& scale, const Tensor& bits,
                                        int64_t players, ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(residual), packed = torch::stable::contiguous(bits);
  const Tensor factors = torch::stable::contiguous(scale);
  Tensor out =
      torch::stable::empty({rows.size(0), players, rows.size(2)}, dtype, std::nullopt, residual.device());
  dispatch_floating(dtype, "shapley_regression_loss_backward", [&]<typename To>() {
    using Sum = accumulate_t<To>;
    STD_TORCH_CHECK(rows.scalar_type() == (sizeof(Sum) == 8 ? ScalarType::Double : ScalarType::Float),
                    "shapley_regression_loss: the residual must have the dtype that phi is summed in");
    scatter_coalitions<Sum, To>("shapley_regression_loss_backward", rows, factors.const_data_ptr<Sum>(),
                                packed, out);
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("shapley_regression_loss", TORCH_BOX(&fastshap::shapley_regression_loss));
  m.impl("shapley_regression_loss_backward", TORCH_BOX(&fastshap::shapley_regression_loss_backward));
}
