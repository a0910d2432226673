// What the CPU and the CUDA kernels share: the stable tensor API, element types and bits.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace fastshap {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Sums run in float, and in double for double.
template <typename T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <typename T>
using accumulate_t = typename Accumulator<T>::type;

// 32-bit words that hold one coalition.
constexpr int64_t words(int64_t players) { return (players + 31) / 32; }

// Bits of a coalition's last word that stand for players.
constexpr uint32_t used_bits(int64_t players) { return ~uint32_t{0} >> ((32 - players % 32) % 32); }

inline bool is_channels_last(const Tensor& t) {
  return t.stride(1) == 1 && t.stride(3) == t.size(1) && t.stride(2) == t.size(3) * t.size(1) &&
         t.stride(0) == t.size(2) * t.size(3) * t.size(1);
}

// The format that the reference keeps: contiguous where the tensor is, then channels_last, else a contiguous
// copy.
inline MemoryFormat memory_format(const Tensor& images) {
  return !images.is_contiguous() && is_channels_last(images) ? MemoryFormat::ChannelsLast
                                                             : MemoryFormat::Contiguous;
}

// Calls `body.template operator()<T>()` with the C++ type of a floating dtype.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case ScalarType::Double:
      return body.template operator()<double>();
    case ScalarType::Float:
      return body.template operator()<float>();
    case ScalarType::BFloat16:
      return body.template operator()<BFloat16>();
    case ScalarType::Half:
      return body.template operator()<Half>();
    default:
      STD_TORCH_CHECK(false, op, ": float16, bfloat16, float32 or float64 expected");
  }
}

}  // namespace fastshap
