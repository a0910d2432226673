"""Self-attention within each sequence of a packed batch."""

from __future__ import annotations

from torch import Tensor

from .. import _backend, _checks
from ..reference import packed_attention as reference


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
        backend: "reference" or "cpu"; default the best available.

    Returns:
        (T, heads, head_dim). Gradients flow to `qkv`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `cu_seqlens` does not rise from
            0 to T or a sequence is longer than `max_seqlen`.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, forward and backward.
    """
    op = "packed_attention"
    _checks.check_tensor(op, "qkv", qkv, "(T, 3, heads, head_dim)", 4)
    if qkv.shape[1] != 3:
        _checks.fail(op, "qkv", "a floating-point tensor (T, 3, heads, head_dim)", qkv)
    _checks.check_count(op, "max_seqlen", max_seqlen, 0, 2**31 - 1)
    _checks.check_cu_seqlens(op, cu_seqlens, qkv, max_seqlen)
    if scale is None:
        scale = float(qkv.shape[3]) ** -0.5
    _backend.select(op, qkv.device, backend, compiled=False)
    return reference.packed_attention(qkv, cu_seqlens, max_seqlen, float(scale))
