// How a kernel starts on a CUDA device. tests/emulation/fastshap/launch.h replaces this file where there is
// none.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

#include "fastshap/tensor.h"

// The dispatch key that the kernels are registered under.
#define FASTSHAP_KEY CUDA

// Names the dynamic shared memory of a kernel: `bytes` of it were asked for at its launch, aligned to 16.
#define FASTSHAP_SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]

namespace fastshap {

// Runs `kernel` on the device and the current stream of `on`; no blocks are no launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), const Tensor& on, int64_t blocks, int threads,
            int64_t shared_bytes, Arguments... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks <= INT32_MAX, op, ": ", blocks, " thread blocks are more than one launch can hold");
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  if (shared_bytes > 48 * 1024) {
    const cudaError_t allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                     static_cast<int>(shared_bytes));
    STD_TORCH_CHECK(allowed == cudaSuccess, op, ": ", cudaGetErrorString(allowed));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, static_cast<size_t>(shared_bytes),
           static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t launched = cudaGetLastError();
  STD_TORCH_CHECK(launched == cudaSuccess, op, ": ", cudaGetErrorString(launched));
}

// The number at `value` on the device of `on`. It waits for the device, which only a shape that hangs on data
// is worth.
inline int64_t read_back(const char* op, const int64_t* value, const Tensor& on) {
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  int64_t result = 0;
  cudaError_t read = cudaMemcpyAsync(&result, value, sizeof(result), cudaMemcpyDeviceToHost,
                                     static_cast<cudaStream_t>(stream));
  if (read == cudaSuccess) read = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(read == cudaSuccess, op, ": ", cudaGetErrorString(read));
  return result;
}

}  // namespace fastshap
