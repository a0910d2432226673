"""KernelSHAP: a regression on sampled coalitions."""

from __future__ import annotations

import math
import time
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fastshap_kernels import KernelShapEstimate, kernel_shap, pack_bits, sample_coalitions
from fastshap_kernels._checks import check_count, check_flag, fail

from .._checks import ROUNDING, check_images, check_sampled_game
from .._modes import evaluating
from .base import ReferenceValues, bar_of_coalitions, values_of

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier

_OP = "kernel_shap_values"
# Standard errors are estimates themselves: a little more than they ask for saves a round.
_MARGIN = 1.05
# Few coalitions say little about how many are needed; the least number that determines φ gives infinite errors.
_LARGEST_GROWTH = 4.0


def kernel_shap_values(
    model: SelfExplainingClassifier,
    images: Tensor,
    coalitions: int = 4096,
    seed: int = 0,
    *,
    relative_error: float | None = None,
    most: int = 262_144,
    batch: int = 65536,
    progress: bool = False,
) -> ReferenceValues:
    """Shapley values of every image estimated from paired random coalitions, in evaluation mode.

    With `relative_error`, more and more coalitions are drawn until every image's error is small beside its spread. An
    image has converged when the root of its mean squared standard error (over players and classes) is at most
    `relative_error` of the root of its mean (φ − mean φ)², or of what float32 can tell apart. Errors fall with the
    square root of the number of coalitions, which says how many to draw next; those drawn before are kept.

    Args:
        model: a SelfExplainingClassifier, or a module with its `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as in training.
        coalitions: M, coalitions per image; the standard errors fall with its square root. With `relative_error` the
            first number, and what the number grows by; even.
        seed: of the coalitions; every image has its own, the same whatever images stand beside it in the order.
        relative_error: of each image, above 0, such as 0.02; None for as many coalitions as `coalitions` says.
        most: with `relative_error`, coalitions per image at most; even. The regression holds several float64 (most, P)
            at once.
        batch: coalitions handed to the model at once; it cuts them to what memory holds.
        progress: show a progress bar.

    Returns:
        `ReferenceValues` with standard errors; with `relative_error`, `converged` says for which images they are small
        enough.

    Raises:
        ValueError: for a number out of range, too few coalitions to determine P values, or no image.

    Deterministic: as the model is; the coalitions follow from `seed`.

    Source: Lundberg and Lee (2017); Covert and Lee (2021) for pairs and for stopping by the standard error.

    Example:
        >>> found = fv.kernel_shap_values(model, images, coalitions=64)
        >>> found.phi.shape, found.standard_error.shape, found.evaluations
        (torch.Size([4, 9, 10]), torch.Size([4, 9, 10]), 264)
    """
    players = check_sampled_game(_OP, model)
    check_images(_OP, images)
    coalitions = check_count(_OP, "coalitions", coalitions, 2, 2**31 - 2)
    seed = check_count(_OP, "seed", seed, 0, 2**64 - 1)
    batch = check_count(_OP, "batch", batch, 1, 2**31 - 1)
    check_flag(_OP, "progress", progress)
    if relative_error is not None:
        return _until_converged(model, images, relative_error, coalitions, most, seed, batch, progress)
    start = time.perf_counter()
    ends = pack_bits(torch.tensor([False, True], device=images.device).view(1, 2, 1).expand(1, 2, players))
    rows = []
    with evaluating(model), bar_of_coalitions("KernelSHAP", len(images) * (coalitions + 2), progress) as bar:
        for b, image in enumerate(images.split(1)):
            offset = b * coalitions
            bits = sample_coalitions(1, coalitions, players, seed=seed, offset=offset, device=images.device)
            values = values_of(_OP, model, image, torch.cat([ends, bits], 1), batch, bar)
            null, grand = values[0], values[1]
            estimate = estimate_of(_OP, bits, values[2:], null, grand, players)
            rows.append((estimate.phi[0], estimate.standard_error[0], null, grand))
    phi, standard_error, null, grand = (torch.stack(column) for column in zip(*rows, strict=True))
    evaluations = len(images) * (coalitions + 2)
    return ReferenceValues(phi, standard_error, null, grand, evaluations, time.perf_counter() - start)


def _until_converged(
    model: SelfExplainingClassifier,
    images: Tensor,
    relative_error: float,
    coalitions: int,
    most: int,
    seed: int,
    batch: int,
    progress: bool,
) -> ReferenceValues:
    is_number = isinstance(relative_error, Real) and not isinstance(relative_error, bool)
    if not is_number or not 0 < relative_error < math.inf:
        fail(_OP, "relative_error", "a number above 0, or None", relative_error)
    most = check_count(_OP, "most", most, coalitions, 2**31 - 2, "It is at least `coalitions`.")
    for name, number in (("coalitions", coalitions), ("most", most)):
        if number % 2:
            fail(_OP, name, "even, as coalitions come in pairs", number)
    start = time.perf_counter()
    rows = []
    with evaluating(model), bar_of_coalitions("KernelSHAP", None, progress) as bar:
        for b, image in enumerate(images.split(1)):
            rows.append(_converge(model, image, relative_error, coalitions, most, seed, b * most, batch, bar))
    phi, error, null, grand, converged = (torch.stack(column) for column in list(zip(*rows, strict=True))[:5])
    evaluations = sum(row[5] for row in rows)
    return ReferenceValues(phi, error, null, grand, evaluations, time.perf_counter() - start, converged)


def _converge(
    model: SelfExplainingClassifier,
    image: Tensor,
    relative_error: float,
    coalitions: int,
    most: int,
    seed: int,
    offset: int,
    batch: int,
    bar: tqdm,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """φ (P, K), its standard error, v(∅) and v(N) (K,), whether it converged, and evaluations, of an image (1, …)."""
    players = model.players
    bits = pack_bits(torch.tensor([False, True], device=image.device).view(1, 2, 1).expand(1, 2, players))
    null, grand = ends = values_of(_OP, model, image, bits, batch, bar)
    bits, values = bits[:, :0], ends[:0]
    wanted = coalitions
    while True:
        done = bits.shape[1]
        more = sample_coalitions(1, wanted - done, players, seed=seed, offset=offset + done, device=image.device)
        bits = torch.cat([bits, more], 1)
        values = torch.cat([values, values_of(_OP, model, image, more, batch, bar)])
        estimate = estimate_of(_OP, bits, values, null, grand, players)
        phi, error = estimate.phi[0], estimate.standard_error[0]
        noise = float(error.square().mean().sqrt())
        spread = float((phi - phi.mean()).square().mean().sqrt())
        allowed = max(relative_error * spread, ROUNDING * float(values.abs().max()))
        if noise <= allowed or wanted == most:
            return phi, error, null, grand, torch.tensor(noise <= allowed, device=image.device), wanted + 2
        growth = min(_LARGEST_GROWTH, _MARGIN * (noise / allowed) ** 2)
        wanted = min(most, coalitions * math.ceil(wanted * growth / coalitions))


def estimate_of(op: str, bits: Tensor, values: Tensor, null: Tensor, grand: Tensor, players: int) -> KernelShapEstimate:
    """`kernel_shap` of one image: bits (1, M, W), values (M, K), null and grand (K,)."""
    try:
        return kernel_shap(bits, values[None], null, grand[None], players=players)
    except ValueError as error:  # the values are finite: these coalitions are too few
        raise ValueError(
            f"{op}: argument `coalitions` must be a number of coalitions that determine {players} Shapley values, but "
            f"it is {bits.shape[1]}. Pass {8 * players} or more."
        ) from error
