"""Squared error of Shapley values as a linear model of the game."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _backend, _checks
from ..reference import shapley_regression_loss as reference

NORMALIZATIONS = ("none", "additive")
REDUCTIONS = ("mean", "sum", "none")


def shapley_regression_loss(
    phi: Tensor,
    bits: Tensor,
    values: Tensor,
    null: Tensor | None = None,
    grand: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    normalization: str = "none",
    reduction: str = "mean",
    backend: str | None = None,
) -> Tensor:
    """Weighted squared error between the values of coalitions and the sums of their players' Shapley values.

    residual[b, m] = values[b, m] − null[b] − Σ_{p ∈ S(b, m)} φ'[b, p],  loss = mean over B, M, K of w · residual²

    with φ' = φ, or with normalization="additive" φ' = φ + (grand − null − Σ_p φ_p) / P, which makes the Shapley
    values efficient: they add up to grand − null. Computed in float32 (float64 where an argument is float64),
    also under autocast.

    Args:
        phi (float16, bfloat16, float32, float64): (B, P, K) Shapley values; 1 ≤ P ≤ 4096.
        bits (int32): (B, M, ceil(P / 32)) coalitions of the P players.
        values (floating): (B, M, K) v(S) of each coalition.
        null (floating): (K,) or (B, K) v(∅); None is 0.
        grand (floating): (B, K) v(N); needed by normalization="additive", without effect otherwise.
        weights (floating): (B, M) weight of each coalition; None is 1.
        normalization: "none" or "additive".
        reduction: "mean" over B, M and K (NaN where there is nothing to average, as in PyTorch), "sum", or "none":
            (B, M), the mean over K.
        backend: "reference" or "cpu"; default the best available.

    Returns:
        the loss, () or (B, M), float32 or float64. Gradients flow to every floating argument.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, a choice is unknown, or `grand` is missing.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, forward and backward.
    Source: Jethani et al., FastSHAP, ICLR 2022 (weighted least squares, additive efficient normalisation).
    """
    op = "shapley_regression_loss"
    _checks.check_tensor(op, "phi", phi, "(B, P, K)", 3)
    _checks.check_count(op, "phi.shape[1]", int(phi.shape[1]), 1, _checks.MAX_PLAYERS)
    _checks.check_bits(op, bits, phi.shape[1], phi)
    game = check_game(op, phi, phi.shape[2], bits, values, null, grand, weights, normalization, reduction)
    _backend.select(op, phi.device, backend, compiled=False)
    return reference.shapley_regression_loss(phi, bits, *game, reduction)


class Game(NamedTuple):
    """What the Shapley values are fitted to, in the dtype of the loss."""

    values: Tensor  # (B, M, K)
    null: Tensor  # (B or 1, 1, K)
    grand: Tensor | None  # (B, 1, K); None without normalisation
    weights: Tensor | None  # (B, M)


def check_game(
    op: str,
    like: Tensor,
    classes: int,
    bits: Tensor,
    values: Tensor,
    null: Tensor | None,
    grand: Tensor | None,
    weights: Tensor | None,
    normalization: str,
    reduction: str,
) -> Game:
    """Checks the arguments that both regression losses share; `like` is (B, P, …)."""
    batch, coalitions = bits.shape[:2]
    _check(op, "values", values, like, (batch, coalitions, classes), "(B, M, K)")
    dtype = torch.promote_types(torch.promote_types(like.dtype, values.dtype), torch.float32)
    if normalization not in NORMALIZATIONS:
        _checks.fail(op, "normalization", "one of " + ", ".join(NORMALIZATIONS), normalization)
    if reduction not in REDUCTIONS:
        _checks.fail(op, "reduction", "one of " + ", ".join(REDUCTIONS), reduction)
    if normalization == "additive" and grand is None:
        _checks.fail(op, "grand", 'v(N) as (B, K) for normalization="additive"', grand)
    if null is None:
        null = values.new_zeros(classes)
    elif isinstance(null, Tensor) and null.ndim == 1:
        _check(op, "null", null, like, (classes,), "(K,) or (B, K)")
    else:
        _check(op, "null", null, like, (batch, classes), "(K,) or (B, K)")
    if grand is not None:
        _check(op, "grand", grand, like, (batch, classes), "(B, K)")
    if weights is not None:
        _check(op, "weights", weights, like, (batch, coalitions), "(B, M)")
    return Game(
        values.to(dtype),
        null.to(dtype).unsqueeze(-2).expand(batch if null.ndim == 2 else 1, 1, classes),
        grand.to(dtype).unsqueeze(1) if grand is not None and normalization == "additive" else None,
        weights.to(dtype) if weights is not None else None,
    )


def _check(op: str, argument: str, value: object, like: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    tensor = _checks.check_tensor(op, argument, value, meaning, len(shape))
    if tensor.shape != shape:
        _checks.fail(op, argument, f"{meaning} = {tuple(shape)} like the other arguments", tensor)
    _checks.check_device(op, argument, tensor, like)
