"""The heads: what turns features of patches into Shapley values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastshap_kernels import coalition_sum, linear_shapley_loss

from ..games.coalitions import Coalitions


def loss_of_classes(
    classes: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coalitions: Coalitions,
    values: Tensor,
    null: Tensor,
    grand: Tensor | None = None,
) -> Tensor:
    """`linear_shapley_loss` of some classes of each image, (B, k), or of all; normalised additively to a `grand`."""
    if classes is None:
        normalization = "none" if grand is None else "additive"
        return linear_shapley_loss(
            features, weight, bias, coalitions.bits, values, null, grand, normalization=normalization
        )
    with torch.autocast(features.device.type, enabled=False):  # differences of near numbers
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, values, null = features.to(dtype), values.to(dtype), null.to(dtype)
        rows, null = weight.to(dtype)[classes], null[classes].unsqueeze(1)
        size = coalitions.sizes.unsqueeze(2).to(dtype)
        found = coalition_sum(features, coalitions.bits) @ rows.mT
        if bias is not None:
            found = found + size * bias.to(dtype)[classes].unsqueeze(1)
        if grand is not None:
            missing = grand.to(dtype).gather(1, classes).unsqueeze(1) - null - features.sum(1, keepdim=True) @ rows.mT
            found = found + size / features.shape[1] * missing
        wanted = values.gather(2, classes.unsqueeze(1).expand(-1, values.shape[1], -1))
        return (wanted - null - found).square().mean()


class MergedFeatures(nn.Module):
    """The last features plus a linear map of the normalised earlier ones: (B, P, L + ΣC) → (B, P, L).

    Args:
        width: L, of the last features, which come first.
        earlier_widths: C of each stage before the last.
    """

    def __init__(self, width: int, earlier_widths: list[int]) -> None:
        super().__init__()
        self.widths = [width, *earlier_widths]
        self.norms = nn.ModuleList(nn.LayerNorm(earlier) for earlier in earlier_widths)
        self.linear = nn.Linear(sum(earlier_widths), width)

    def forward(self, features: Tensor) -> Tensor:
        last, *earlier = features.split(self.widths, -1)
        normed = [norm(stage) for norm, stage in zip(self.norms, earlier, strict=True)]
        return last + self.linear(torch.cat(normed, -1))
