"""One number per image, with its mean and standard error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ._statistics import mean_and_error


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """A metric of B explanations.

    Args:
        values (float64): (B,) one number per image; NaN where the metric is not defined, which is left out below.
        curve: the `RemovalCurve` that the numbers were computed from, where they come from removing patches, or None.

    Example:
        >>> fv.metrics.Score(torch.tensor([0.5, 1.0]).double())
        Score(0.7500 ± 0.2500, 2 images)
    """

    values: Tensor
    curve: Any = None

    @property
    def mean(self) -> float:
        """Mean over the images."""
        return float(mean_and_error(self.values)[0])

    @property
    def standard_error(self) -> float:
        """Standard error of the mean over the images; NaN for fewer than two."""
        return float(mean_and_error(self.values)[1])

    def __len__(self) -> int:
        return len(self.values)

    def __sub__(self, other: Score) -> Score:
        """The difference image by image, with the standard error of paired numbers."""
        if len(self) != len(other):
            raise ValueError(f"Score: a difference needs the same images, but there are {len(self)} and {len(other)}.")
        return Score(self.values - other.values)

    def __repr__(self) -> str:
        left_out = int(self.values.isnan().sum())
        images = f"{len(self) - left_out} of {len(self)}" if left_out else str(len(self))
        return f"Score({self.mean:.4f} ± {self.standard_error:.4f}, {images} images)"
