"""One call of every op, made from a seed, sizes, a dtype and a device: for the tests here and for bench/gpu.py."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastshap_kernels as fk

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """Inputs on one device and the call that they go to."""

    tensors: dict[str, Tensor]
    #: Names of the inputs that gradients flow to.
    leaves: tuple[str, ...]
    #: call(backend, **tensors) → the op's output.
    call: Callable[..., Tensor]
    #: plain(**tensors): PyTorch in the inputs' dtype, where the reference computes in a wider one.
    plain: Callable[..., Tensor] | None = None
    #: Whether the gradient is left to PyTorch, and waits for the device.
    plain_gradient: bool = False
    #: Whether intermediate values are rounded to the inputs' dtype.
    rounds_within: bool = False
    device: torch.device = CPU

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)


class Draw:
    """Random inputs on one device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def present(self, batch: int, coalitions: int, players: int) -> Tensor:
        """bool (B, M, P): every coalition with a rate of its own, so that sizes differ widely."""
        rate = torch.rand(batch, coalitions, 1, generator=self.generator, device=self.device)
        return torch.rand(batch, coalitions, players, generator=self.generator, device=self.device) < rate

    def bits(self, batch: int, coalitions: int, players: int) -> Tensor:
        return fk.pack_bits(self.present(batch, coalitions, players))

    def pairs(self, batch: int, coalitions: int, players: int) -> Tensor:
        """bool (B, M, P), complements two by two: the number of rows then depends on nothing but the sizes."""
        present = self.present(batch, coalitions // 2, players)
        return torch.stack([present, ~present], 2).flatten(1, 2)

    def boundaries(self, batch: int, coalitions: int, players: int, prefix: int) -> tuple[Tensor, int]:
        """cu_seqlens of a paired batch, and its rows T."""
        lengths = self.pairs(batch, coalitions, players).sum(2).flatten() + prefix
        return pad(lengths.cumsum(0), (1, 0)).int(), batch * (coalitions // 2) * (players + 2 * prefix)


def sample_coalitions(
    draw: Draw, *, batch: int = 5, coalitions: int = 4, players: int = 196, paired: bool = True
) -> Case:
    def call(backend: str) -> Tensor:
        sizes = batch, coalitions, players
        return fk.sample_coalitions(*sizes, seed=draw.seed, paired=paired, device=draw.device, backend=backend)

    return Case({}, (), call)


def coalition_sizes(draw: Draw, *, batch: int = 5, coalitions: int = 4, players: int = 196) -> Case:
    def call(backend: str, bits: Tensor) -> Tensor:
        return fk.coalition_sizes(bits, players, backend=backend)

    return Case({"bits": draw.bits(batch, coalitions, players)}, (), call)


def mask_patches(
    draw: Draw,
    *,
    batch: int = 3,
    coalitions: int = 5,
    channels: int = 3,
    grid: tuple[int, int] = (4, 3),
    patch: tuple[int, int] = (2, 5),
    channels_last: bool = False,
) -> Case:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    shape = channels, grid[0] * patch[0], grid[1] * patch[1]
    images = draw.normal(batch, *shape).contiguous(memory_format=layout)
    tensors = {
        "images": images,
        "bits": draw.bits(batch, coalitions, grid[0] * grid[1]),
        "baseline": draw.normal(*shape),
    }

    def call(backend: str, images: Tensor, bits: Tensor, baseline: Tensor) -> Tensor:
        return fk.mask_patches(images, bits, grid, baseline, backend=backend)

    return Case(tensors, ("images", "baseline"), call, rounds_within=True)


def pack_tokens(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    tensors = {
        "tokens": draw.normal(batch, prefix + players, width),
        "bits": fk.pack_bits(draw.pairs(batch, coalitions, players)),
    }

    def call(backend: str, tokens: Tensor, bits: Tensor) -> Tensor:
        return fk.pack_tokens(tokens, bits, prefix, paired=True, backend=backend)[0]

    return Case(tensors, ("tokens",), call)


def packed_attention(
    draw: Draw,
    *,
    batch: int = 3,
    coalitions: int = 4,
    players: int = 33,
    prefix: int = 1,
    heads: int = 2,
    head_dim: int = 16,
) -> Case:
    cu_seqlens, total = draw.boundaries(batch, coalitions, players, prefix)
    tensors = {"qkv": draw.normal(total, 3, heads, head_dim), "cu_seqlens": cu_seqlens}

    def call(backend: str, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fk.packed_attention(qkv, cu_seqlens, prefix + players, backend=backend)

    def plain(qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        outputs = []
        for sequence in qkv.split(cu_seqlens.diff().tolist()):
            query, key, value = sequence.permute(1, 2, 0, 3)
            scores = query @ key.transpose(1, 2) * head_dim**-0.5
            outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
        return torch.cat(outputs)

    return Case(tensors, ("qkv",), call, plain, rounds_within=True)


def segment_sum(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    cu_seqlens, total = draw.boundaries(batch, coalitions, players, prefix)

    def call(backend: str, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        return fk.segment_sum(rows, cu_seqlens, prefix, backend=backend)

    return Case({"rows": draw.normal(total, width), "cu_seqlens": cu_seqlens}, ("rows",), call)


def layer_norm_segment_sum(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    cu_seqlens, total = draw.boundaries(batch, coalitions, players, prefix)
    tensors = {
        "rows": draw.normal(total, width),
        "cu_seqlens": cu_seqlens,
        "weight": draw.normal(width),
        "bias": draw.normal(width),
    }

    def call(backend: str, rows: Tensor, cu_seqlens: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return fk.layer_norm_segment_sum(rows, cu_seqlens, weight, bias, prefix, backend=backend)

    return Case(tensors, ("rows", "weight", "bias"), call)


def coalition_sum(draw: Draw, *, batch: int = 3, coalitions: int = 5, players: int = 33, width: int = 48) -> Case:
    tensors = {"features": draw.normal(batch, players, width), "bits": draw.bits(batch, coalitions, players)}

    def call(backend: str, features: Tensor, bits: Tensor) -> Tensor:
        return fk.coalition_sum(features, bits, backend=backend)

    return Case(tensors, ("features",), call)


def shapley_regression_loss(
    draw: Draw,
    *,
    batch: int = 3,
    coalitions: int = 5,
    players: int = 33,
    classes: int = 48,
    reduction: str = "none",
) -> Case:
    tensors = {
        "phi": draw.normal(batch, players, classes),
        "bits": draw.bits(batch, coalitions, players),
        "values": draw.normal(batch, coalitions, classes),
    }

    def call(backend: str, phi: Tensor, bits: Tensor, values: Tensor) -> Tensor:
        return fk.shapley_regression_loss(phi, bits, values, reduction=reduction, backend=backend)

    return Case(tensors, ("phi", "values"), call)


def linear_shapley_loss(
    draw: Draw,
    *,
    batch: int = 3,
    coalitions: int = 5,
    players: int = 33,
    width: int = 48,
    classes: int = 24,
    reduction: str = "none",
) -> Case:
    tensors = {
        "features": draw.normal(batch, players, width),
        "weight": draw.normal(classes, width) * width**-0.5,
        "bias": draw.normal(classes),
        "bits": draw.bits(batch, coalitions, players),
        "values": draw.normal(batch, coalitions, classes),
    }

    def call(backend: str, features: Tensor, weight: Tensor, bias: Tensor, bits: Tensor, values: Tensor) -> Tensor:
        return fk.linear_shapley_loss(features, weight, bias, bits, values, reduction=reduction, backend=backend)

    return Case(tensors, ("features", "weight", "bias", "values"), call, rounds_within=True)


def exact_shapley(draw: Draw, *, batch: int = 2, players: int = 7, classes: int = 24) -> Case:
    def call(backend: str, values: Tensor) -> Tensor:
        return fk.exact_shapley(values, backend=backend)

    return Case({"values": draw.normal(batch, 2**players, classes)}, ("values",), call, plain_gradient=True)


MAKERS: dict[str, Callable[..., Case]] = {
    maker.__name__: maker
    for maker in (
        sample_coalitions,
        coalition_sizes,
        mask_patches,
        pack_tokens,
        packed_attention,
        segment_sum,
        layer_norm_segment_sum,
        coalition_sum,
        shapley_regression_loss,
        linear_shapley_loss,
        exact_shapley,
    )
}

_PACKED = {"batch": (1, 3), "coalitions": (2, 6), "players": (5, 33, 64, 196), "prefix": (0, 1, 5)}
_POOLED = {"batch": (1, 3), "coalitions": (1, 2, 8, 33), "players": (2, 33, 64, 196)}
#: Many losses: one of them may be right by luck.
_LOSSES = {"batch": (3, 5), "coalitions": (5, 8, 33), "players": (2, 33, 64, 196)}
#: Sizes that `sizes` chooses from: whole vectors and odd ends, one word of bits and several.
SIZES: dict[str, dict[str, tuple[Any, ...]]] = {
    "sample_coalitions": {
        "batch": (1, 9),
        "coalitions": (1, 4, 7),
        "players": (2, 33, 196, 1025),
        "paired": (False, True),
    },
    "coalition_sizes": {"batch": (1, 9), "coalitions": (1, 4, 130), "players": (2, 33, 64, 128, 196, 1025, 4096)},
    "mask_patches": {
        "batch": (1, 3),
        "coalitions": (1, 5, 33),
        "channels": (1, 3),
        "grid": ((4, 3), (7, 7), (14, 14)),
        "patch": ((2, 5), (16, 16), (3, 1)),
        "channels_last": (False, True),
    },
    "pack_tokens": _PACKED | {"width": (3, 48, 384, 1152)},
    "packed_attention": _PACKED | {"heads": (1, 3), "head_dim": (16, 24, 64, 128)},
    "segment_sum": _PACKED | {"width": (3, 48, 384, 1152)},
    "layer_norm_segment_sum": _PACKED | {"width": (48, 384, 1152)},
    "coalition_sum": _POOLED | {"width": (3, 48, 384, 1000)},
    "shapley_regression_loss": _LOSSES | {"classes": (3, 48, 1000)},
    "linear_shapley_loss": _LOSSES | {"width": (16, 67, 384), "classes": (3, 48, 1000)},
    "exact_shapley": {"batch": (1, 3), "players": (1, 4, 10, 12), "classes": (1, 10, 67)},
}


def make(op: str, seed: int, dtype: torch.dtype, device: torch.device | str, **sizes: Any) -> Case:
    """A case of an op; sizes that are not given are small."""
    return replace(MAKERS[op](Draw(seed, dtype, device), **sizes), device=torch.device(device))


def sizes(op: str, seed: int) -> dict[str, Any]:
    """Sizes drawn at random."""
    chooser = random.Random(f"{op} {seed}")
    return {name: chooser.choice(choices) for name, choices in SIZES[op].items()}


def backends(op: str, *devices: str) -> list[str]:
    """The backends that an op has besides the reference; those of its kernels where it has none of its own."""
    module = import_module(f"fastshap_kernels.ops.{op}")
    listed = getattr(module, "_KERNELS", None) or import_module("fastshap_kernels.ops.coalition_sum")._KERNELS
    return [name for name in listed if name in devices]
