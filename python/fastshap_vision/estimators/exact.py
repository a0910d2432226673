"""Exact Shapley values, from all coalitions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastshap_kernels import exact_shapley
from fastshap_kernels._checks import check_count, check_flag, fail

from .._checks import check_game, check_images
from .._modes import evaluating
from .base import ReferenceValues, bar_of_coalitions, values_of

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier

_EXACT_PLAYERS = 20
_IMAGES_TOGETHER = 32


def exact_values(
    model: SelfExplainingClassifier, images: Tensor, *, batch: int = 65536, progress: bool = False
) -> ReferenceValues:
    """Exact Shapley values from all 2^P coalitions of every image, in evaluation mode.

    phi[p] = Σ_{S ∌ p} |S|! (P − |S| − 1)! / P! · (v(S ∪ {p}) − v(S)), summed in float64. Comfortable to P = 16 (65 536
    coalitions an image), possible to P = 20 (1 048 576). Memory beyond the model's: 2^P · K float64 numbers.

    Args:
        model: a SelfExplainingClassifier, or a module with its `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as in training.
        batch: coalitions handed to the model at once, the smaller first; the model cuts them to what memory holds.
        progress: show a progress bar.

    Returns:
        `ReferenceValues` without standard errors.

    Raises:
        ValueError: for more than 20 players, or no image.

    Source: Shapley, A value for n-person games (1953).

    Example:
        >>> fv.exact_values(model, images[:1]).phi.shape
        torch.Size([1, 9, 10])
    """
    players = check_game("exact_values", "model", model, "coalition_values")
    if players > _EXACT_PLAYERS:
        remedy = (
            f'That takes 2^{players} coalitions an image. Estimate with kernel_shap_values (reference="kernel_shap").'
        )
        fail("exact_values", "model.players", f"at most {_EXACT_PLAYERS}", players, remedy)
    check_images("exact_values", images)
    batch = check_count("exact_values", "batch", batch, 1, 2**31 - 1)
    check_flag("exact_values", "progress", progress)
    start = time.perf_counter()
    order = _coalitions_by_size(players, images.device)
    bits = order.to(torch.int32).view(1, -1, 1)
    rows = []
    with evaluating(model), bar_of_coalitions("exact Shapley values", len(images) * len(order), progress) as bar:
        for image in images.split(1):
            ordered = values_of("exact_values", model, image, bits, batch, bar)
            values = torch.empty_like(ordered).index_copy_(0, order, ordered)
            rows.append((exact_shapley(values), values[0], values[-1]))
    phi, null, grand = (torch.stack(column) for column in zip(*rows, strict=True))
    return ReferenceValues(phi, None, null, grand, len(images) * len(order), time.perf_counter() - start)


def _coalitions_by_size(players: int, device: torch.device) -> Tensor:
    """int64 (2^P,): every coalition as a number, player p being bit p, the smaller coalitions first."""
    numbers = torch.arange(2**players, device=device)
    sizes = torch.zeros_like(numbers)
    for player in range(players):
        sizes += numbers >> player & 1
    return sizes.argsort(stable=True)
