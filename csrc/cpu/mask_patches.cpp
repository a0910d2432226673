// mask_patches: every coalition of every image in one pass over memory.
//
// A patch's pixels lie in runs: W/w pixels of one image row (contiguous), or W/w · C values (channels_last).
// Both formats are therefore "rows" of runs; a run is copied from the image or from the baseline.

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <vector>

#include "fastshap/cpu.h"

namespace fastshap {
namespace {

struct Layout {
  int64_t images;        // B
  int64_t coalitions;    // M
  int64_t rows;          // C·H (contiguous) or H (channels_last)
  int64_t height;        // H
  int64_t row;           // values in a row: W or W·C
  int64_t run;           // values of one patch in a row: W/w or W/w · C
  int64_t grid_rows;     // h
  int64_t grid_columns;  // w
  int64_t bit_words;     // 32-bit words a coalition
};

Layout make_layout(const Tensor& like, const Tensor& bits, int64_t grid_rows, int64_t grid_columns,
                   MemoryFormat format) {
  const int64_t channels = like.size(1), height = like.size(2), width = like.size(3);
  const bool planar = format == MemoryFormat::Contiguous;
  Layout layout;
  layout.images = bits.size(0);
  layout.coalitions = bits.size(1);
  layout.rows = planar ? channels * height : height;
  layout.height = height;
  layout.row = planar ? width : width * channels;
  layout.run = layout.row / grid_columns;
  layout.grid_rows = grid_rows;
  layout.grid_columns = grid_columns;
  layout.bit_words = words(grid_rows * grid_columns);
  return layout;
}

template <typename From, typename To>
FASTSHAP_INLINE void copy_run(const From* from, To* to, int64_t count) {
  // Pointers of one type may overlap for all that the compiler knows, and the loop would go value by value.
  if constexpr (std::is_same_v<From, To>) {
    std::memcpy(to, from, count * sizeof(To));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
  }
}

// One image row for one coalition.
template <typename From, typename To>
FASTSHAP_INLINE void mask_rows(const Layout& layout, const From* image, const From* baseline,
                               const int32_t* bits, To* out) {
  const int64_t patch_height = layout.height / layout.grid_rows;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t first_player = (row % layout.height) / patch_height * layout.grid_columns;
    for (int64_t column = 0; column < layout.grid_columns; ++column) {
      const int64_t at = row * layout.row + column * layout.run;
      const From* source = is_present(bits, first_player + column) ? image : baseline;
      copy_run(source + at, out + at, layout.run);
    }
  }
}

template <typename From, typename To>
void mask_images(const Layout& layout, const Tensor& images, const Tensor& bits, const Tensor& baseline,
                 Tensor& out) {
  const int64_t pixels = layout.rows * layout.row;
  const From* image_data = images.const_data_ptr<From>();
  const From* baseline_data = baseline.const_data_ptr<From>();
  const int64_t baseline_step = baseline.size(0) == 1 ? 0 : pixels;
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  To* out_data = out.mutable_data_ptr<To>();
  torch::stable::parallel_for(0, layout.images * layout.coalitions, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t image = i / layout.coalitions;
      FASTSHAP_CLONED(mask_rows(layout, image_data + image * pixels, baseline_data + image * baseline_step,
                                bit_data + i * layout.bit_words, out_data + i * pixels));
    }
  });
}

// out[b] = Σ_m grad[b, m] where the player is present (or where it is absent), in a fixed order of m.
template <typename From, typename To>
FASTSHAP_INLINE void sum_rows(const Layout& layout, const From* grad, const int32_t* bits, bool present,
                              To* out, accumulate_t<From>* sum) {
  const int64_t patch_height = layout.height / layout.grid_rows, pixels = layout.rows * layout.row;
  for (int64_t row = 0; row < layout.rows; ++row) {
    const int64_t first_player = (row % layout.height) / patch_height * layout.grid_columns;
    std::fill(sum, sum + layout.row, accumulate_t<From>(0));
    for (int64_t m = 0; m < layout.coalitions; ++m) {
      const From* source = grad + m * pixels + row * layout.row;
      for (int64_t column = 0; column < layout.grid_columns; ++column) {
        if (is_present(bits + m * layout.bit_words, first_player + column) != present) continue;
        const int64_t start = column * layout.run;
        for (int64_t i = 0; i < layout.run; ++i) sum[start + i] += source[start + i];
      }
    }
    copy_run(sum, out + row * layout.row, layout.row);
  }
}

template <typename From, typename To>
void sum_images(const Layout& layout, const Tensor& grad, const Tensor& bits, bool present, Tensor& out) {
  const int64_t pixels = layout.rows * layout.row;
  const From* grad_data = grad.const_data_ptr<From>();
  const int32_t* bit_data = bits.const_data_ptr<int32_t>();
  To* out_data = out.mutable_data_ptr<To>();
  torch::stable::parallel_for(0, layout.images, 1, [&](int64_t begin, int64_t end) {
    std::vector<accumulate_t<From>> sum(layout.row);
    for (int64_t image = begin; image < end; ++image) {
      FASTSHAP_CLONED(sum_rows(layout, grad_data + image * layout.coalitions * pixels,
                               bit_data + image * layout.coalitions * layout.bit_words, present,
                               out_data + image * pixels, sum.data()));
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
  Tensor out = torch::stable::empty(
      {layout.images * layout.coalitions, images.size(1), images.size(2), images.size(3)}, dtype,
      std::nullopt, images.device(), std::nullopt, format);
  if (out.numel() == 0) return out;
  use_huge_pages(out);
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

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("mask_patches", TORCH_BOX(&fastshap::mask_patches));
  m.impl("mask_patches_backward", TORCH_BOX(&fastshap::mask_patches_backward));
}
