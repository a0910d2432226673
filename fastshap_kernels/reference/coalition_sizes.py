"""The number of players of every coalition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pack_bits import unpack_bits

#: How |S| is counted: (bits (..., W), players) → int32 (...).
Count = Callable[[Tensor, int], Tensor]


def coalition_sizes(bits: Tensor, players: int) -> Tensor:
    """int32 (..., W) → int32 (...)."""
    return unpack_bits(bits, players).sum(-1, dtype=torch.int32)
