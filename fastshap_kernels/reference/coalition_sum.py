"""Sum of the features of the present players, for every coalition."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .pack_bits import unpack_bits

#: Any backend's coalition_sum: features (B, P, L), bits (B, M, W), dtype of the sums → (B, M, L).
Pool = Callable[[Tensor, Tensor, torch.dtype], Tensor]


def coalition_sum(features: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """features (B, P, L), bits (B, M, W) → (B, M, L)."""
    accumulate = torch.promote_types(torch.promote_types(features.dtype, dtype), torch.float32)
    present = unpack_bits(bits, features.shape[1]).to(accumulate)
    features = features.to(accumulate)
    finite = features.isfinite()
    # Autocast would round the sums to half precision.
    with torch.autocast("cpu" if features.is_meta else features.device.type, enabled=False):
        sums = torch.bmm(present, torch.where(finite, features, 0))
        # Multiplied by 0, an absent player's NaN would stay NaN: a present one's is put back here.
        spoiled = torch.bmm(present, finite.logical_not().to(accumulate)) > 0
    return torch.where(spoiled, torch.nan, sums).to(dtype)
