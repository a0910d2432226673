"""Sum of the features of the present players, for every coalition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import coalition_sum as reference

_KERNELS = ("cuda", "triton", "cpu")
#: Up to so many coalitions the CUDA kernel comes first. It makes about 1.2 instructions a coalition and value: for 8
#: coalitions an H100 has the instructions for 2.7e12 values a second, and its memory gives 1.5e12 in bfloat16. Beyond,
#: Triton's kernel on the matrix units wins. This is what the arithmetic predicts, not a measurement.
_FEW_COALITIONS = 8


def coalition_sum(features: Tensor, bits: Tensor, *, backend: str | None = None) -> Tensor:
    """Sums the features of the present players, for every coalition.

    out[b, m] = Σ_{p ∈ S(b, m)} features[b, p], summed in float32 (float64 for float64).

    Args:
        features (float16, bfloat16, float32, float64): (B, P, L); 1 ≤ P ≤ 4096. An absent player's
            numbers never matter, NaN included; a sum that a NaN or an infinity is part of is not finite.
        bits (int32): (B, M, ceil(P / 32)) coalitions of the P players.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        (B, M, L) in the dtype of `features`; the empty coalition's sum is 0. Gradients flow to `features`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Example:
        >>> features = torch.tensor([[[1.0], [2.0], [4.0]]])  # one image, three players, L = 1
        >>> bits = fk.pack_bits(torch.tensor([[[True, False, True], [False, True, False]]]))
        >>> fk.coalition_sum(features, bits).tolist()
        [[[5.0], [2.0]]]
    """
    op = "coalition_sum"
    check_features(op, "features", features, "(B, P, L)")
    _checks.check_bits(op, bits, features.shape[1], features)
    return select_pool(op, features, bits, backend)(features, bits, features.dtype)


def check_features(op: str, argument: str, features: object, shape: str) -> None:
    """(B, P, …) of a dtype that can be pooled, with 1 ≤ P ≤ 4096."""
    tensor = _checks.check_tensor(op, argument, features, shape, 3)
    _checks.check_count(op, f"{argument}.shape[1]", int(tensor.shape[1]), 1, _checks.MAX_PLAYERS)


def select_backend(op: str, features: Tensor, bits: Tensor, backend: str | None) -> str:
    """The backend that adds up `features` by coalition, for `op`."""
    matrix_units = bits.shape[1] > _FEW_COALITIONS and features.dtype != torch.float64
    kernels = ("triton", "cuda", "cpu") if matrix_units else _KERNELS
    return _backend.select(op, features.device, backend, kernels)


def select_pool(op: str, features: Tensor, bits: Tensor, backend: str | None) -> reference.Pool:
    """The coalition_sum that serves `op`; sums in the dtype of the features, in float32 or in float64."""
    served_by = select_backend(op, features, bits, backend)
    return reference.coalition_sum if served_by == "reference" else pool_with(_library.namespace(served_by))


def pool_with(namespace: str) -> reference.Pool:
    """The coalition_sum of a namespace's kernels."""

    def pool(features: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
        # The kernels widen half precision only.
        return CoalitionSum.apply(features.to(dtype) if dtype == torch.float64 else features, bits, dtype, namespace)

    return pool


class CoalitionSum(torch.autograd.Function):
    """Autograd face of `fastshap::coalition_sum`."""

    @staticmethod
    def forward(features: Tensor, bits: Tensor, dtype: torch.dtype, namespace: str) -> Tensor:
        return _library.kernels(namespace).coalition_sum(features, bits, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        features, bits, _, ctx.namespace = inputs
        ctx.save_for_backward(bits)
        ctx.players = features.shape[1]
        ctx.dtype = features.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        return kernels.coalition_sum_backward(grad, bits, ctx.players, ctx.dtype), None, None, None


class CoalitionSumBackward:
    """The backward pass is linear too: its own gradient is a coalition_sum."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, bits, _, _, ctx.namespace = inputs
        ctx.save_for_backward(bits)
        ctx.dtype = grad.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        return _library.kernels(ctx.namespace).coalition_sum(grad, bits, ctx.dtype), None, None, None, None


@_library.define(
    "coalition_sum",
    "(Tensor features, Tensor bits, ScalarType dtype) -> Tensor",
)
def _fake(features: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    return features.new_empty((features.shape[0], bits.shape[1], features.shape[2]), dtype=dtype)


@_library.define(
    "coalition_sum_backward",
    "(Tensor grad, Tensor bits, int players, ScalarType dtype) -> Tensor",
)
def _fake_backward(grad: Tensor, bits: Tensor, players: int, dtype: torch.dtype) -> Tensor:
    return grad.new_empty((grad.shape[0], players, grad.shape[2]), dtype=dtype)


_library.register_autograd("coalition_sum", CoalitionSum)
_library.register_autograd("coalition_sum_backward", CoalitionSumBackward)
