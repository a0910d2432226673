"""Values of patches as values of pixels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import fail

from .._runtime.precision import at_least_float32


def seen_pixels(seen: tuple[float, float], size: Sequence[int]) -> tuple[int, int]:
    """(height, width) of the part of an image of size (H, W), from the top left, that is `seen` (shares)."""
    height, width = (max(1, round(share * side)) for share, side in zip(seen, size, strict=True))
    return height, width


def spread(values: Tensor, images: Tensor, grid: tuple[int, int], seen: tuple[float, float]) -> Tensor:
    """(B, P) values over the pixels and channels of (B, C, H, W) images, keeping the sum of every patch."""
    remedy = "Pass model.preprocess(images)."
    if images.ndim != 4 or images.shape[0] != values.shape[0]:
        fail("Explanation", "images", f"({values.shape[0]}, C, H, W)", images, remedy)
    channels, *size = images.shape[1:]
    height, width = seen_pixels(seen, size)
    if height % grid[0] or width % grid[1]:
        remedy = "Resize the images to the size that was explained."
        fail("Explanation", "images", f"of a size that the grid {grid} divides", images, remedy)
    patch = (height // grid[0], width // grid[1])
    # In half precision a value over so many pixels would vanish.
    maps = (at_least_float32(values) / (channels * patch[0] * patch[1])).unflatten(1, grid)
    pixels = maps.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    pixels = functional.pad(pixels, (0, size[1] - width, 0, size[0] - height))
    return pixels.unsqueeze(1).repeat(1, channels, 1, 1)
