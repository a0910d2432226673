// Kernels with a fault each, for the test that the sanitizers see it.

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 32;

enum Fault { kNone, kStaticMemory, kDynamicMemory, kGlobalMemory, kAlignment, kShift, kOverflow, kNull };

__global__ void faulty_kernel(int fault, const float* in, float* out) {
  __shared__ float staged[kThreads];
  FASTSHAP_SHARED_MEMORY(memory);
  float* dynamic = reinterpret_cast<float*>(memory);
  const int lane = static_cast<int>(threadIdx.x), past = lane + (lane == 0 ? kThreads : 0);
  staged[lane] = dynamic[lane] = in[lane];
  __syncthreads();
  float value = staged[fault == kStaticMemory ? past : lane];
  if (fault == kDynamicMemory) value = dynamic[past];
  if (fault == kGlobalMemory) value = in[past];
  if (fault == kAlignment) value = load_vector<4>(in + 1).values[0];
  if (fault == kShift) value = static_cast<float>(1u << (kThreads + lane));
  if (fault == kOverflow) value = static_cast<float>(static_cast<int>(in[lane]) + INT32_MAX);
  const float* source = fault == kNull ? nullptr : in;
  if (fault == kNull) memcpy(out, source, sizeof(float) * (blockDim.x - kThreads));
  out[lane] = value;
}

Tensor faulty(const Tensor& in, int64_t fault) {
  Tensor out = torch::stable::empty({kThreads}, ScalarType::Float, std::nullopt, in.device());
  launch("faulty", faulty_kernel, in, 1, kThreads, kThreads * sizeof(float), static_cast<int>(fault),
         in.const_data_ptr<float>(), out.mutable_data_ptr<float>());
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY(fastshap_faults, m) { m.def("faulty(Tensor values, int fault) -> Tensor"); }
STABLE_TORCH_LIBRARY_IMPL(fastshap_faults, FASTSHAP_KEY, m) {
  m.impl("faulty", TORCH_BOX(&fastshap::faulty));
}
