"""Images with the patches of absent players replaced by a baseline."""

from __future__ import annotations

import torch
from torch import Tensor

from .pack_bits import unpack_bits


def mask_patches(images: Tensor, bits: Tensor, baseline: Tensor, grid: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """images (B, C, H, W), bits (B, M, W), baseline (1 or B, C, H, W) → (B·M, C, H, W)."""
    batch, channels, height, width = images.shape
    coalitions = bits.shape[1]
    present = unpack_bits(bits, grid[0] * grid[1]).view(batch, coalitions, 1, grid[0], 1, grid[1], 1)
    present = present.expand(-1, -1, -1, -1, height // grid[0], -1, width // grid[1])
    present = present.reshape(batch, coalitions, 1, height, width)
    masked = torch.where(present, images.unsqueeze(1), baseline.unsqueeze(1)).to(dtype)
    # The size is spelled out because -1 is ambiguous for an empty batch.
    masked = masked.reshape(batch * coalitions, channels, height, width)
    return masked.contiguous(memory_format=memory_format(images))


def memory_format(images: Tensor) -> torch.memory_format:
    """channels_last where the images are, else contiguous."""
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last
