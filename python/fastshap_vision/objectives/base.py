"""What every objective returns, and the units of a regression's error."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..games.coalitions import Coalitions


class ObjectiveTerms(NamedTuple):
    """What one step's loss is made of; all but `loss` are detached scalars, None where the term is off."""

    loss: Tensor
    task: Tensor | None = None
    regression: Tensor | None = None  # R, in the unit that `error` says
    masked_task: Tensor | None = None
    value_r2: Tensor | None = None  # share of the coalition values' variance that φ explains; NaN where they don't vary
    spread: Tensor | None = None  # standard deviation of the coalition values; near 0 the game has collapsed


def variance_of(values: Tensor) -> Tensor:
    """Variance of v(S), (B, M, K), over batch and coalitions, mean over classes."""
    return _wide(values).flatten(0, 1).var(0, correction=0).mean()


def even_split_error(values: Tensor, logits: Tensor, null: Tensor, coalitions: Coalitions) -> Tensor:
    """Mean squared error that the even split (f − v(∅))/P leaves of v(S), (B, M, K).

    Logits (B, K); v(∅) (K,), or of each image (B, 1, K).
    """
    share = coalitions.sizes.unsqueeze(2).to(values.dtype) / coalitions.players
    even = null + share * (logits.unsqueeze(1) - null)
    return _wide(values - even).square().mean()


def in_unit(residual: Tensor, unit: Tensor, values: Tensor) -> Tensor:
    """R, a mean squared error of v(S), in a unit; in the values' own where the unit is no more than their rounding.

    A game that is constant has nothing to explain: divided by rounding, R would be any number, and its gradient too.
    """
    return residual / unit.masked_fill(_is_rounding(unit, values), 1.0)


def explained_share(residual: Tensor, values: Tensor) -> Tensor:
    """value_r2, the explained share of the variance of v(S), (B, M, K); NaN where they vary by rounding only."""
    variance = variance_of(values)
    return 1 - residual / variance.masked_fill(_is_rounding(variance, values), math.nan)


def _is_rounding(square: Tensor, values: Tensor) -> Tensor:
    """Whether a mean square of differences of v(S) is no more than what rounding makes of equal values.

    Equal values were seen to differ by 3 eps in float32, from one way to evaluate a coalition to another.
    """
    eps = max(16 * torch.finfo(torch.float32).eps, 2 * torch.finfo(values.dtype).eps)
    return square <= eps**2 * _wide(values).square().mean()


def _wide(values: Tensor) -> Tensor:
    """At least float32: squares of float16 vanish."""
    return values if values.dtype == torch.float64 else values.float()
