"""Sums of the rows of each sequence of a packed batch."""

from __future__ import annotations

from torch import Tensor

from .. import _backend, _checks
from ..reference import segment_sum as reference


def segment_sum(rows: Tensor, cu_seqlens: Tensor, prefix: int = 0, *, backend: str | None = None) -> Tensor:
    """Sums each sequence's rows, its first `prefix` rows left out.

    out[s] = Σ_t rows[t] over cu_seqlens[s] + prefix ≤ t < cu_seqlens[s + 1]; 0 where no row is left.

    Args:
        rows (float16, bfloat16, float32, float64): (T, D) packed sequences.
        cu_seqlens (int32): (S + 1) first row of each sequence, and T at its end.
        prefix: Q ≥ 0, rows at the start of each sequence that are left out.
        backend: "reference" or "cpu"; default the best available.

    Returns:
        (S, D) in the dtype of `rows`, summed in float32 (float64 for float64). Gradients flow to `rows`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `cu_seqlens` does not rise from
            0 to T.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, forward and backward.
    """
    op = "segment_sum"
    _checks.check_tensor(op, "rows", rows, "(T, D)", 2)
    _checks.check_count(op, "prefix", prefix, 0, 2**31 - 1)
    _checks.check_cu_seqlens(op, cu_seqlens, rows)
    _backend.select(op, rows.device, backend, compiled=False)
    return reference.segment_sum(rows, cu_seqlens, prefix)
