"""Exact Shapley values from the value of every coalition."""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor


def exact_shapley(values: Tensor) -> Tensor:
    """values (..., 2^P, K) → (..., P, K): one matrix product with the weights of the definition, in float64."""
    values_double = values.double()
    # Shapley values ignore a constant; without it, large values that differ little lose no digits.
    gains = values_double - values_double[..., :1, :]
    return (coefficients(players_of(values), values.device) @ gains).to(values.dtype)


def players_of(values: Tensor) -> int:
    """P of values (..., 2^P, K)."""
    return int(values.shape[-2]).bit_length() - 1


def coefficients(players: int, device: torch.device) -> Tensor:
    """float64 (P, 2^P): what a unit of v(S) adds to φ_p.

    (|S| − 1)! (P − |S|)! / P! where p is in S, else −|S|! (P − |S| − 1)! / P!.
    """
    coalitions = torch.arange(2**players, device=device)
    present = (coalitions >> torch.arange(players, device=device).unsqueeze(1)) & 1
    sizes = present.sum(0)
    # s! (P − s − 1)! / P! = 1 / (P · C(P − 1, s)): exact whole numbers up to the one division.
    weights = [1.0 / (players * comb(players - 1, size)) for size in range(players)]
    weight = torch.tensor(weights, dtype=torch.float64, device=device)
    joined = weight[(sizes - 1).clamp(min=0)]
    stayed_out = weight[sizes.clamp(max=players - 1)]
    return torch.where(present.bool(), joined, -stayed_out)
