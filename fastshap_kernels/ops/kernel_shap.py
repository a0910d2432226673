"""Shapley values estimated from sampled coalitions (KernelSHAP), with standard errors."""

from __future__ import annotations

from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .. import _backend, _checks
from ..reference import kernel_shap as reference


class KernelShapEstimate(NamedTuple):
    """Shapley values (B, P, K) and their standard errors (B, P, K).

    Example:
        >>> bits, grand = fk.sample_coalitions(2, 64, 9, seed=0), torch.randn(2, 3)
        >>> estimate = fk.kernel_shap(bits, torch.randn(2, 64, 3), torch.zeros(3), grand, players=9)
        >>> estimate.phi.shape, estimate.standard_error.shape
        (torch.Size([2, 9, 3]), torch.Size([2, 9, 3]))
    """

    phi: Tensor
    standard_error: Tensor


def kernel_shap(
    bits: Tensor,
    values: Tensor,
    null: Tensor,
    grand: Tensor,
    *,
    players: int,
    weights: Tensor | None = None,
    backend: str | None = None,
) -> KernelShapEstimate:
    """Estimates Shapley values from sampled coalitions by constrained weighted least squares.

    phi[b] = argmin Σ_m weights[b, m] · (values[b, m] − null[b] − Σ_{p ∈ S_bm} phi[b, p])²
    subject to Σ_p phi[b, p] = grand[b] − null[b].

    Args:
        bits (int32): (B, M, ceil(P / 32)) coalitions, drawn from the Shapley kernel where `weights` is None.
        values (floating point): (B, M, K), v(S) for every coalition and class.
        null (floating point): (K,) or (B, K), v(∅).
        grand (floating point): (B, K), v(N).
        players: P.
        weights (floating point): (B, M), zero or more: the Shapley kernel over the probability with which each
            coalition was drawn, up to a factor. All 2^P − 2 coalitions with the Shapley kernel itself,
            1 / (C(P, |S|) · |S| · (P − |S|)), give the exact Shapley values. Default: all weigh the same.
        backend: "reference", the only one: the work is matrix products, which PyTorch does best.

    Returns:
        `KernelShapEstimate`: `phi` (B, P, K), solved in float64, and `standard_error` (B, P, K), both in the dtype
        of `values`. The errors are the sandwich estimate with jackknife residuals (HC3) over independent draws; where
        all coalitions 2j and 2j + 1 of an image are complements, each pair is one draw. They are infinite for an
        image with a coalition (or pair) that it can't do without, and mean nothing for an enumeration. Gradients
        flow to `phi` from `values`, `null`, `grand` and `weights`.

    Raises:
        ValueError: if shapes or dtypes do not match, or the coalitions of an image do not determine its Shapley
            values (inside torch.compile that image is NaN instead).
        RuntimeError: if another backend was chosen.

    Source: Lundberg and Lee, A unified approach to interpreting model predictions (2017), theorem 2; Covert and
    Lee, Improving KernelSHAP (2021), for pairs.

    Example:
        >>> phi = torch.tensor([[[1.0], [2.0], [3.0]]])
        >>> bits = fk.sample_coalitions(1, 16, 3, seed=0)
        >>> values, null, grand = fk.coalition_sum(phi, bits), torch.zeros(1), phi.sum(1)
        >>> torch.allclose(fk.kernel_shap(bits, values, null, grand, players=3).phi, phi)
        True
    """
    op = "kernel_shap"
    players = _check_arguments(op, bits, values, null, grand, players)
    weights = _normalized_weights(op, weights, values)
    _backend.select(op, values.device, backend, ())
    phi, standard_error, is_regular = reference.kernel_shap(
        bits,
        values.double(),
        null.double().expand(grand.shape),
        grand.double(),
        weights,
        players,
    )
    # Reading the outcome waits for the device and can't be traced.
    if _checks.has_values(is_regular) and not bool(is_regular.all()):
        _fail_singular(bits, weights, players, int(is_regular.logical_not().nonzero()[0]))
    return KernelShapEstimate(phi.to(values.dtype), standard_error.to(values.dtype))


def _check_arguments(op: str, bits: Tensor, values: Tensor, null: Tensor, grand: Tensor, players: int) -> int:
    """Returns P."""
    players = _checks.check_count(op, "players", players, 1, _checks.MAX_PLAYERS)
    _checks.check_tensor(op, "values", values, "(B, M, K)", 3)
    _checks.check_bits(op, bits, players, values)
    batch, coalitions, classes = values.shape
    if bits.shape[1] != coalitions:
        _checks.fail(op, "bits", f"of M = {coalitions} coalitions an image like `values`", bits)
    _checks.check_tensor(op, "grand", grand, "(B, K)", 2)
    if grand.shape != (batch, classes):
        _checks.fail(op, "grand", f"({batch}, {classes}) for `values` {tuple(values.shape)}", grand)
    _checks.check_tensor(op, "null", null, f"({classes},) or ({batch}, {classes})", range(1, 3))
    if null.shape not in ((classes,), (batch, classes)):
        _checks.fail(op, "null", f"a floating-point tensor ({classes},) or ({batch}, {classes})", null)
    _checks.check_device(op, "null", null, values)
    _checks.check_device(op, "grand", grand, values)
    return players


def _normalized_weights(op: str, weights: Tensor | None, values: Tensor) -> Tensor:
    """float64 (B, M), summing to 1."""
    batch, coalitions = values.shape[:2]
    if weights is None:
        return values.new_full((batch, coalitions), 1.0 / max(coalitions, 1), dtype=torch.float64)
    _checks.check_tensor(op, "weights", weights, "(B, M)", 2)
    if weights.shape != (batch, coalitions):
        _checks.fail(op, "weights", f"({batch}, {coalitions}) for `values` {tuple(values.shape)}", weights)
    _checks.check_device(op, "weights", weights, values)
    if _checks.has_values(weights) and not bool((weights.isfinite() & (weights >= 0)).all()):
        lowest, highest = (float(end) for end in torch.aminmax(weights))
        _checks.fail(op, "weights", "finite and not negative", f"values from {lowest} to {highest}")
    total = weights.double().sum(1, keepdim=True)
    return weights.double() / torch.where(total > 0, total, 1.0)


def _fail_singular(bits: Tensor, weights: Tensor, players: int, image: int) -> NoReturn:
    rows, weighted_rows = reference.design(bits[image : image + 1], weights[image : image + 1], players)
    missing = players - int(torch.linalg.matrix_rank(reference.normal_matrix(rows, weighted_rows), hermitian=True))
    missing = max(missing, 1)
    _checks.fail(
        "kernel_shap",
        "bits",
        f"coalitions that determine {players} Shapley values",
        bits,
        f"Those of image {image} leave {missing} directions open: draw at least {missing} more coalitions with a "
        f"positive weight ({2 * missing} if they come in pairs); 8 · players = {8 * players} in all are a sound start.",
    )
