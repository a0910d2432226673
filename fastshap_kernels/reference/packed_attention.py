"""Softmax attention within each sequence of a packed batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .segment_sum import sequence_and_position


def packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> Tensor:
    """qkv (T, 3, heads, head_dim), cu_seqlens (S + 1) → (T, heads, head_dim)."""
    total, _, heads, head_dim = qkv.shape
    sequences = cu_seqlens.shape[0] - 1
    sequence, position = sequence_and_position(cu_seqlens, total)
    slot = sequence * max_seqlen + position
    precise = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    padded = precise.new_zeros(sequences * max_seqlen, 3, heads, head_dim).index_copy(0, slot, precise)
    padded = padded.view(sequences, max_seqlen, 3, heads, head_dim)
    query, key, value = padded.permute(2, 0, 3, 1, 4)  # each (S, heads, max_seqlen, head_dim)
    padding = torch.arange(max_seqlen, device=qkv.device) >= cu_seqlens.diff().unsqueeze(1)
    scores = query @ key.transpose(-2, -1) * scale
    # Not -inf: a sequence of no rows is all padding, and NaN there would reach the gradient.
    scores = scores.masked_fill(padding.view(sequences, 1, 1, max_seqlen), torch.finfo(scores.dtype).min)
    out = (scores.softmax(-1) @ value).transpose(1, 2).reshape(sequences * max_seqlen, heads, head_dim)
    return out[slot].to(qkv.dtype)
