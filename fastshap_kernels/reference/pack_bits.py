"""Coalitions as bits: player p is bit p % 32 of word p // 32."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(present: Tensor) -> Tensor:
    """bool (..., P) → int32 (..., ceil(P / 32)); the unused high bits of the last word are 0."""
    players = present.shape[-1]
    padded = torch.nn.functional.pad(present, (0, -players % 32)).unflatten(-1, (-1, 32))
    weights = torch.ones((), dtype=torch.int64, device=present.device) << torch.arange(32, device=present.device)
    # The sum fills 32 bits unsigned; converting to int32 keeps the bit pattern.
    return (padded * weights).sum(-1).to(torch.int32)


def unpack_bits(bits: Tensor, players: int) -> Tensor:
    """int32 (..., W) → bool (..., P)."""
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    return ((bits.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., :players].bool()
