// Kernels for tests of the emulation itself: right, with a missing barrier, and with one that some threads
// never reach.

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 64;

enum class Barrier { present, missing, divergent };

// out[i] = in[kThreads - 1 - i], through shared memory.
template <Barrier barrier>
__global__ void reverse_kernel(const float* in, float* out) {
  __shared__ float staged[kThreads];
  staged[threadIdx.x] = in[threadIdx.x];
  if (barrier == Barrier::present || (barrier == Barrier::divergent && threadIdx.x < 32)) __syncthreads();
  out[threadIdx.x] = staged[kThreads - 1 - threadIdx.x];
}

// out[i] = the sum over i's warp, by exchanges; and how many of its lanes hold a positive number.
__global__ void warp_kernel(const float* in, float* out) {
  float sum = in[threadIdx.x];
  for (int distance = kWarp / 2; distance > 0; distance /= 2)
    sum += __shfl_xor_sync(kAllLanes, sum, distance);
  const unsigned positive = __ballot_sync(kAllLanes, in[threadIdx.x] > 0.0f);
  out[threadIdx.x] = sum;
  out[kThreads + threadIdx.x] = static_cast<float>(__popc(positive));
}

Tensor reverse(const Tensor& in, int64_t barrier) {
  Tensor out = torch::stable::empty({kThreads}, ScalarType::Float, std::nullopt, in.device());
  const auto kernel = barrier == 0   ? reverse_kernel<Barrier::present>
                      : barrier == 1 ? reverse_kernel<Barrier::missing>
                                     : reverse_kernel<Barrier::divergent>;
  launch("reverse", kernel, in, 1, kThreads, 0, in.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

Tensor sum_warps(const Tensor& in) {
  Tensor out = torch::stable::empty({2, kThreads}, ScalarType::Float, std::nullopt, in.device());
  launch("sum_warps", warp_kernel, in, 1, kThreads, 0, in.const_data_ptr<float>(),
         out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY(fastshap_emulation, m) {
  m.def("reverse(Tensor values, int barrier) -> Tensor");
  m.def("sum_warps(Tensor values) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastshap_emulation, FASTSHAP_KEY, m) {
  m.impl("reverse", TORCH_BOX(&fastshap::reverse));
  m.impl("sum_warps", TORCH_BOX(&fastshap::sum_warps));
}
