"""Reference values, and the coalition values that every estimator asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from .._checks import check_finite, check_values
from .._runtime.progress import progress_bar

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier


class ReferenceValues(NamedTuple):
    """Shapley values to compare with, float64: by exhaustion, or estimated with standard errors.

    Args:
        phi: (B, P, K).
        standard_error: (B, P, K), None where phi is exact.
        null, grand: (B, K), v(∅) and v(N).
        evaluations: coalitions evaluated, over all images.
        seconds: wall time.
        converged (bool): (B,), with `relative_error`: whether the errors are as small.

    Example:
        >>> found = fv.exact_values(model, images[:1])
        >>> torch.allclose(found.phi.sum(1), found.grand - found.null), found.evaluations
        (True, 512)
    """

    phi: Tensor
    standard_error: Tensor | None
    null: Tensor
    grand: Tensor
    evaluations: int
    seconds: float
    converged: Tensor | None = None


def values_of(op: str, model: SelfExplainingClassifier, image: Tensor, bits: Tensor, batch: int, bar: tqdm) -> Tensor:
    """float64 (M, K): v of the coalitions (1, M, W) of one image."""
    parts = []
    for part in bits.split(batch, 1):
        values = model.coalition_values(image, part)
        check_values(op, values, 1, part.shape[1])
        parts.append(values[0].double())
        bar.update(part.shape[1])
    joined = torch.cat(parts)
    check_finite(op, "v(S)", joined)
    return joined


def bar_of_coalitions(title: str, coalitions: int | None, progress: bool) -> tqdm:
    return progress_bar(progress, total=coalitions, desc=title, unit=" coalitions", unit_scale=True, leave=False)
