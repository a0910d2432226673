"""Sums of the normalised rows of each sequence: a transformer's last norm and average pooling in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import layer_norm_segment_sum as reference

_KERNELS = ("cuda", "triton")

#: Values of a row that the CUDA kernels hold in the registers of a warp.
_CUDA_WIDTH = 2048
_CUDA_WIDTH_FLOAT64 = 512


def layer_norm_segment_sum(
    rows: Tensor,
    cu_seqlens: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    prefix: int = 0,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """Sums each sequence's rows after layer normalisation, its first `prefix` rows left out.

    out[s] = Σ_t LayerNorm(rows[t]) over cu_seqlens[s] + prefix ≤ t < cu_seqlens[s + 1]; 0 where no row is left. The
    normalised rows are never stored.

    Args:
        rows (float16, bfloat16, float32, float64): (T, D) packed sequences.
        cu_seqlens (int32): (S + 1) first row of each sequence, and T at its end.
        weight (floating): (D) scale of the normalised values; None for 1.
        bias (floating): (D) added to each normalised row; None for 0.
        prefix: Q ≥ 0, rows at the start of each sequence that are left out.
        eps: added to the variance of a row, ≥ 0.
        backend: "reference", "triton" or "cuda"; default the best available. "cuda" takes widths of whole 16 bytes
            up to 2048 values (512 in float64).

    Returns:
        (S, D) in the dtype of `rows`, normalised and summed in float32 (float64 for float64). Gradients flow to
        `rows`, `weight` and `bias`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `cu_seqlens` does not rise from
            0 to T.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Example:
        >>> rows = torch.tensor([[5.0, 5.0], [-1.0, 1.0], [-2.0, 2.0]])
        >>> cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)  # one sequence
        >>> sums = fk.layer_norm_segment_sum(rows, cu_seqlens, prefix=1)
        >>> torch.allclose(sums, torch.tensor([[-2.0, 2.0]]))
        True
    """
    op = "layer_norm_segment_sum"
    _checks.check_tensor(op, "rows", rows, "(T, D)", 2)
    _checks.check_cu_seqlens(op, cu_seqlens, rows)
    precise = torch.promote_types(rows.dtype, torch.float32)
    weight, bias = _check_affine("weight", weight, rows, precise), _check_affine("bias", bias, rows, precise)
    prefix = _checks.check_count(op, "prefix", prefix, 0, 2**31 - 1)
    eps = _checks.check_number(op, "eps", eps, 0)
    served_by = _backend.select(op, rows.device, backend, _KERNELS, unsupported=_unsupported(rows))
    if served_by == "reference":
        _checks.check_boundaries(op, cu_seqlens, int(rows.shape[0]))
        return reference.layer_norm_segment_sum(rows, cu_seqlens, weight, bias, prefix, eps)
    namespace = _library.namespace(served_by)
    return LayerNormSegmentSum.apply(rows, cu_seqlens, weight, bias, prefix, eps, namespace)[0]


def _check_affine(argument: str, value: Tensor | None, rows: Tensor, dtype: torch.dtype) -> Tensor | None:
    """In the dtype that sums run in: kernels read no other."""
    op = "layer_norm_segment_sum"
    if value is None:
        return None
    _checks.check_tensor(op, argument, value, "(D,)", 1)
    if value.shape[0] != rows.shape[1]:
        _checks.fail(op, argument, f"({int(rows.shape[1])},), one value for each column of `rows`,", value)
    _checks.check_device(op, argument, value, rows)
    return value.to(dtype)


def _unsupported(rows: Tensor) -> dict[str, str]:
    most = _CUDA_WIDTH_FLOAT64 if rows.dtype == torch.float64 else _CUDA_WIDTH
    if rows.shape[1] <= most and rows.shape[1] * rows.element_size() % 16 == 0:
        return {}
    return {"cuda": f"it takes widths of whole 16 bytes up to {most} values, and `rows` is {_checks.describe(rows)}"}


class LayerNormSegmentSum(torch.autograd.Function):
    """Autograd face of `fastshap::layer_norm_segment_sum`."""

    @staticmethod
    def forward(
        rows: Tensor,
        cu_seqlens: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        prefix: int,
        eps: float,
        namespace: str,
    ) -> tuple[Tensor, Tensor]:
        kernels = _library.kernels(namespace)
        return kernels.layer_norm_segment_sum(rows, cu_seqlens, weight, bias, prefix, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rows, cu_seqlens, weight, _, ctx.prefix, ctx.eps, ctx.namespace = inputs
        ctx.save_for_backward(rows, cu_seqlens, weight, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_normalized: Tensor | None) -> tuple[Tensor | None, ...]:
        rows, cu_seqlens, weight, normalized = ctx.saved_tensors
        backward = _library.kernels(ctx.namespace).layer_norm_segment_sum_backward
        grad_rows = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0] and grad is not None:
            grad_rows = backward(grad, rows, cu_seqlens, weight, ctx.prefix, ctx.eps)
        if ctx.needs_input_grad[0] and grad_normalized is not None:  # of a second derivative, by way of the weight's
            more = backward(grad_normalized.to(rows.dtype), rows, cu_seqlens, None, ctx.prefix, ctx.eps)
            grad_rows = more if grad_rows is None else grad_rows + more
        if ctx.needs_input_grad[2] and grad is not None:
            grad_weight = (grad.to(normalized.dtype) * normalized).sum(0)
        if ctx.needs_input_grad[3] and grad is not None:
            counts = (cu_seqlens.diff() - ctx.prefix).clamp_min(0).to(normalized.dtype)
            grad_bias = (grad.to(normalized.dtype) * counts.unsqueeze(1)).sum(0)
        return grad_rows, None, grad_weight, grad_bias, None, None, None


class LayerNormSegmentSumBackward:
    """The gradient of the gradient, which is rare: that of the reference, in plain PyTorch."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, rows, cu_seqlens, weight, ctx.prefix, ctx.eps, ctx.namespace = inputs
        ctx.save_for_backward(grad, rows, cu_seqlens, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, rows, cu_seqlens, weight = ctx.saved_tensors

        def gradient(grad_out: Tensor, rows: Tensor, weight: Tensor | None = None) -> Tensor:
            def sums(rows: Tensor) -> Tensor:
                return reference.layer_norm_segment_sum(rows, cu_seqlens, weight, None, ctx.prefix, ctx.eps)

            return torch.func.vjp(sums, rows)[1](grad_out)[0]

        given = (grad_out, rows) if weight is None else (grad_out, rows, weight)
        of_grad, of_rows, *of_weight = torch.func.vjp(gradient, *given)[1](grad)
        return of_grad, of_rows, None, of_weight[0] if of_weight else None, None, None, None


@_library.define(
    "layer_norm_segment_sum",
    "(Tensor rows, Tensor cu_seqlens, Tensor? weight, Tensor? bias, int prefix, float eps)"
    " -> (Tensor out, Tensor normalized)",
)
def _fake(
    rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, prefix: int, eps: float
) -> tuple[Tensor, Tensor]:
    out = rows.new_empty(cu_seqlens.shape[0] - 1, rows.shape[1])
    return out, torch.empty_like(out, dtype=torch.promote_types(rows.dtype, torch.float32))


@_library.define(
    "layer_norm_segment_sum_backward",
    "(Tensor grad, Tensor rows, Tensor cu_seqlens, Tensor? weight, int prefix, float eps) -> Tensor",
)
def _fake_backward(
    grad: Tensor, rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None, prefix: int, eps: float
) -> Tensor:
    return rows.new_empty(rows.shape)


_library.register_autograd("layer_norm_segment_sum", LayerNormSegmentSum)
_library.register_autograd("layer_norm_segment_sum_backward", LayerNormSegmentSumBackward)
