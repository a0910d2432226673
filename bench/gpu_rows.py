"""What is measured on a GPU: every op's shapes, its providers, the bytes and FLOPs that it can't do without."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT)]

import fastshap_kernels as fk  # noqa: E402
from fastshap_kernels import testing  # noqa: E402

MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Provider:
    """One way to compute a row; `align` turns its output and gradients into those of the op."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    align: Callable[[list[Tensor]], list[Tensor]] | None = lambda outputs: outputs


@dataclass(frozen=True)
class Row:
    """One op at one shape."""

    op: str
    shape: str
    dtype: torch.dtype
    sizes: dict[str, Any]
    #: The inputs that gradients flow to.
    leaves: tuple[str, ...]
    #: Other ways to the same result, by name: rival(case, sizes) → provider.
    rivals: dict[str, Callable[[testing.Case, dict[str, Any]], Provider]] = field(default_factory=dict)
    #: Whether torch.compile is tried too: it takes seconds a shape.
    compiled: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else MODES[:1]

    def case(self, device: torch.device) -> testing.Case:
        case = testing.make(self.op, 0, self.dtype, device, **self.sizes)
        return replace(case, leaves=self.leaves)


def providers(row: Row, case: testing.Case) -> dict[str, Callable[[], Provider]]:
    """Makers of the row's providers, our backends first."""
    ours = ("triton", "cuda") if case.device.type == "cuda" else ("cpu",)
    makers = {name: lambda name=name: served(case, name) for name in [*testing.backends(row.op, *ours), "reference"]}
    for name, rival in row.rivals.items():
        makers[name] = lambda rival=rival: rival(case, row.sizes)
    if row.compiled:
        for name in ["reference", *(name for name in row.rivals if name == "eager")]:
            makers[f"{name}, compiled"] = lambda name=name: compiled(makers[name]())
    return makers


def served(case: testing.Case, backend: str) -> Provider:
    tensors = with_gradients(case.tensors, case.leaves)
    return Provider(lambda: case.call(backend, **tensors), [tensors[name] for name in case.leaves])


def compiled(provider: Provider) -> Provider:
    return replace(provider, forward=torch.compile(provider.forward, dynamic=False))


def with_gradients(tensors: dict[str, Tensor], leaves: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_(name in leaves) for name, x in tensors.items()}


# Rivals: what one would use without this package.


def variable_length_attention(case: testing.Case, sizes: dict[str, Any]) -> Provider:
    """PyTorch's attention for packed sequences, with queries, keys and values apart, as it likes them best."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, longest = case.tensors["cu_seqlens"], sizes["prefix"] + sizes["players"]
    parts = [x.contiguous().requires_grad_() for x in case.tensors["qkv"].detach().unbind(1)]
    return Provider(
        lambda: varlen_attn(*parts, boundaries, boundaries, longest, longest),
        parts,
        lambda outputs: [outputs[0], *([torch.stack(outputs[1:], 1)] if outputs[1:] else [])],
    )


def masked_attention(case: testing.Case, sizes: dict[str, Any]) -> Provider:
    """Every token of every coalition, absent players' keys masked."""
    qkv = case.tensors["qkv"]
    sequences, length = sizes["batch"] * sizes["coalitions"], sizes["prefix"] + sizes["players"]
    shape = sequences, sizes["heads"], length, sizes["head_dim"]
    parts = [torch.randn(shape, dtype=qkv.dtype, device=qkv.device).requires_grad_() for _ in range(3)]
    draw = testing.Draw(0, qkv.dtype, qkv.device)
    present = draw.pairs(sizes["batch"], sizes["coalitions"], sizes["players"]).flatten(0, 1)
    mask = F.pad(present, (sizes["prefix"], 0), value=True)[:, None, None].expand(-1, 1, length, -1)
    return Provider(lambda: F.scaled_dot_product_attention(*parts, attn_mask=mask), parts, None)


def argsort_sampler(case: testing.Case, sizes: dict[str, Any]) -> Provider:
    """The sampler that fits in three lines: a bool mask (n, P)."""
    players, device = sizes["players"], case.device
    count = sizes["batch"] * sizes["coalitions"] // (2 if sizes["paired"] else 1)
    size = torch.arange(1, players, device=device)
    weights = 1.0 / (size * (players - size))

    def forward() -> Tensor:
        drawn = torch.multinomial(weights, count, replacement=True) + 1
        # A random permutation serves as the ranks: one sort, not two.
        present = torch.rand(count, players, device=device).argsort(1) < drawn.unsqueeze(1)
        return torch.stack((present, ~present), 1) if sizes["paired"] else present

    return Provider(forward, [], None)


def eager_regression_loss(case: testing.Case, sizes: dict[str, Any]) -> Provider:
    """One product with ready masks."""
    tensors = with_gradients(case.tensors, case.leaves)
    phi, values = tensors["phi"], tensors["values"]
    masks = fk.unpack_bits(tensors["bits"], sizes["players"]).to(phi.dtype)

    def forward() -> Tensor:
        return (values.float() - torch.bmm(masks, phi).float()).square().mean()

    return Provider(forward, [tensors[name] for name in case.leaves])


def eager_linear_loss(case: testing.Case, sizes: dict[str, Any]) -> Provider:
    """The head's Shapley values made, then one product with ready masks."""
    tensors = with_gradients(case.tensors, case.leaves)
    values = tensors["values"]
    masks = fk.unpack_bits(tensors["bits"], sizes["players"]).to(values.dtype)

    def forward() -> Tensor:
        phi = F.linear(tensors["features"], tensors["weight"], tensors["bias"])
        return (values.float() - torch.bmm(masks, phi).float()).square().mean()

    return Provider(forward, [tensors[name] for name in case.leaves])


def floors(row: Row, case: testing.Case) -> dict[str, tuple[float, float]]:
    """mode → (bytes, FLOPs): every input read once and every output written once, products of present tokens."""
    t, s = case.tensors, row.sizes
    item = row.dtype.itemsize
    if row.op == "mask_patches":
        images, coalitions = t["images"].nbytes, s["coalitions"]
        share = fk.unpack_bits(t["bits"], s["grid"][0] * s["grid"][1]).double().mean().item()
        # The gradient of an absent patch is not read.
        return _modes(images * (1 + coalitions), images * (1 + share * coalitions))
    if row.op == "pack_tokens":
        packed = s["batch"] * s["coalitions"] // 2 * (s["players"] + 2 * s["prefix"]) * s["width"] * item
        return _modes(t["tokens"].nbytes + packed, t["tokens"].nbytes + packed)
    if row.op in ("segment_sum", "layer_norm_segment_sum"):
        sums = s["batch"] * s["coalitions"] * s["width"] * item
        rows = t["rows"].nbytes
        return _modes(rows + sums, (2 if row.op.startswith("layer") else 1) * rows + sums)
    if row.op == "coalition_sizes":
        return {"forward": (t["bits"].nbytes + 4 * s["batch"] * s["coalitions"], 0.0)}
    if row.op == "coalition_sum":
        sums = s["batch"] * s["coalitions"] * s["width"] * item
        return _modes(t["features"].nbytes + sums, t["features"].nbytes + sums)
    if row.op == "shapley_regression_loss":
        moved = t["phi"].nbytes + t["values"].nbytes
        return _modes(moved, moved)
    if row.op == "linear_shapley_loss":
        flops = 2 * s["batch"] * s["coalitions"] * s["width"] * s["classes"]
        moved = t["features"].nbytes + t["weight"].nbytes + t["values"].nbytes
        # Backward, the features are not needed again, their sums are; all three are smaller than what is written.
        return _modes(moved, moved + t["weight"].nbytes, flops, 2 * flops)
    if row.op == "packed_attention":
        pairs = float(t["cu_seqlens"].diff().double().square().sum())
        flops = 4 * pairs * s["heads"] * s["head_dim"]
        return _modes(t["qkv"].nbytes * 4 / 3, t["qkv"].nbytes * 7 / 3, flops, 2.5 * flops)
    if row.op == "exact_shapley":
        phi = s["batch"] * s["players"] * s["classes"] * item
        return _modes(t["values"].nbytes + phi, t["values"].nbytes + phi)
    return {}


def _modes(
    forward: float, backward: float, forward_flops: float = 0.0, backward_flops: float = 0.0
) -> dict[str, tuple[float, float]]:
    one, other = (forward, forward_flops), (backward, backward_flops)
    return {"forward": one, "backward": other, "both": (one[0] + other[0], one[1] + other[1])}


def rows(tiny: bool = False) -> list[Row]:
    """Every row, what the promises are about first."""
    found = [*_sampling(tiny), *_attention(tiny), *_losses(tiny), *_streaming(tiny)]
    found = [replace(row, compiled=row.compiled and not tiny) for row in found if row.op in testing.OPS]
    return sorted(found, key=lambda row: not (row.compiled or row.op in ("sample_coalitions", "packed_attention")))


def _sampling(tiny: bool) -> list[Row]:
    sizes = {"batch": 4 if tiny else 8192, "coalitions": 8, "players": 196}
    count = sizes["batch"] * sizes["coalitions"]
    counted = Row("coalition_sizes", f"{count} coalitions, P 196", torch.int32, sizes, ())
    sampled = [
        Row(
            "sample_coalitions",
            f"{count} coalitions, P 196, {'paired' if paired else 'unpaired'}",
            torch.int32,
            sizes | {"paired": paired},
            (),
            {"argsort": argsort_sampler},
        )
        for paired in (True, False)
    ]
    return [*sampled, counted]


def _attention(tiny: bool) -> list[Row]:
    batch, players = (1, 20) if tiny else (64, 196)
    return [
        Row(
            "packed_attention",
            f"{name}: {heads} heads of 64, B {batch}, M 8, P {players}, Q 1",
            torch.bfloat16,
            {"batch": batch, "coalitions": 8, "players": players, "prefix": 1, "heads": heads, "head_dim": 64},
            ("qkv",),
            {"varlen_attn": variable_length_attention, "masked SDPA": masked_attention},
            compiled=heads == 12,
        )
        for name, heads in (("ViT-S", 6), ("ViT-B", 12))
    ]


def _losses(tiny: bool) -> list[Row]:
    batch, classes, large = (2, 24, 48) if tiny else (128, 1000, 21841)
    found = [
        Row(
            "linear_shapley_loss",
            f"B {batch}, M 8, P 196, L 768, K {large}",
            torch.bfloat16,
            {
                "batch": batch,
                "coalitions": 8,
                "players": 196,
                "width": 768,
                "classes": large,
                "reduction": "mean",
            },
            ("features", "weight", "bias"),
            {"eager": eager_linear_loss},
            compiled=True,
        )
    ]
    for coalitions in (32, 8, 2):
        for dtype in (torch.bfloat16, torch.float32):
            sizes = {"batch": batch, "coalitions": coalitions, "players": 196}
            shape = f"B {batch}, M {coalitions}, P 196"
            found.append(
                Row(
                    "shapley_regression_loss",
                    f"{shape}, K {classes}",
                    dtype,
                    sizes | {"classes": classes, "reduction": "mean"},
                    ("phi",),
                    {"eager": eager_regression_loss},
                    compiled=coalitions == 32,
                )
            )
            found.append(
                Row(
                    "coalition_sum",
                    f"{shape}, L {classes}",
                    dtype,
                    sizes | {"width": classes},
                    ("features",),
                    compiled=coalitions == 32 and dtype == torch.bfloat16,
                )
            )
    players = 6 if tiny else 16
    sizes = {"batch": 1, "players": players, "classes": classes}
    found.append(
        Row("exact_shapley", f"B 1, P {players}, K {classes}", torch.float32, sizes, ("values",), compiled=True)
    )
    return found


def _streaming(tiny: bool) -> list[Row]:
    batch, width = (1, 48) if tiny else (64, 768)
    packed = {"batch": batch, "coalitions": 8, "players": 196, "prefix": 1, "width": width}
    shape = f"ViT-B: B {batch}, M 8, P 196, Q 1, D {width}"
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        first = dtype == torch.bfloat16
        found.append(Row("pack_tokens", shape, dtype, packed, ("tokens",), compiled=first))
        found.append(Row("segment_sum", shape, dtype, packed, ("rows",), compiled=first))
        found.append(Row("layer_norm_segment_sum", shape, dtype, packed, ("rows", "weight", "bias"), compiled=first))
        for channels_last in (False, True):
            layout = "channels_last" if channels_last else "contiguous"
            found.append(
                Row(
                    "mask_patches",
                    f"B {batch}, M 8, 3x224x224, P 196, {layout}",
                    dtype,
                    {
                        "batch": batch,
                        "coalitions": 8,
                        "grid": (14, 14),
                        "patch": (16, 16),
                        "channels_last": channels_last,
                    },
                    ("images",),
                    compiled=first and not channels_last,
                )
            )
    return found
