"""KernelSHAP: a regression on sampled coalitions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastshap_kernels import KernelShapEstimate, kernel_shap, pack_bits, sample_coalitions
from fastshap_kernels._checks import check_count

from .._checks import check_images, check_sampled_game
from .._modes import evaluating
from .base import ReferenceValues, progress_bar, values_of

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier


def kernel_shap_values(
    model: SelfExplainingClassifier,
    images: Tensor,
    coalitions: int = 4096,
    seed: int = 0,
    *,
    batch: int = 65536,
    progress: bool = False,
) -> ReferenceValues:
    """Shapley values of every image estimated from paired random coalitions, in evaluation mode.

    Args:
        model: a SelfExplainingClassifier, or a module with its `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as in training.
        coalitions: M, coalitions per image; the standard errors fall with its square root.
        seed: of the coalitions; every image has its own, the same whatever images stand beside it in the order.
        batch: coalitions handed to the model at once; it cuts them to what memory holds.
        progress: show a progress bar.

    Returns:
        `ReferenceValues` with standard errors.

    Raises:
        ValueError: for too few coalitions to determine P values, or no image.

    Deterministic: as the model is; the coalitions follow from `seed`.

    Source: Lundberg and Lee (2017); Covert and Lee (2021) for pairs.
    """
    op = "kernel_shap_values"
    players = check_sampled_game(op, model)
    check_images(op, images)
    coalitions = check_count(op, "coalitions", coalitions, 2, 2**31 - 1)
    seed = check_count(op, "seed", seed, 0, 2**64 - 1)
    batch = check_count(op, "batch", batch, 1, 2**31 - 1)
    start = time.perf_counter()
    ends = pack_bits(torch.tensor([False, True], device=images.device).view(1, 2, 1).expand(1, 2, players))
    rows = []
    with evaluating(model), progress_bar("KernelSHAP", len(images) * (coalitions + 2), progress) as bar:
        for b, image in enumerate(images.split(1)):
            offset = b * coalitions
            bits = sample_coalitions(1, coalitions, players, seed=seed, offset=offset, device=images.device)
            values = values_of(op, model, image, torch.cat([ends, bits], 1), batch, bar)
            null, grand = values[0], values[1]
            estimate = estimate_of(op, bits, values[2:], null, grand, players)
            rows.append((estimate.phi[0], estimate.standard_error[0], null, grand))
    phi, standard_error, null, grand = (torch.stack(column) for column in zip(*rows, strict=True))
    evaluations = len(images) * (coalitions + 2)
    return ReferenceValues(phi, standard_error, null, grand, evaluations, time.perf_counter() - start)


def estimate_of(op: str, bits: Tensor, values: Tensor, null: Tensor, grand: Tensor, players: int) -> KernelShapEstimate:
    """`kernel_shap` of one image: bits (1, M, W), values (M, K), null and grand (K,)."""
    try:
        return kernel_shap(bits, values[None], null, grand[None], players=players)
    except ValueError as error:  # the values are finite: these coalitions are too few
        raise ValueError(
            f"{op}: argument `coalitions` must be a number of coalitions that determine {players} Shapley values, but "
            f"it is {bits.shape[1]}. Pass {8 * players} or more."
        ) from error
