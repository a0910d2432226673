"""KernelSHAP on as many coalitions as each image needs: reference values above the reach of exhaustion."""

from __future__ import annotations

import math
import time
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from fastshap_kernels import pack_bits, sample_coalitions
from fastshap_kernels._checks import check_count, fail

from .._checks import ROUNDING, check_images, check_sampled_game
from .._modes import evaluating
from .base import ReferenceValues, values_of
from .kernel_shap import estimate_of

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier

# Standard errors are estimates themselves: a little more than they ask for saves a round.
_MARGIN = 1.05
# Few coalitions say little about how many are needed; the least number that determines φ gives infinite errors.
_LARGEST_GROWTH = 4.0


def converged_values(
    model: SelfExplainingClassifier,
    images: Tensor,
    *,
    relative_error: float = 0.02,
    coalitions: int = 4096,
    most: int = 262_144,
    seed: int = 0,
    batch: int = 65536,
    progress: bool = False,
) -> ReferenceValues:
    """KernelSHAP with more and more paired coalitions until every image's error is small beside its spread.

    An image has converged when the root of its mean squared standard error (over players and classes) is at most
    `relative_error` of the root of its mean (φ − mean φ)², or of what float32 can tell apart. Errors fall with the
    square root of the number of coalitions, which says how many to draw next; those drawn before are kept.

    Args:
        model: a SelfExplainingClassifier, or a module with its `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as in training.
        relative_error: of each image, above 0.
        coalitions: the first number of coalitions per image, and what their number grows by; even.
        most: coalitions per image at most; even. The regression holds several float64 (most, P) at once.
        seed: of the coalitions; every image has its own, the same whatever images follow it.
        batch: coalitions handed to the model at once; it cuts them to what memory holds.
        progress: show a progress bar.

    Returns:
        `ReferenceValues` with standard errors; `converged` says for which images they are small enough.

    Raises:
        ValueError: for a number out of range, too few coalitions to determine P values, or no image.

    Deterministic: as the model is; the coalitions follow from `seed`.

    Source: Lundberg and Lee (2017); Covert and Lee (2021) for pairs and for stopping by the standard error.
    """
    op = "converged_values"
    check_sampled_game(op, model)
    check_images(op, images)
    is_number = isinstance(relative_error, Real) and not isinstance(relative_error, bool)
    if not is_number or not 0 < relative_error < math.inf:
        fail(op, "relative_error", "a number above 0", relative_error)
    coalitions = check_count(op, "coalitions", coalitions, 2, 2**31 - 2)
    most = check_count(op, "most", most, coalitions, 2**31 - 2, "It is at least `coalitions`.")
    seed = check_count(op, "seed", seed, 0, 2**64 - 1)
    for name, number in (("coalitions", coalitions), ("most", most)):
        if number % 2:
            fail(op, name, "even, as coalitions come in pairs", number)
    batch = check_count(op, "batch", batch, 1, 2**31 - 1)
    start = time.perf_counter()
    rows = []
    bar = tqdm(desc="converged KernelSHAP", unit=" coalitions", unit_scale=True, disable=not progress, leave=False)
    with evaluating(model), bar:
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
    null, grand = ends = values_of("converged_values", model, image, bits, batch, bar)
    bits, values = bits[:, :0], ends[:0]
    wanted = coalitions
    while True:
        done = bits.shape[1]
        more = sample_coalitions(1, wanted - done, players, seed=seed, offset=offset + done, device=image.device)
        bits = torch.cat([bits, more], 1)
        values = torch.cat([values, values_of("converged_values", model, image, more, batch, bar)])
        estimate = estimate_of("converged_values", bits, values, null, grand, players)
        phi, error = estimate.phi[0], estimate.standard_error[0]
        noise = float(error.square().mean().sqrt())
        spread = float((phi - phi.mean()).square().mean().sqrt())
        allowed = max(relative_error * spread, ROUNDING * float(values.abs().max()))
        if noise <= allowed or wanted == most:
            return phi, error, null, grand, torch.tensor(noise <= allowed, device=image.device), wanted + 2
        growth = min(_LARGEST_GROWTH, _MARGIN * (noise / allowed) ** 2)
        wanted = min(most, coalitions * math.ceil(wanted * growth / coalitions))
