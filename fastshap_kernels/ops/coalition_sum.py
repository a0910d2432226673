"""Sum of the features of the present players, for every coalition."""

from __future__ import annotations

from torch import Tensor

from .. import _backend, _checks
from ..reference import coalition_sum as reference


def coalition_sum(features: Tensor, bits: Tensor, *, backend: str | None = None) -> Tensor:
    """Sums the features of the present players, for every coalition.

    out[b, m] = Σ_{p ∈ S(b, m)} features[b, p], summed in float32 (float64 for float64).

    Args:
        features (float16, bfloat16, float32, float64): (B, P, L), finite; 1 ≤ P ≤ 4096.
        bits (int32): (B, M, ceil(P / 32)) coalitions of the P players.
        backend: "reference" or "cpu"; default the best available.

    Returns:
        (B, M, L) in the dtype of `features`; the empty coalition's sum is 0. Gradients flow to `features`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, forward and backward.
    """
    op = "coalition_sum"
    _checks.check_tensor(op, "features", features, "(B, P, L)", 3)
    _checks.check_count(op, "features.shape[1]", int(features.shape[1]), 1, _checks.MAX_PLAYERS)
    _checks.check_bits(op, bits, features.shape[1], features)
    _backend.select(op, features.device, backend, compiled=False)
    return reference.coalition_sum(features, bits, features.dtype)
