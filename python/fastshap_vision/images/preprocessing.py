"""How pictures become a model's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform
from torch import Tensor

from fastshap_kernels._checks import check_count, fail

from .decode import read_image

LARGEST_SIZE = 16384  # pixels a side: what is more is a mistake, and would take all memory


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: JSON-able, so that a checkpoint can keep it.

    Args:
        input_size: (C, H, W) of the model's input; C is 1 (greyscale) or 3 (RGB).
        mean, std: per channel, for pixels in [0, 1]; finite, std above 0.
        crop_pct: the share of the resized image that the centre crop keeps, in (0, 1], as in timm.

    Raises:
        ValueError: for values out of their range.

    Example:
        >>> preprocessing = fv.Preprocessing((1, 8, 8), mean=(0.5,), std=(0.25,))
        >>> fv.Preprocessing.from_dict(preprocessing.as_dict()) == preprocessing
        True
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0

    def __post_init__(self) -> None:
        size = self.input_size
        if not isinstance(size, (tuple, list)) or len(size) != 3 or size[0] not in (1, 3):
            fail("Preprocessing", "input_size", "(C, H, W) with C 1 or 3", size)
        channels, height, width = (check_count("Preprocessing", "input_size", side, 1, LARGEST_SIZE) for side in size)
        (share,) = _numbers("Preprocessing", "crop_pct", [self.crop_pct], (1,), above_0=True)
        if share > 1:
            fail("Preprocessing", "crop_pct", "a number above 0, and 1 at most", self.crop_pct)
        found = {
            "input_size": (channels, height, width),
            "mean": _numbers("Preprocessing", "mean", self.mean, (size[0],)),
            "std": _numbers("Preprocessing", "std", self.std, (size[0],), above_0=True),
            "crop_pct": share,
        }
        for name, value in found.items():  # as plain numbers in tuples, whatever they came in
            object.__setattr__(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        """What `as_dict` gave, whether or not it was written as JSON in between."""
        names = {field.name for field in fields(cls)}
        if not isinstance(record, Mapping) or set(record) != names:
            got = sorted(map(str, record)) if isinstance(record, Mapping) else record
            fail("Preprocessing.from_dict", "record", f"a dict of {', '.join(sorted(names))}", got)
        return cls(**record)

    def transform(self, augment: bool = False) -> Callable[[Image.Image], Tensor]:
        """timm's transform from a PIL image to a normalised tensor (C, H, W)."""
        size = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        if augment:
            return create_transform(**size, is_training=True)
        return create_transform(**size, crop_pct=self.crop_pct, interpolation="bilinear")

    @property
    def mode(self) -> str:
        """Of the PIL images that `transform` takes."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def load(self, path: str | Path) -> Tensor:
        """Reads an image file as a normalised tensor (C, H, W): upright, transparency as white, 16 bits as 8."""
        return self.transform()(read_image(path, self.mode))

    def restore(self, images: Tensor) -> Tensor:
        """The inverse of the normalisation: pixels in [0, 1], for pictures."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)


def of_channels(argument: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Fits the statistics to the channels: one channel's are repeated, three are averaged to one."""
    found = _numbers("load_dataset", argument, values, (1, 3), above_0=argument == "std")
    return found if len(found) == channels else (sum(found) / len(found),) * channels


def _numbers(
    op: str, argument: str, values: Iterable[float], counts: tuple[int, ...], above_0: bool = False
) -> tuple[float, ...]:
    """As many finite numbers as one of the counts."""
    try:
        found = () if isinstance(values, (str, bytes)) else tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = ()
    if len(found) not in counts or not all(math.isfinite(value) and (value > 0 or not above_0) for value in found):
        expected = f"{' or '.join(map(str, counts))} finite number{'s' if counts != (1,) else ''}"
        fail(op, argument, expected + (" above 0" if above_0 else ""), values)
    return found
