"""The Shapley regression loss of Shapley values that are linear in features, without making them."""

from __future__ import annotations

import torch
from torch import Tensor

from .coalition_sizes import Count
from .coalition_sum import Pool
from .shapley_regression_loss import pool_with_total, sizes, squared_error


def linear_shapley_errors(
    pooled: Tensor, weight: Tensor, scale: Tensor, slope: Tensor, level: Tensor, values: Tensor
) -> Tensor:
    """pooled (B, M, L), weight (K, L), scale (B, M), slope and level (B or 1, K), values (B, M, K) → (B, M).

    Σ_k (pooled · weight + scale · slope + level − values)² in the dtype of `pooled`.
    """
    dtype = pooled.dtype
    predicted = torch.nn.functional.linear(pooled, weight.to(dtype))
    predicted = predicted + scale.unsqueeze(-1) * slope.unsqueeze(1) + level.unsqueeze(1)
    return (predicted - values.to(dtype)).square().sum(-1)


def linear_shapley_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    target: Tensor,
    gain: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    pool: Pool,
    count: Count,
) -> Tensor:
    """features (B, P, L), weight (K, L), bias (K,), bits (B, M, W), target (B, M, K) = values − null → loss.

    Σ_{p∈S} (W e_p + b) = W Σ_{p∈S} e_p + |S| b. With `gain` (B, 1, K) = grand − null, the additive normalisation,
    Σ_{p∈S} φ'_p = W (Σ_{p∈S} e_p − |S|/P Σ_p e_p) + |S|/P gain.
    """
    players, dtype = features.shape[1], target.dtype
    if gain is None:
        pooled = pool(features, bits, dtype)
        constant = None if bias is None else sizes(bits, players, dtype, count) * bias.to(dtype)
    else:
        share = sizes(bits, players, dtype, count) / players
        pooled, total = pool_with_total(features, bits, dtype, pool)
        pooled = pooled - share * total
        constant = share * gain
    # Autocast would round the predictions to half precision.
    with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
        predicted = torch.nn.functional.linear(pooled, weight.to(dtype))
    if constant is not None:
        predicted = predicted + constant
    return squared_error(predicted, target, weights, reduction)
