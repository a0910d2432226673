"""The tokens of every coalition, one sequence after another, with absent players left out."""

from __future__ import annotations

import torch
from torch import Tensor

from .pack_bits import unpack_bits


def pack_tokens(tokens: Tensor, bits: Tensor, prefix: int, total: int | None) -> tuple[Tensor, Tensor]:
    """tokens (B, Q + P, D), bits (B, M, W) → rows (T, D), cu_seqlens (B·M + 1); T is `total`, or counted if None."""
    batch, length = tokens.shape[:2]
    present = unpack_bits(bits, length - prefix)
    kept = torch.nn.functional.pad(present, (prefix, 0), value=True)
    cu_seqlens = torch.nn.functional.pad(kept.sum(2).flatten().cumsum(0), (1, 0)).to(torch.int32)
    # Each kept token's row in tokens.flatten(0, 1), in the order (b, m, token).
    of_image = torch.arange(batch * length, device=tokens.device).view(batch, 1, length).expand_as(kept)
    if total is None:
        source = of_image[kept]
    else:
        # A fixed size, so that nothing waits for the device.
        source = of_image.flatten()[torch.nonzero_static(kept.flatten(), size=total, fill_value=0).squeeze(1)]
    return tokens.flatten(0, 1)[source], cu_seqlens
