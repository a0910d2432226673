"""Sums of the rows of each sequence of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import segment_sum as reference

_KERNELS = ("cuda", "triton", "cpu")


def segment_sum(rows: Tensor, cu_seqlens: Tensor, prefix: int = 0, *, backend: str | None = None) -> Tensor:
    """Sums each sequence's rows, its first `prefix` rows left out.

    out[s] = Σ_t rows[t] over cu_seqlens[s] + prefix ≤ t < cu_seqlens[s + 1]; 0 where no row is left.

    Args:
        rows (float16, bfloat16, float32, float64): (T, D) packed sequences.
        cu_seqlens (int32): (S + 1) first row of each sequence, and T at its end.
        prefix: Q ≥ 0, rows at the start of each sequence that are left out.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        (S, D) in the dtype of `rows`, summed in float32 (float64 for float64). Gradients flow to `rows`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `cu_seqlens` does not rise from
            0 to T.
        RuntimeError: if an explicitly chosen backend can't serve the call; and from the compiled backend, for wrong
            numbers in an argument of the right shape.

    Example:
        >>> rows = torch.tensor([[9.0], [1.0], [2.0], [9.0], [4.0]])
        >>> cu_seqlens = torch.tensor([0, 3, 5], dtype=torch.int32)  # sequences of 3 and 2 rows
        >>> fk.segment_sum(rows, cu_seqlens, prefix=1).tolist()
        [[3.0], [4.0]]
    """
    op = "segment_sum"
    _checks.check_tensor(op, "rows", rows, "(T, D)", 2)
    prefix = _checks.check_count(op, "prefix", prefix, 0, 2**31 - 1)
    _checks.check_cu_seqlens(op, cu_seqlens, rows)
    served_by = _backend.select(op, rows.device, backend, _KERNELS)
    if served_by == "reference":
        _checks.check_boundaries(op, cu_seqlens, int(rows.shape[0]))
        return reference.segment_sum(rows, cu_seqlens, prefix)
    return SegmentSum.apply(rows, cu_seqlens, prefix, _library.namespace(served_by))


class SegmentSum(torch.autograd.Function):
    """Autograd face of `fastshap::segment_sum`."""

    @staticmethod
    def forward(rows: Tensor, cu_seqlens: Tensor, prefix: int, namespace: str) -> Tensor:
        return _library.kernels(namespace).segment_sum(rows, cu_seqlens, prefix)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rows, cu_seqlens, prefix, ctx.namespace = inputs
        ctx.save_for_backward(cu_seqlens)
        ctx.prefix = prefix
        ctx.total = rows.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        return kernels.segment_sum_backward(grad, cu_seqlens, ctx.prefix, ctx.total), None, None, None


class SegmentSumBackward:
    """The backward pass is linear too: its own gradient is a segment_sum."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, cu_seqlens, ctx.prefix, _, ctx.namespace = inputs
        ctx.save_for_backward(cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (cu_seqlens,) = ctx.saved_tensors
        return _library.kernels(ctx.namespace).segment_sum(grad, cu_seqlens, ctx.prefix), None, None, None, None


@_library.define(
    "segment_sum",
    "(Tensor rows, Tensor cu_seqlens, int prefix) -> Tensor",
)
def _fake(rows: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    return rows.new_empty(cu_seqlens.shape[0] - 1, rows.shape[1])


@_library.define(
    "segment_sum_backward",
    "(Tensor grad, Tensor cu_seqlens, int prefix, SymInt total) -> Tensor",
)
def _fake_backward(grad: Tensor, cu_seqlens: Tensor, prefix: int, total: int) -> Tensor:
    return grad.new_empty(total, grad.shape[1])


_library.register_autograd("segment_sum", SegmentSum)
_library.register_autograd("segment_sum_backward", SegmentSumBackward)
