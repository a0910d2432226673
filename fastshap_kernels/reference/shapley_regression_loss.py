"""Squared error of Shapley values as a linear model of the game."""

from __future__ import annotations

import torch
from torch import Tensor

from .coalition_sizes import Count
from .coalition_sum import Pool
from .pack_bits import pack_bits


def shapley_regression_loss(
    phi: Tensor,
    bits: Tensor,
    target: Tensor,
    gain: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    pool: Pool,
    count: Count,
) -> Tensor:
    """phi (B, P, K), bits (B, M, W), target (B, M, K) = values − null, weights (B, M) → loss.

    `gain` (B, 1, K) = grand − null asks for the additive normalisation, which gives each player an equal part of
    what the Shapley values miss: Σ_{p∈S} φ'_p = Σ_{p∈S} φ_p + |S|/P (gain − Σ_p φ_p).
    """
    if gain is None:
        return squared_error(pool(phi, bits, target.dtype), target, weights, reduction)
    predicted, total = pool_with_total(phi, bits, target.dtype, pool)
    share = sizes(bits, phi.shape[1], target.dtype, count) / phi.shape[1]
    predicted = predicted + share * (gain - total)
    return squared_error(predicted, target, weights, reduction)


def pool_with_total(features: Tensor, bits: Tensor, dtype: torch.dtype, pool: Pool) -> tuple[Tensor, Tensor]:
    """The sums over the coalitions (B, M, L) and over all players (B, 1, L), from one pass over the features."""
    everyone = pack_bits(torch.ones(features.shape[1], dtype=torch.bool, device=bits.device))
    bits = torch.cat([bits, everyone.expand(bits.shape[0], 1, -1)], 1)
    pooled = pool(features, bits, dtype)
    return pooled[:, :-1], pooled[:, -1:]


def sizes(bits: Tensor, players: int, dtype: torch.dtype, count: Count) -> Tensor:
    """|S| of each coalition, (B, M, 1)."""
    return count(bits, players).unsqueeze(-1).to(dtype)


def squared_error(predicted: Tensor, target: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """predicted, target (B, M, K), weights (B, M) → the loss."""
    if weights is None and reduction != "none":
        return torch.nn.functional.mse_loss(predicted, target, reduction=reduction)  # in fewer passes over memory
    errors = torch.nn.functional.mse_loss(predicted, target, reduction="none").sum(-1)
    return reduce(errors, target.shape[2], weights, reduction)


def reduce(errors: Tensor, classes: int, weights: Tensor | None, reduction: str) -> Tensor:
    """errors (B, M), summed over K classes, weights (B, M) → (), or (B, M) for reduction "none"."""
    if weights is not None:
        errors = errors * weights
    if reduction == "sum":
        return errors.sum()
    return errors.mean() / classes if reduction == "mean" else errors / classes
