"""Means and their standard errors."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def mean_and_error(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the images (B, …) and its standard error, NaN left out; the error of fewer than two is NaN."""
    count = values.isnan().logical_not().sum(0)
    mean = values.nanmean(0)
    variance = (values - mean).square().nansum(0) / (count - 1)
    return mean, torch.where(count > 1, variance / count, math.nan).sqrt()
