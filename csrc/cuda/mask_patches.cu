// mask_patches: a thread holds a few neighbouring values of an image and writes them for several coalitions.
//
// Neighbours lie in one patch: the number of them divides a patch's run in a row of memory, W/w values
// (contiguous) or W/w · C (channels_last). One bit therefore decides a whole vector.

#include "fastshap/cuda.h"

namespace fastshap {
namespace {

constexpr int kThreads = 256;
constexpr int kBlocks = 4;       // on a multiprocessor: 64 registers a thread
constexpr int kCoalitions = 16;  // written by one thread: its pixels are read once for all of them

// Whatever lies within one image fits 32 bits; offsets of whole images do not.
struct Layout {
  int images;        // B
  int coalitions;    // M
  int pixels;        // C·H·W
  int row;           // values in a row of memory: W, or W·C in channels_last
  int height;        // H
  int patch_height;  // H/h
  int run;           // values of one patch in a row of memory
  int grid_columns;  // w
  int bit_words;     // 32-bit words a coalition
};

Layout make_layout(const Tensor& like, const Tensor& bits, int64_t grid_rows, int64_t grid_columns,
                   MemoryFormat format) {
  const int64_t channels = like.size(1), height = like.size(2), width = like.size(3);
  STD_TORCH_CHECK(channels * height * width <= INT32_MAX, "mask_patches: an image of 2^31 values or more");
  const int64_t row = format == MemoryFormat::Contiguous ? width : width * channels;
  Layout layout;
  layout.images = static_cast<int>(bits.size(0));
  layout.coalitions = static_cast<int>(bits.size(1));
  layout.pixels = static_cast<int>(channels * height * width);
  layout.row = static_cast<int>(row);
  layout.height = static_cast<int>(height);
  layout.patch_height = static_cast<int>(height / grid_rows);
  layout.run = static_cast<int>(row / grid_columns);
  layout.grid_columns = static_cast<int>(grid_columns);
  layout.bit_words = static_cast<int>(bits.size(2));
  return layout;
}

// Blocks that cover one image with `size` values a thread.
__host__ __device__ inline unsigned blocks_per_image(const Layout& layout, int size) {
  return static_cast<unsigned>(ceil_div(layout.pixels / size, kThreads));
}

__device__ inline int player_at(const Layout& layout, int at) {
  const int y = at / layout.row % layout.height;
  return y / layout.patch_height * layout.grid_columns + at % layout.row / layout.run;
}

template <typename From, typename To, int size>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_patches_kernel(Layout layout,
                        const From* __restrict__ images,                          // [B, pixels]
                        const From* __restrict__ baseline,                        // [1 or B, pixels]
                        int64_t baseline_step, const int32_t* __restrict__ bits,  // [B, M, W]
                        To* __restrict__ out) {                                   // [B, M, pixels]
  const unsigned blocks = blocks_per_image(layout, size);
  const unsigned chunks = static_cast<unsigned>(ceil_div(layout.coalitions, kCoalitions));
  const int at = static_cast<int>(blockIdx.x % blocks * kThreads + threadIdx.x) * size;
  if (at >= layout.pixels) return;
  const int64_t image = blockIdx.x / blocks / chunks;
  const int first = static_cast<int>(blockIdx.x / blocks % chunks) * kCoalitions;
  const int count = min(kCoalitions, layout.coalitions - first);
  const int player = player_at(layout, at);
  const Vector<From, size> pixels = load_vector<size>(images + image * layout.pixels + at);
  const Vector<From, size> fill = load_vector<size>(baseline + image * baseline_step + at);
  Vector<To, size> present, absent;
#pragma unroll
  for (int i = 0; i < size; ++i) {
    present.values[i] = static_cast<To>(pixels.values[i]);
    absent.values[i] = static_cast<To>(fill.values[i]);
  }
  const int64_t row = image * layout.coalitions + first;
  const int32_t* word = bits + row * layout.bit_words + player / 32;
  To* to = out + row * layout.pixels + at;
#pragma unroll 4
  for (int m = 0; m < count; ++m, word += layout.bit_words, to += layout.pixels) {
    store_vector(to, (static_cast<unsigned>(*word) >> (player & 31)) & 1 ? present : absent);
  }
}

// out[b] = Σ_m grad[b, m] where the player is present (or where it is absent), in the order of m.
template <typename From, typename To, int size>
__global__ void __launch_bounds__(kThreads, kBlocks)
    mask_patches_backward_kernel(Layout layout, const From* __restrict__ grad,    // [B, M, pixels]
                                 const int32_t* __restrict__ bits, bool present,  // [B, M, W]
                                 To* __restrict__ out) {                          // [B, pixels]
  const unsigned blocks = blocks_per_image(layout, size);
  const int at = static_cast<int>(blockIdx.x % blocks * kThreads + threadIdx.x) * size;
  if (at >= layout.pixels) return;
  const int64_t image = blockIdx.x / blocks;
  const int player = player_at(layout, at);
  const int32_t* word = bits + image * layout.coalitions * layout.bit_words + player / 32;
  const From* from = grad + image * layout.coalitions * layout.pixels + at;
  accumulate_t<From> sum[size] = {};
#pragma unroll 4
  for (int m = 0; m < layout.coalitions; ++m, word += layout.bit_words, from += layout.pixels) {
    if (((static_cast<unsigned>(*word) >> (player & 31)) & 1) != static_cast<unsigned>(present)) continue;
    const Vector<From, size> values = load_vector<size>(from);
#pragma unroll
    for (int i = 0; i < size; ++i) sum[i] += static_cast<accumulate_t<From>>(values.values[i]);
  }
  Vector<To, size> result;
#pragma unroll
  for (int i = 0; i < size; ++i) result.values[i] = static_cast<To>(sum[i]);
  store_vector(out + image * layout.pixels + at, result);
}

template <typename From, typename To>
void mask_images(const Layout& layout, const Tensor& images, const Tensor& bits, const Tensor& baseline,
                 Tensor& out) {
  constexpr int most = kVectorBytes / sizeof(To);
  const int of_images = aligned_size(vector_size(layout.run, most), images.const_data_ptr<From>());
  dispatch_vector(aligned_size(of_images, baseline.const_data_ptr<From>()), [&]<int size>() {
    if constexpr (size <= most) {
      const int64_t chunks = ceil_div(layout.coalitions, kCoalitions);
      launch("mask_patches", mask_patches_kernel<From, To, size>, out,
             layout.images * chunks * blocks_per_image(layout, size), kThreads, 0, layout,
             images.const_data_ptr<From>(), baseline.const_data_ptr<From>(),
             baseline.size(0) == 1 ? int64_t{0} : int64_t{layout.pixels}, bits.const_data_ptr<int32_t>(),
             out.mutable_data_ptr<To>());
    }
  });
}

template <typename From, typename To>
void sum_images(const Layout& layout, const Tensor& grad, const Tensor& bits, bool present, Tensor& out) {
  dispatch_vector(vector_size(layout.run, grad.const_data_ptr<From>()), [&]<int size>() {
    if constexpr (size <= kVectorBytes / sizeof(From)) {
      launch("mask_patches_backward", mask_patches_backward_kernel<From, To, size>, out,
             int64_t{layout.images} * blocks_per_image(layout, size), kThreads, 0, layout,
             grad.const_data_ptr<From>(), bits.const_data_ptr<int32_t>(), present,
             out.mutable_data_ptr<To>());
    }
  });
}

Tensor mask_patches(const Tensor& images, const Tensor& bits, const Tensor& baseline, int64_t grid_rows,
                    int64_t grid_columns, ScalarType dtype) {
  const MemoryFormat format = memory_format(images);
  const Tensor pixels = torch::stable::contiguous(images, format);
  const Tensor fill = torch::stable::contiguous(baseline, format);
  const Tensor packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(pixels, packed, grid_rows, grid_columns, format);
  Tensor out =
      torch::stable::empty({bits.size(0) * bits.size(1), images.size(1), images.size(2), images.size(3)},
                           dtype, std::nullopt, images.device(), std::nullopt, format);
  if (out.numel() == 0) return out;
  if (dtype != images.scalar_type()) {
    STD_TORCH_CHECK(images.scalar_type() == ScalarType::Float, "mask_patches converts float32 images only");
    dispatch_floating(dtype, "mask_patches",
                      [&]<typename To>() { mask_images<float, To>(layout, pixels, packed, fill, out); });
    return out;
  }
  dispatch_floating(dtype, "mask_patches",
                    [&]<typename T>() { mask_images<T, T>(layout, pixels, packed, fill, out); });
  return out;
}

// The gradient of the images (`present`) or of each image's baseline (not `present`).
Tensor mask_patches_backward(const Tensor& grad, const Tensor& bits, int64_t grid_rows, int64_t grid_columns,
                             bool present, ScalarType dtype) {
  const MemoryFormat format = memory_format(grad);
  const Tensor pixels = torch::stable::contiguous(grad, format);
  const Tensor packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(pixels, packed, grid_rows, grid_columns, format);
  Tensor out = torch::stable::empty({layout.images, grad.size(1), grad.size(2), grad.size(3)}, dtype,
                                    std::nullopt, grad.device(), std::nullopt, format);
  if (out.numel() == 0) return out;
  dispatch_floating(grad.scalar_type(), "mask_patches_backward", [&]<typename From>() {
    if (dtype == ScalarType::Float) {
      sum_images<From, float>(layout, pixels, packed, present, out);
    } else {
      STD_TORCH_CHECK(dtype == grad.scalar_type(), "mask_patches converts float32 images only");
      sum_images<From, From>(layout, pixels, packed, present, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, FASTSHAP_KEY, m) {
  m.impl("mask_patches", TORCH_BOX(&fastshap::mask_patches));
  m.impl("mask_patches_backward", TORCH_BOX(&fastshap::mask_patches_backward));
}
