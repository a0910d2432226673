// coalition_sum: every coalition of an image from one pass over its features.
//
// Forward: see coalitions.h. Backward: four coalitions make 16 kinds of players, by which of the four they
// are in. The gradient of each kind is added up once, and a player's row is the sum of one kind's row for
// each four coalitions: no branches. Each sum has a fixed order, whatever the tiles and threads.

#include "fastshap/coalitions.h"

namespace fastshap {
namespace {

constexpr int64_t group = 4;   // coalitions that sort the players into kinds
constexpr int64_t kinds = 16;  // subsets of a group

int64_t count_groups(const Layout& layout) { return (layout.coalitions + group - 1) / group; }

// One tile of an image: out[p] = Σ_m grad[m] where player p is in coalition m. `kind` is (groups, P), `sums`
// (groups, kinds, tile), zero.
template <typename From, typename To>
FASTSHAP_CLONES void scatter_tile(const Layout& layout, const From* grad, const uint8_t* kind, int64_t count,
                                  To* out, accumulate_t<From>* sums) {
  using Sum = accumulate_t<From>;
  constexpr int64_t width = Strip<Sum>::width;
  const int64_t groups = count_groups(layout);
  for (int64_t m = 0; m < layout.coalitions; ++m) {
    Sum* of_group = sums + m / group * kinds * layout.tile;
    for (int64_t k = 0; k < kinds; ++k) {
      if ((k >> (m % group) & 1) == 0) continue;
      for (int64_t i = 0; i < count; ++i) {
        of_group[k * layout.tile + i] += static_cast<Sum>(grad[m * layout.features + i]);
      }
    }
  }
  for (int64_t player = 0; player < layout.players; ++player) {
    for (int64_t start = 0; start < count; start += width) {
      Strip<Sum> strip;
      for (int64_t g = 0; g < groups; ++g) {
        strip.add(sums + (g * kinds + kind[g * layout.players + player]) * layout.tile + start);
      }
      To* to = out + player * layout.features + start;
      const int64_t values = std::min(width, count - start);
      if constexpr (std::is_same_v<To, Sum>) {
        if (values == width) {
          strip.store(to);
          continue;
        }
      }
      Sum sum[width];
      strip.store(sum);
      copy_run(sum, to, values);
    }
  }
}

// kind[b, g, p] = which coalitions of group g player p is in.
FASTSHAP_CLONES void find_kinds(const Layout& layout, const int32_t* bits, uint8_t* kind) {
  const int64_t groups = count_groups(layout);
  for (int64_t i = 0; i < layout.images * layout.coalitions; ++i) {
    const int64_t image = i / layout.coalitions, m = i % layout.coalitions;
    uint8_t* of_group = kind + (image * groups + m / group) * layout.players;
    for (int64_t first = 0; first < layout.players; first += word) {
      const uint32_t present = static_cast<uint32_t>(*bits++);
      const int64_t players = std::min(word, layout.players - first);
      for (int64_t p = 0; p < players; ++p) of_group[first + p] |= (present >> p & 1u) << (m % group);
    }
  }
}

template <typename From, typename To>
void scatter_images(const Layout& layout, const Tensor& grad, const Tensor& bits, Tensor& out) {
  using Sum = accumulate_t<From>;
  const From* grad_data = grad.const_data_ptr<From>();
  To* out_data = out.mutable_data_ptr<To>();
  const int64_t groups = count_groups(layout);
  std::vector<uint8_t> kind(layout.images * groups * layout.players);
  find_kinds(layout, bits.const_data_ptr<int32_t>(), kind.data());
  for_each_tile<Sum>(layout, groups * kinds, [&](int64_t image, int64_t start, int64_t count, Sum* sums) {
    scatter_tile(layout, grad_data + image * layout.coalitions * layout.features + start,
                 kind.data() + image * groups * layout.players, count,
                 out_data + image * layout.players * layout.features + start, sums);
  });
}

template <typename From, typename To>
void store_sums(const Layout& layout, const Tensor& features, const Tensor& bits, Tensor& out) {
  To* out_data = out.mutable_data_ptr<To>();
  pool_images<From>(layout, features, bits, [&](int64_t image, int64_t start, int64_t count, auto* sums) {
    for (int64_t m = 0; m < layout.coalitions; ++m) {
      copy_run(sums + m * layout.tile, out_data + (image * layout.coalitions + m) * layout.features + start,
               count);
    }
  });
}

Tensor coalition_sum(const Tensor& features, const Tensor& bits, ScalarType dtype) {
  const Tensor rows = with_whole_rows(features), packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(rows.size(0), rows.size(1), bits.size(1), rows.size(2));
  Tensor out = torch::stable::empty({layout.images, layout.coalitions, layout.features}, dtype, std::nullopt,
                                    features.device());
  if (out.numel() == 0) return out;
  dispatch_floating(features.scalar_type(), "coalition_sum", [&]<typename From>() {
    if (dtype == ScalarType::Float) {
      store_sums<From, float>(layout, rows, packed, out);
    } else {
      STD_TORCH_CHECK(dtype == features.scalar_type(), "coalition_sum converts to float32 only");
      store_sums<From, From>(layout, rows, packed, out);
    }
  });
  return out;
}

Tensor coalition_sum_backward(const Tensor& grad, const Tensor& bits, int64_t players, ScalarType dtype) {
  const Tensor rows = torch::stable::contiguous(grad);
  const Tensor packed = torch::stable::contiguous(bits);
  const Layout layout = make_layout(rows.size(0), players, rows.size(1), rows.size(2));
  Tensor out = torch::stable::empty({layout.images, layout.players, layout.features}, dtype, std::nullopt,
                                    grad.device());
  use_huge_pages(out);
  dispatch_floating(dtype, "coalition_sum_backward", [&]<typename To>() {
    if (grad.scalar_type() == ScalarType::Float) {
      scatter_images<float, To>(layout, rows, packed, out);
    } else {
      STD_TORCH_CHECK(dtype == grad.scalar_type(), "coalition_sum converts to float32 only");
      scatter_images<To, To>(layout, rows, packed, out);
    }
  });
  return out;
}

}  // namespace
}  // namespace fastshap

STABLE_TORCH_LIBRARY_IMPL(fastshap, CPU, m) {
  m.impl("coalition_sum", TORCH_BOX(&fastshap::coalition_sum));
  m.impl("coalition_sum_backward", TORCH_BOX(&fastshap::coalition_sum_backward));
}
