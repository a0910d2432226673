"""The Shapley regression loss of Shapley values that are linear in features, without making them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pack_bits import unpack_bits
from .shapley_regression_loss import reduce


def linear_shapley_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    values: Tensor,
    null: Tensor,
    grand: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    pool: Callable[[Tensor, Tensor, torch.dtype], Tensor],
) -> Tensor:
    """features (B, P, L), weight (K, L), bias (K,), bits (B, M, W), values (B, M, K), null (B, 1, K) → loss.

    Σ_{p∈S} (W e_p + b) = W (Σ_{p∈S} e_p) + |S| b: the features are pooled first, by `pool`, a coalition_sum.
    `grand` (B, 1, K) asks for the additive normalisation: W (Σ_{p∈S} e_p − |S|/P Σ_p e_p) + |S|/P (grand − null).
    """
    players = features.shape[1]
    size = unpack_bits(bits, players).sum(-1, keepdim=True).to(values.dtype)
    pooled = pool(features, bits, values.dtype)
    residual = values - null
    if grand is not None:
        share = size / players
        pooled = pooled - share * features.sum(1, keepdim=True, dtype=values.dtype)
        residual = residual - share * (grand - null)
    elif bias is not None:
        residual = residual - size * bias.to(values.dtype)
    # Autocast would round the votes to half precision.
    with torch.autocast(features.device.type, enabled=False):
        residual = residual - torch.nn.functional.linear(pooled, weight.to(values.dtype))
    return reduce(residual, weights, reduction)
