"""The sum of each sequence's rows, its prefix left out."""

from __future__ import annotations

import torch
from torch import Tensor


def sequence_and_position(cu_seqlens: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """For each of `total` rows, the sequence that it is in and its place there, both (T,)."""
    row = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    return sequence, row - cu_seqlens[sequence]


def segment_sum(rows: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    """rows (T, D), cu_seqlens (S + 1) → (S, D)."""
    sequences = cu_seqlens.shape[0] - 1
    sequence, position = sequence_and_position(cu_seqlens, rows.shape[0])
    # Prefix rows go to one sum more, which is dropped.
    target = torch.where(position < prefix, sequences, sequence)
    precise = rows.to(torch.promote_types(rows.dtype, torch.float32))
    sums = precise.new_zeros(sequences + 1, rows.shape[1])
    return sums.index_put((target,), precise, accumulate=True)[:sequences].to(rows.dtype)
