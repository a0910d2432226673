"""The Shapley regression loss of Shapley values that are linear in features, without making them.

Once the features are pooled by coalition, what is left is one GEMM and a residual of (B, M, K), and so is its backward
pass: residual × pooled features for the weight, residual × weight for the pooled features, and coalition_sum's
backward to scatter those to the players. Triton squares the residuals inside the GEMM; elsewhere the only kernel is
coalition_sum's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import coalition_sum as reference_sum
from ..reference import linear_shapley_loss as reference
from ..reference import shapley_regression_loss as reference_loss
from ..reference.coalition_sizes import Count
from .coalition_sizes import count_with
from .coalition_sum import check_features, pool_with
from .shapley_regression_loss import check_game, gain_of, target_of

_KERNELS = ("triton", "cuda", "cpu")


def linear_shapley_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
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
    """`shapley_regression_loss` of φ_p = W e_p + b, with no (B, P, K) tensor ever made.

    Σ_{p∈S} φ_p = W (Σ_{p∈S} e_p) + |S| b: the features are pooled by coalition, then there is one GEMM, in memory
    of (B, M, K) instead of (B, P, K). With normalization="additive",
    Σ_{p∈S} φ'_p = W (Σ_{p∈S} e_p − |S|/P Σ_p e_p) + |S|/P (grand − null): the bias has no effect.
    Computed in float32 (float64 where features or values are float64), also under autocast; only the gradients of a
    bfloat16 head, which are rounded to it in the end, are sums of bfloat16 residuals on Triton.

    Args:
        features (float16, bfloat16, float32, float64): (B, P, L) e_p; 1 ≤ P ≤ 4096.
        weight (floating): (K, L) W.
        bias (floating): (K,) b; None is 0.
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

    Example:
        >>> features, weight, bias = torch.randn(2, 9, 5), torch.randn(3, 5), torch.randn(3)
        >>> bits, values = fk.sample_coalitions(2, 4, 9, seed=0), torch.randn(2, 4, 3)
        >>> loss = fk.linear_shapley_loss(features, weight, bias, bits, values)
        >>> torch.allclose(loss, fk.shapley_regression_loss(features @ weight.T + bias, bits, values))
        True
    """
    op = "linear_shapley_loss"
    check_features(op, "features", features, "(B, P, L)")
    _check_head(op, features, weight, bias)
    _checks.check_bits(op, bits, features.shape[1], features)
    dtype = check_game(op, features, weight.shape[0], bits, values, null, grand, weights, normalization, reduction)
    # Once, though two sums need it: a gradient in half precision would be rounded once for each.
    null = None if null is None else null.to(dtype)
    gain = gain_of(null, grand, normalization, dtype)
    weights = None if weights is None else weights.to(dtype)
    served_by = _backend.select(op, features.device, backend, _KERNELS)
    pool = reference_sum.coalition_sum if served_by == "reference" else pool_with(_library.namespace(served_by))
    count = count_with(served_by)
    if served_by == "triton" and torch.float64 not in (dtype, weight.dtype):
        errors = _errors(features, weight, bias, bits, values, null, gain, pool, count)
        return reference_loss.reduce(errors, weight.shape[0], weights, reduction)
    target = target_of(values, null, dtype)
    return reference.linear_shapley_loss(features, weight, bias, bits, target, gain, weights, reduction, pool, count)


def _errors(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    values: Tensor,
    null: Tensor | None,
    gain: Tensor | None,
    pool: reference_sum.Pool,
    count: Count,
) -> Tensor:
    """(B, M) squared errors, summed over the classes: no other tensor of the size of `values` is made."""
    players, dtype = features.shape[1], torch.float32
    scale = reference_loss.sizes(bits, players, dtype, count)
    if gain is None:
        pooled = pool(features, bits, dtype)
        slope = weight.new_zeros(1, weight.shape[0], dtype=dtype) if bias is None else bias.to(dtype).unsqueeze(0)
    else:
        scale = scale / players
        pooled, total = reference_loss.pool_with_total(features, bits, dtype, pool)
        pooled, slope = pooled - scale * total, gain.squeeze(1)
    level = weight.new_zeros(1, weight.shape[0], dtype=dtype) if null is None else null
    level = level if level.ndim == 2 else level.unsqueeze(0)
    return LinearShapleyErrors.apply(pooled, weight, scale.squeeze(-1), slope, level, values, "fastshap_triton")


class LinearShapleyErrors(torch.autograd.Function):
    """Σ_k (pooled · weight + scale · slope + level − values)² of each coalition, of which only Triton has a kernel."""

    @staticmethod
    def forward(
        pooled: Tensor, weight: Tensor, scale: Tensor, slope: Tensor, level: Tensor, values: Tensor, namespace: str
    ) -> Tensor:
        return _library.kernels(namespace).linear_shapley_errors(pooled, weight, scale, slope, level, values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.namespace = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.needs_input_grad[2]:
            raise RuntimeError("linear_shapley_errors: argument `scale` has no gradient. Pass it detached.")
        values_too = ctx.needs_input_grad[5]
        backward = _library.kernels(ctx.namespace).linear_shapley_errors_backward
        pooled, weight, slope, level, values = backward(grad, *ctx.saved_tensors, values_too)
        return pooled, weight, None, slope, level, values if values_too else None, None


class LinearShapleyErrorsBackward:
    """The gradient of the gradient, which is rare: that of the reference, in plain PyTorch."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.values_too, ctx.namespace = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, pooled, weight, scale, *others = ctx.saved_tensors
        if ctx.needs_input_grad[3]:
            raise RuntimeError("linear_shapley_errors_backward: argument `scale` has no gradient. Pass it detached.")

        def errors(pooled: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
            with torch.autocast(pooled.device.type, enabled=False):
                return reference.linear_shapley_errors(pooled, weight, scale, *others)

        def gradients(grad: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            found = torch.func.vjp(errors, *inputs)[1](grad)
            return found if ctx.values_too else found[:-1]

        if not ctx.values_too:
            grads = grads[:-1]
        found = torch.func.vjp(gradients, grad, pooled, weight, *others)[1](grads)
        return *found[:3], None, *found[3:], None, None


@_library.define(
    "linear_shapley_errors",
    "(Tensor pooled, Tensor weight, Tensor scale, Tensor slope, Tensor level, Tensor values) -> Tensor",
)
def _fake(pooled: Tensor, weight: Tensor, scale: Tensor, slope: Tensor, level: Tensor, values: Tensor) -> Tensor:
    return pooled.new_empty(pooled.shape[:2])


@_library.define(
    "linear_shapley_errors_backward",
    "(Tensor grad, Tensor pooled, Tensor weight, Tensor scale, Tensor slope, Tensor level, Tensor values, "
    "bool values_too) -> (Tensor pooled, Tensor weight, Tensor slope, Tensor level, Tensor values)",
)
def _fake_backward(
    grad: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor,
    slope: Tensor,
    level: Tensor,
    values: Tensor,
    values_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_values = values.new_empty(values.shape if values_too else 0)
    return (
        pooled.new_empty(pooled.shape),
        weight.new_empty(weight.shape),
        slope.new_empty(slope.shape),
        level.new_empty(level.shape),
        of_values,
    )


_library.register_autograd("linear_shapley_errors", LinearShapleyErrors)
_library.register_autograd("linear_shapley_errors_backward", LinearShapleyErrorsBackward)


def _check_head(op: str, features: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _checks.check_tensor(op, "weight", weight, "(K, L)", 2)
    _checks.check_device(op, "weight", weight, features)
    if weight.shape[1] != features.shape[2]:
        _checks.fail(op, "weight", f"(K, L) with L = {features.shape[2]} like `features`", weight)
    if bias is None:
        return
    _checks.check_tensor(op, "bias", bias, "(K,)", 1)
    _checks.check_device(op, "bias", bias, features)
    if bias.shape[0] != weight.shape[0]:
        _checks.fail(op, "bias", f"(K,) with K = {weight.shape[0]} like `weight`", bias)
