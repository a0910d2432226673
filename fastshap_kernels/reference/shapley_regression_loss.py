"""Squared error of Shapley values as a linear model of the game."""

from __future__ import annotations

from torch import Tensor

from .coalition_sum import coalition_sum


def shapley_regression_loss(
    phi: Tensor,
    bits: Tensor,
    values: Tensor,
    null: Tensor,
    grand: Tensor | None,
    weights: Tensor | None,
    reduction: str,
) -> Tensor:
    """phi (B, P, K), bits (B, M, W), values (B, M, K), null (B, 1, K), weights (B, M) → loss.

    `grand` (B, 1, K) asks for the additive normalisation; None for none.
    """
    phi = phi.to(values.dtype)
    if grand is not None:
        phi = phi + (grand - null - phi.sum(1, keepdim=True)) / phi.shape[1]
    return reduce(values - null - coalition_sum(phi, bits, values.dtype), weights, reduction)


def reduce(residual: Tensor, weights: Tensor | None, reduction: str) -> Tensor:
    """The loss of residual (B, M, K): () for "mean" and "sum", (B, M) for "none"."""
    squares = residual.square()
    if weights is not None:
        squares = squares * weights.unsqueeze(-1)
    if reduction == "none":
        return squares.mean(-1)
    return squares.mean() if reduction == "mean" else squares.sum()
