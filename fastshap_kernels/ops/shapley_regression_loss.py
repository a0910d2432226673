"""Squared error of Shapley values as a linear model of the game.

The kernel is coalition_sum's, with the residual taken while the sums are in the cache; the gradient is coalition_sum's
too, with the residual scaled as it is read. The additive normalisation needs the sum over all players first: it is
coalition_sum and plain operations on (B, M, K), small beside φ's (B, P, K).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _checks, _library
from ..reference import coalition_sum as reference_sum
from ..reference import shapley_regression_loss as reference
from .coalition_sizes import count_with
from .coalition_sum import check_features, pool_with, select_backend

_KERNELS = ("cuda", "triton", "cpu")
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
    values efficient: they add up to grand − null. Computed in float32 (float64 where φ or the
    values are float64), also under autocast.

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
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        the loss, () or (B, M), float32 or float64. Gradients flow to every floating argument.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, a choice is unknown, or `grand` is missing.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Source: Jethani et al., FastSHAP, ICLR 2022 (weighted least squares, additive efficient normalisation).

    Example:
        >>> phi = torch.tensor([[[1.0], [2.0]]])  # one image, two players, one class
        >>> bits = fk.pack_bits(torch.tensor([[[True, False], [False, True]]]))
        >>> fk.shapley_regression_loss(phi, bits, torch.tensor([[[1.0], [4.0]]]))  # (0² + 2²) / 2
        tensor(2.)
    """
    op = "shapley_regression_loss"
    check_features(op, "phi", phi, "(B, P, K)")
    _checks.check_bits(op, bits, phi.shape[1], phi)
    dtype = check_game(op, phi, phi.shape[2], bits, values, null, grand, weights, normalization, reduction)
    # Once, though two sums need it: a gradient in half precision would be rounded once for each.
    null = None if null is None else null.to(dtype)
    target, gain = target_of(values, null, dtype), gain_of(null, grand, normalization, dtype)
    weights = None if weights is None else weights.to(dtype)
    served_by = select_backend(op, phi, bits, backend)
    if served_by == "reference":
        pool: reference_sum.Pool = reference_sum.coalition_sum
    elif gain is not None:
        pool = pool_with(_library.namespace(served_by))
    else:
        phi = phi.to(target.dtype) if target.dtype == torch.float64 else phi  # the kernels widen half precision only
        _, errors = ShapleyRegressionLoss.apply(phi, bits, target, _library.namespace(served_by))
        return reference.reduce(errors, phi.shape[2], weights, reduction)
    count = count_with(served_by)
    return reference.shapley_regression_loss(phi, bits, target, gain, weights, reduction, pool, count)


class ShapleyRegressionLoss(torch.autograd.Function):
    """Autograd face of `fastshap::shapley_regression_loss`."""

    @staticmethod
    def forward(phi: Tensor, bits: Tensor, target: Tensor, namespace: str) -> tuple[Tensor, Tensor]:
        return _library.kernels(namespace).shapley_regression_loss(phi, bits, target)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        phi, bits, _, ctx.namespace = inputs
        ctx.save_for_backward(bits, output[0])
        ctx.players = phi.shape[1]
        ctx.dtype = phi.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_residual: Tensor | None, grad_errors: Tensor | None) -> tuple[Tensor | None, ...]:
        bits, residual = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        scale = None if grad_errors is None else 2 * grad_errors
        grad = grad_residual
        if scale is not None and (grad is not None or ctx.needs_input_grad[2]):
            of_errors = residual * scale.unsqueeze(-1)
            grad = of_errors if grad is None else grad + of_errors
        grad_phi = grad_target = None
        if ctx.needs_input_grad[0] and grad_residual is None and scale is not None:
            grad_phi = kernels.shapley_regression_loss_backward(residual, scale, bits, ctx.players, ctx.dtype)
        elif ctx.needs_input_grad[0] and grad is not None:
            grad_phi = kernels.coalition_sum_backward(grad, bits, ctx.players, ctx.dtype)
        if ctx.needs_input_grad[2] and grad is not None:
            grad_target = -grad
        return grad_phi, None, grad_target, None


class ShapleyRegressionLossBackward:
    """The backward pass is linear in the residual and in its scale."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        residual, scale, bits, _, _, ctx.namespace = inputs
        ctx.save_for_backward(residual, scale, bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        residual, scale, bits = ctx.saved_tensors
        pooled = _library.kernels(ctx.namespace).coalition_sum(grad, bits, residual.dtype)
        return pooled * scale.unsqueeze(-1), (pooled * residual).sum(-1), None, None, None, None


@_library.define(
    "shapley_regression_loss",
    "(Tensor phi, Tensor bits, Tensor target) -> (Tensor residual, Tensor errors)",
)
def _fake(phi: Tensor, bits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return target.new_empty(target.shape), target.new_empty(target.shape[:2])


@_library.define(
    "shapley_regression_loss_backward",
    "(Tensor residual, Tensor scale, Tensor bits, int players, ScalarType dtype) -> Tensor",
)
def _fake_backward(residual: Tensor, scale: Tensor, bits: Tensor, players: int, dtype: torch.dtype) -> Tensor:
    return residual.new_empty((residual.shape[0], players, residual.shape[2]), dtype=dtype)


_library.register_autograd("shapley_regression_loss", ShapleyRegressionLoss)
_library.register_autograd("shapley_regression_loss_backward", ShapleyRegressionLossBackward)


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
) -> torch.dtype:
    """Checks what both losses share; returns the dtype of the loss.

    `like` (B, P, …) is what the Shapley values come from.
    """
    batch, coalitions = bits.shape[:2]
    _checks.check_choice(op, "normalization", normalization, NORMALIZATIONS)
    _checks.check_choice(op, "reduction", reduction, REDUCTIONS)
    _check(op, "values", values, like, (batch, coalitions, classes), "(B, M, K)")
    if null is not None:
        shared = isinstance(null, Tensor) and null.ndim == 1
        _check(op, "null", null, like, (classes,) if shared else (batch, classes), "(K,) or (B, K)")
    if weights is not None:
        _check(op, "weights", weights, like, (batch, coalitions), "(B, M)")
    if grand is not None:
        _check(op, "grand", grand, like, (batch, classes), "(B, K)")
    elif normalization == "additive":
        _checks.fail(op, "grand", 'v(N) as (B, K) for normalization="additive"', grand)
    return torch.promote_types(torch.promote_types(like.dtype, values.dtype), torch.float32)


def gain_of(null: Tensor | None, grand: Tensor | None, normalization: str, dtype: torch.dtype) -> Tensor | None:
    """grand − null as (B, 1, K) where the normalisation asks for it; null is of this dtype already."""
    if normalization == "none" or grand is None:
        return None
    gain = grand.to(dtype).unsqueeze(1)
    return gain if null is None else gain - null.unsqueeze(-2)


def target_of(values: Tensor, null: Tensor | None, dtype: torch.dtype) -> Tensor:
    """values − null, (B, M, K); null is of this dtype already."""
    target = values.to(dtype)
    return target if null is None else target - null.unsqueeze(-2)


def _check(op: str, argument: str, value: object, like: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    tensor = _checks.check_tensor(op, argument, value, meaning, len(shape))
    if tensor.shape != shape:
        _checks.fail(op, argument, f"{meaning} = {tuple(shape)} like the other arguments", tensor)
    _checks.check_device(op, argument, tensor, like)
