// How this library was built, for `python -m fastshap_kernels.info`.

#include <torch/headeronly/version.h>

extern "C" __attribute__((visibility("default"))) const char* fastshap_build_info() {
  return "compiler " __VERSION__ ", torch " TORCH_VERSION " headers, stable ABI of torch 2.11";
}
