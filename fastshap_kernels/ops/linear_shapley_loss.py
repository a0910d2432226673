"""The Shapley regression loss of Shapley values that are linear in features, without making them.

There is no kernel here beyond coalition_sum's: once the features are pooled by coalition, what is left is one
GEMM and a residual of (B, M, K), and so is its backward pass: residual × pooled features for the weight,
residual × weight for the pooled features, and coalition_sum's backward to scatter those to the players.
"""

from __future__ import annotations

from torch import Tensor

from .. import _checks
from ..reference import linear_shapley_loss as reference
from .coalition_sum import check_features, select_pool
from .shapley_regression_loss import prepare_game


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
    Computed in float32 (float64 where features or values are float64), also under autocast.

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

    Deterministic: yes, forward and backward.
    """
    op = "linear_shapley_loss"
    check_features(op, "features", features, "(B, P, L)")
    _check_head(op, features, weight, bias)
    _checks.check_bits(op, bits, features.shape[1], features)
    target, gain, weights = prepare_game(
        op, features, weight.shape[0], bits, values, null, grand, weights, normalization, reduction
    )
    pool = select_pool(op, features, bits, backend)
    return reference.linear_shapley_loss(features, weight, bias, bits, target, gain, weights, reduction, pool)


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
