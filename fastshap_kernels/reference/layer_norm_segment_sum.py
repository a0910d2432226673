"""The sum of each sequence's normalised rows, its prefix left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import segment_sum


def layer_norm_segment_sum(
    rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, prefix: int, eps: float
) -> Tensor:
    """rows (T, D), cu_seqlens (S + 1), weight (D) and bias (D) → (S, D)."""
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    normalized = torch.nn.functional.layer_norm(precise, rows.shape[1:], weight, bias, eps)
    return segment_sum(normalized, cu_seqlens, prefix).to(rows.dtype)
