"""The last step from pixels to a model's input."""

from __future__ import annotations

import torch
from torch import Tensor


class Normalised:
    """uint8 (C, H, W) as normalised floats: what torchvision's ToTensor and Normalize make, to the bit, in one pass.

    Args:
        mean, std: per channel, for pixels in [0, 1].
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: Tensor) -> Tensor:
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        return images.div_(255).sub_(self.mean).div_(self.std)

    def __repr__(self) -> str:
        mean, std = (values.flatten().tolist() for values in (self.mean, self.std))
        return f"Normalised(mean={mean}, std={std})"
