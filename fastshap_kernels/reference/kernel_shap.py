"""Shapley values estimated from sampled coalitions by constrained weighted least squares."""

from __future__ import annotations

import torch
from torch import Tensor

from .coalition_sizes import coalition_sizes
from .pack_bits import unpack_bits

#: A pivot below this share of its diagonal entry is rounding: the coalitions don't tell the players apart.
SINGULAR = 1e-12
#: A coalition whose leverage is this close to 1 is fitted exactly: nothing is left to judge its error by.
INDISPENSABLE = 1e-9


def kernel_shap(
    bits: Tensor, values: Tensor, null: Tensor, grand: Tensor, weights: Tensor, players: int
) -> tuple[Tensor, Tensor, Tensor]:
    """bits (B, M, W); float64 values (B, M, K), null, grand (B, K), weights (B, M) → φ, its errors, is_regular (B).

    With φ = (grand − null) / P + ψ the constraint reads Σ_p ψ_p = 0, and ψ solves an ordinary regression

        (v(S) − null − |S| / P · (grand − null)) on (1_S − |S| / P).

    Where the coalitions of an image do not determine φ, is_regular is False and both results are NaN.
    """
    rows, weighted_rows = design(bits, weights, players)
    even = (grand - null).unsqueeze(1) / players
    sizes = coalition_sizes(bits, players).unsqueeze(-1)
    targets = values - null.unsqueeze(1) - sizes * even

    normal = normal_matrix(rows, weighted_rows)
    factor, info = torch.linalg.cholesky_ex(normal)
    pivots = factor.diagonal(dim1=1, dim2=2).square() / normal.diagonal(dim1=1, dim2=2)
    is_regular = (info == 0) & (pivots > SINGULAR).all(1)

    psi = torch.cholesky_solve(weighted_rows.mT @ targets, factor)
    psi = psi - psi.mean(1, keepdim=True)  # zero up to rounding: now exactly
    residuals = weights.unsqueeze(-1) * (targets - rows @ psi)
    error = standard_error(rows, weights, factor, residuals, is_paired(bits, players))
    keep = is_regular[:, None, None]
    return torch.where(keep, even + psi, torch.nan), torch.where(keep, error, torch.nan), is_regular


def design(bits: Tensor, weights: Tensor, players: int) -> tuple[Tensor, Tensor]:
    """Regression rows 1_S − |S| / P (B, M, P), and the same times their weights."""
    present = unpack_bits(bits, players).double()
    rows = present - present.mean(-1, keepdim=True)
    return rows, weights.unsqueeze(-1) * rows


def normal_matrix(rows: Tensor, weighted_rows: Tensor) -> Tensor:
    """(B, P, P). Rows sum to zero, so their product knows nothing of (1, …, 1); adding that direction's projector
    makes it regular without moving ψ."""
    return weighted_rows.mT @ rows + 1.0 / rows.shape[-1]


def is_paired(bits: Tensor, players: int) -> Tensor:
    """bool (B): whether coalitions 2j and 2j + 1 are complements, for every j."""
    present = unpack_bits(bits, players)
    even, odd = present[:, 0::2], present[:, 1::2]
    return (even[:, : odd.shape[1]] != odd).all(-1).all(-1)


def standard_error(rows: Tensor, weights: Tensor, factor: Tensor, residuals: Tensor, paired: Tensor) -> Tensor:
    """(B, P, K): sandwich estimate from independent draws, each residual divided by 1 − leverage (HC3, the jackknife).

    A draw is a coalition, or a pair: complements have opposite rows, so a pair is one row with the difference of
    its weighted residuals. It moves to the pair's first coalition, and the second one counts for nothing.
    """
    solved = torch.cholesky_solve(rows.mT, factor)  # (B, P, M)
    leverage = weights * (solved.mT * rows).sum(-1)
    second = torch.arange(rows.shape[1], device=rows.device) % 2 == 1
    moved = (paired.unsqueeze(1) & second).double()
    residuals = residuals * (1 - moved).unsqueeze(-1) - (moved.unsqueeze(-1) * residuals).roll(-1, 1)
    slack = 1 - leverage * (1 - moved) - (moved * leverage).roll(-1, 1)
    scores = residuals / slack.clamp(min=INDISPENSABLE).unsqueeze(-1)
    errors = (solved.square() @ scores.square()).sqrt()
    return torch.where(has_indispensable(rows, leverage, paired)[:, None, None], torch.inf, errors)


def has_indispensable(rows: Tensor, leverage: Tensor, paired: Tensor) -> Tensor:
    """bool (B): whether φ needs a coalition (or pair), however often it was drawn: copies always agree, so residuals
    would report an error of zero."""
    # Equal rows have equal keys, and opposite rows opposite ones; cosines of whole numbers don't collide.
    keys = rows @ torch.arange(1, rows.shape[2] + 1, dtype=rows.dtype, device=rows.device).cos()
    keys, order = torch.where(paired.unsqueeze(1), keys.abs(), keys).sort(1)
    sums = torch.nn.functional.pad(leverage.gather(1, order).cumsum(1), (1, 0))
    is_first = keys.diff(dim=1, prepend=keys[:, :1] - 1) > 1e-9
    # Sums never fall, so their maximum over the first copies so far is the sum before the current group.
    before = torch.where(is_first, sums[:, :-1], 0).cummax(1).values
    return (sums[:, 1:] - before >= 1 - INDISPENSABLE).any(1)
