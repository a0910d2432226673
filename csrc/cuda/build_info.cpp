// How this library was built, for `python -m fastshap_kernels.info`.

#include <cuda_runtime_api.h>
#include <torch/headeronly/version.h>

#define FASTSHAP_STRING(x) #x
#define FASTSHAP_VALUE(x) FASTSHAP_STRING(x)

extern "C" __attribute__((visibility("default"))) const char* fastshap_build_info() {
  return "CUDA " FASTSHAP_VALUE(
      CUDART_VERSION) ", torch " TORCH_VERSION
                      " headers, stable ABI of torch 2.11, for " FASTSHAP_ARCHITECTURES;
}
