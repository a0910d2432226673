"""One call of every op, made from a seed, sizes, a dtype and a device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import fastshap_kernels as fk

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """An op's arguments on one device.

    Args:
        op: name of the op in `fastshap_kernels`.
        tensors: its arguments that are tensors, by name.
        leaves: names of those that gradients flow to.
        options: its other arguments, by name, without `backend`.
        plain: the same in plain PyTorch in the inputs' dtype, a function of the op's arguments; default the op's
            reference, where that does not compute in a wider one.
        plain_gradient: whether the gradient is left to PyTorch, and waits for the device.
        rounds_within: whether intermediate values are rounded to the inputs' dtype.
        device: where the tensors are.
    """

    op: str
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    plain: Callable[..., Tensor] | None = None
    plain_gradient: bool = False
    rounds_within: bool = False
    device: torch.device = CPU

    def call(self, backend: str | Callable[..., Any], *inputs: Tensor, **named: Tensor) -> Tensor:
        """The op's output.

        Args:
            backend: a backend of the op, or any function of the op's arguments.
            inputs: tensors in place of the first of the case's own, in their order.
            named: the same by name; every tensor must be given, one way or the other.
        """
        arguments = dict(zip(self.tensors, inputs, strict=False)) | named | self.options
        out = backend(**arguments) if callable(backend) else getattr(fk, self.op)(**arguments, backend=backend)
        # What pack_tokens returns beside its rows has no values to compare.
        return out[0] if isinstance(out, tuple) else out

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another dtype."""
        tensors = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.tensors.items()}
        return replace(self, tensors=tensors)


class Draw:
    """Random inputs on one device, in one dtype; the same for the same seed and kind of device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device | str) -> None:
        self.seed, self.dtype, self.device = seed, dtype, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def present(self, batch: int, coalitions: int, players: int) -> Tensor:
        """bool (B, M, P): every coalition with a rate of its own, so that sizes differ widely."""
        rate = torch.rand(batch, coalitions, 1, generator=self.generator, device=self.device)
        return torch.rand(batch, coalitions, players, generator=self.generator, device=self.device) < rate

    def bits(self, batch: int, coalitions: int, players: int) -> Tensor:
        """int32 (B, M, ⌈P/32⌉)."""
        return fk.pack_bits(self.present(batch, coalitions, players))

    def pairs(self, batch: int, coalitions: int, players: int) -> Tensor:
        """bool (B, M, P), complements two by two: the number of rows then depends on nothing but the sizes."""
        present = self.present(batch, coalitions // 2, players)
        return torch.stack([present, ~present], 2).flatten(1, 2)

    def boundaries(self, batch: int, coalitions: int, players: int, prefix: int) -> tuple[Tensor, int]:
        """cu_seqlens of a paired batch, and its rows T."""
        lengths = self.pairs(batch, coalitions, players).sum(2).flatten() + prefix
        return pad(lengths.cumsum(0), (1, 0)).int(), batch * (coalitions // 2) * (players + 2 * prefix)


def _sample_coalitions(
    draw: Draw, *, batch: int = 5, coalitions: int = 4, players: int = 196, paired: bool = True
) -> Case:
    options = {"batch": batch, "coalitions": coalitions, "players": players, "seed": draw.seed, "paired": paired}
    return Case("sample_coalitions", {}, options=options | {"device": draw.device})


def _coalition_sizes(draw: Draw, *, batch: int = 5, coalitions: int = 4, players: int = 196) -> Case:
    return Case("coalition_sizes", {"bits": draw.bits(batch, coalitions, players)}, (), {"players": players})


def _mask_patches(
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
    tensors = {
        "images": draw.normal(batch, *shape).contiguous(memory_format=layout),
        "bits": draw.bits(batch, coalitions, grid[0] * grid[1]),
        "baseline": draw.normal(*shape),
    }
    return Case("mask_patches", tensors, ("images", "baseline"), {"grid": grid}, rounds_within=True)


def _pack_tokens(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    tensors = {
        "tokens": draw.normal(batch, prefix + players, width),
        "bits": fk.pack_bits(draw.pairs(batch, coalitions, players)),
    }
    return Case("pack_tokens", tensors, ("tokens",), {"prefix": prefix, "paired": True})


def _packed_attention(
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
    options = {"max_seqlen": prefix + players}
    return Case("packed_attention", tensors, ("qkv",), options, _plain_attention, rounds_within=True)


def _plain_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    outputs = []
    for sequence in qkv.split(cu_seqlens.diff().tolist()):
        query, key, value = sequence.permute(1, 2, 0, 3)
        scores = query @ key.transpose(1, 2) * qkv.shape[-1] ** -0.5
        outputs.append((scores.softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs)


def _segment_sum(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    cu_seqlens, total = draw.boundaries(batch, coalitions, players, prefix)
    tensors = {"rows": draw.normal(total, width), "cu_seqlens": cu_seqlens}
    return Case("segment_sum", tensors, ("rows",), {"prefix": prefix})


def _layer_norm_segment_sum(
    draw: Draw, *, batch: int = 3, coalitions: int = 4, players: int = 33, prefix: int = 1, width: int = 48
) -> Case:
    cu_seqlens, total = draw.boundaries(batch, coalitions, players, prefix)
    tensors = {
        "rows": draw.normal(total, width),
        "cu_seqlens": cu_seqlens,
        "weight": draw.normal(width),
        "bias": draw.normal(width),
    }
    return Case("layer_norm_segment_sum", tensors, ("rows", "weight", "bias"), {"prefix": prefix})


def _coalition_sum(draw: Draw, *, batch: int = 3, coalitions: int = 5, players: int = 33, width: int = 48) -> Case:
    tensors = {"features": draw.normal(batch, players, width), "bits": draw.bits(batch, coalitions, players)}
    return Case("coalition_sum", tensors, ("features",))


def _shapley_regression_loss(
    draw: Draw,
    *,
    batch: int = 3,
    coalitions: int = 5,
    players: int = 33,
    classes: int = 48,
    normalization: str = "none",
    reduction: str = "none",
) -> Case:
    tensors = {
        "phi": draw.normal(batch, players, classes),
        "bits": draw.bits(batch, coalitions, players),
        "values": draw.normal(batch, coalitions, classes),
    }
    if normalization != "none":
        tensors["grand"] = draw.normal(batch, classes)
    options = {"normalization": normalization, "reduction": reduction}
    return Case("shapley_regression_loss", tensors, ("phi", "values"), options)


def _linear_shapley_loss(
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
    leaves = "features", "weight", "bias", "values"
    return Case("linear_shapley_loss", tensors, leaves, {"reduction": reduction}, rounds_within=True)


def _exact_shapley(draw: Draw, *, batch: int = 2, players: int = 7, classes: int = 24) -> Case:
    tensors = {"values": draw.normal(batch, 2**players, classes)}
    return Case("exact_shapley", tensors, ("values",), plain_gradient=True)


_MAKERS: dict[str, Callable[..., Case]] = {
    maker.__name__.removeprefix("_"): maker
    for maker in (
        _sample_coalitions,
        _coalition_sizes,
        _mask_patches,
        _pack_tokens,
        _packed_attention,
        _segment_sum,
        _layer_norm_segment_sum,
        _coalition_sum,
        _shapley_regression_loss,
        _linear_shapley_loss,
        _exact_shapley,
    )
}
#: Every op that has kernels.
OPS = tuple(_MAKERS)

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
    """A case of an op.

    Args:
        op: one of `OPS`.
        seed: what its inputs are drawn from.
        dtype: of its floating-point inputs.
        device: of all its inputs.
        sizes: by the names in `SIZES[op]`; those that are not given are small.
    """
    return replace(_MAKERS[op](Draw(seed, dtype, device), **sizes), device=torch.device(device))


def sizes(op: str, seed: int) -> dict[str, Any]:
    """Sizes of an op drawn at random from `SIZES`, for `make`."""
    chooser = random.Random(f"{op} {seed}")
    return {name: chooser.choice(choices) for name, choices in SIZES[op].items()}


def backends(op: str, *devices: str) -> list[str]:
    """The backends that an op has besides the reference, of those named, the first choice first."""
    module = import_module(f"fastshap_kernels.ops.{op}")
    return [name for name in module._KERNELS if name in devices]
