"""Self-attention within each sequence of a packed batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import packed_attention as reference

_KERNELS = ("triton", "cpu")


def packed_attention(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *, scale: float | None = None, backend: str | None = None
) -> Tensor:
    """Softmax attention of each row to the rows of its own sequence.

    out[t, h] = Σ_u softmax_u(scale · q[t, h] · k[u, h]) v[u, h] over the rows u of the sequence of t.

    Args:
        qkv (float16, bfloat16, float32, float64): (T, 3, heads, head_dim) queries, keys and values of packed
            sequences.
        cu_seqlens (int32): (S + 1) first row of each sequence, and T at its end; sequences may be empty.
        max_seqlen: no sequence is longer; an upper bound will do.
        scale: default head_dim^(−1/2).
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        (T, heads, head_dim). Gradients flow to `qkv`; second ones are those of the reference, which keeps
        `max_seqlen`² scores of every sequence and head.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `cu_seqlens` does not rise from
            0 to T or a sequence is longer than `max_seqlen`.
        RuntimeError: if an explicitly chosen backend can't serve the call; and from the compiled backend, for wrong
            numbers in an argument of the right shape.

    Example:
        >>> qkv = torch.randn(7, 3, 2, 8)
        >>> cu_seqlens = torch.tensor([0, 3, 7], dtype=torch.int32)  # sequences of 3 and 4 rows
        >>> fk.packed_attention(qkv, cu_seqlens, max_seqlen=4).shape
        torch.Size([7, 2, 8])
    """
    op = "packed_attention"
    _checks.check_tensor(op, "qkv", qkv, "(T, 3, heads, head_dim)", 4)
    if qkv.shape[1] != 3 or not qkv.shape[2] or not qkv.shape[3]:
        _checks.fail(op, "qkv", "(T, 3, heads, head_dim) with at least one head and one value each", qkv)
    max_seqlen = _checks.check_count(op, "max_seqlen", max_seqlen, 0, 2**31 - 1)
    _checks.check_cu_seqlens(op, cu_seqlens, qkv)
    scale = float(qkv.shape[3]) ** -0.5 if scale is None else _checks.check_number(op, "scale", scale)
    served_by = _backend.select(op, qkv.device, backend, _KERNELS, unsupported=_unsupported(qkv))
    if served_by == "reference":
        _checks.check_boundaries(op, cu_seqlens, int(qkv.shape[0]), max_seqlen)
        return reference.packed_attention(qkv, cu_seqlens, max_seqlen, scale)
    return PackedAttention.apply(qkv, cu_seqlens, max_seqlen, scale, _library.namespace(served_by))[0]


def _unsupported(qkv: Tensor) -> dict[str, str]:
    """What Triton's matrix products and on-chip memory can't do."""
    if qkv.dtype == torch.float64:
        return {"triton": "it has no float64, the dtype of `qkv`"}
    if qkv.shape[3] > 128:
        return {"triton": f"it serves head_dim up to 128, and `qkv` has {int(qkv.shape[3])}"}
    return {}


class PackedAttention(torch.autograd.Function):
    """Autograd face of `fastshap::packed_attention`."""

    @staticmethod
    def forward(
        qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float, namespace: str
    ) -> tuple[Tensor, Tensor]:
        return _library.kernels(namespace).packed_attention(qkv, cu_seqlens, max_seqlen, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        qkv, cu_seqlens, max_seqlen, scale, ctx.namespace = inputs
        ctx.save_for_backward(qkv, cu_seqlens, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.max_seqlen = max_seqlen
        ctx.scale = scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        qkv, cu_seqlens, logsumexp = ctx.saved_tensors
        grad_qkv = _library.kernels(ctx.namespace).packed_attention_backward(
            grad, qkv, cu_seqlens, ctx.max_seqlen, logsumexp, ctx.scale
        )
        return grad_qkv, None, None, None, None


class PackedAttentionBackward:
    """The gradient of the gradient, which is rare: that of the reference, in plain PyTorch."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, qkv, cu_seqlens, ctx.max_seqlen, _, ctx.scale, ctx.namespace = inputs
        ctx.save_for_backward(grad, qkv, cu_seqlens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_out, qkv, cu_seqlens = ctx.saved_tensors

        def attend(qkv: Tensor) -> Tensor:
            return reference.packed_attention(qkv, cu_seqlens, ctx.max_seqlen, ctx.scale)

        def gradient(grad_out: Tensor, qkv: Tensor) -> Tensor:
            return torch.func.vjp(attend, qkv)[1](grad_out)[0]

        of_grad, of_qkv = torch.func.vjp(gradient, grad_out, qkv)[1](grad)
        return of_grad, of_qkv, None, None, None, None, None


@_library.define(
    "packed_attention",
    "(Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, float scale) -> (Tensor out, Tensor logsumexp)",
)
def _fake(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    total, _, heads, head_dim = qkv.shape
    precise = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(total, heads, head_dim), qkv.new_empty(total, heads, dtype=precise)


@_library.define(
    "packed_attention_backward",
    "(Tensor grad, Tensor qkv, Tensor cu_seqlens, SymInt max_seqlen, Tensor logsumexp, float scale) -> Tensor",
)
def _fake_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, logsumexp: Tensor, scale: float
) -> Tensor:
    return torch.empty_like(qkv, memory_format=torch.contiguous_format)


_library.register_autograd("packed_attention", PackedAttention)
_library.register_autograd("packed_attention_backward", PackedAttentionBackward)
