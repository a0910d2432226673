"""How far an explanation can be believed, and what a few coalitions make of it.

The explanation φ̂ is a prior, coalitions are data. Of a complementary pair (S, Sᶜ), with z the indicator of S,

    y = (v(S) − v(Sᶜ))/2 − (z − ½)·φ̂ = (z − ½)·δ + noise

holds for δ = φ − φ̂, the error of the explanation: even interactions cancel within a pair, and noise is what odd ones
of three and more patches leave. Before any data δ ~ N(0, s²(I − 11ᵀ/P)), since explanations add up to the logits, and
the noise ~ N(0, λs²). Both are found once, from images that the explainer was not trained on, by their likelihood; then
the posterior is that of a linear regression. One image is harder than another: its scale is a variable too (a
multivariate t), so that the residuals of an image's own coalitions widen or narrow its errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from fastshap_kernels import sample_coalitions, unpack_bits
from fastshap_kernels._checks import check_count, fail

from .._checks import check_images, check_sampled_game
from .._modes import evaluation_mode
from .._runtime.precision import at_least_float32
from ..games.coalitions import Coalitions

#: λ and ν that are tried.
_RATIOS = torch.logspace(-3, 4, 71, dtype=torch.float64)
_FREEDOMS = (3.0, 4.0, 5.0, 6.0, 8.0, 11.0, 16.0, 23.0, 32.0, 64.0, 1024.0)
#: A variance of nothing: where every coalition is explained to the last digit.
_LEAST = 1e-30


@dataclass(frozen=True)
class Calibration:
    """What is known of an explainer's errors before any coalition of an image is evaluated.

    Args:
        ratio: λ, the variance of the noise over that of a Shapley value's error.
        freedom: ν > 2, how alike images are: errors of an image are t-distributed with ν degrees of freedom.
        variance: (K,) s², of the error of a Shapley value, in squared logits.

    Raises:
        ValueError: for numbers out of range.

    Example:
        >>> model.calibration = fv.Calibration(ratio=0.5, freedom=8, variance=[0.01] * 10)
        >>> model.explain(images).standard_error.shape
        torch.Size([4, 9])
    """

    ratio: float
    freedom: float
    variance: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "variance", tuple(self.variance))
        numbers = (self.ratio, self.freedom - 2, *self.variance)
        if not all(isinstance(x, float | int) and math.isfinite(x) and x >= 0 for x in numbers) or self.ratio == 0:
            fail("Calibration", "ratio, freedom and variance", "finite numbers above 0, 2 and 0", numbers[:8])

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Calibration:
        """What `as_dict` gave."""
        try:
            return cls(**found)
        except TypeError as error:
            raise ValueError(f"Argument `calibration` describes none: {error}") from error

    def expected_error(self, players: int) -> Tensor:
        """(K,) float32: `Explanation.expected_error` of an explanation that no coalition refines, of each class."""
        return torch.tensor(self.variance, dtype=torch.float64).mul(players - 1).sqrt().float()

    def as_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"variance": list(self.variance)}


def calibration_of(found: Calibration | Mapping[str, Any] | None) -> Calibration | None:
    """As it is given: one, its dict, or none."""
    return Calibration.from_dict(found) if isinstance(found, Mapping) else found


def checked_evaluations(evaluations: object, seed: object, players: int) -> tuple[int, int]:
    """An even number of coalitions, and their seed."""
    count = check_count("explain", "evaluations", evaluations, 0, 2**31 - 2)
    if count % 2:
        fail("explain", "evaluations", "even, as coalitions come in pairs", count)
    if count and players == 1:
        fail("explain", "evaluations", "0 for a model of one player, whose value is exact", count)
    return count, check_count("explain", "seed", seed, 0, 2**64 - 1)


@torch.no_grad()
def calibrate(model: Any, images: Tensor, coalitions: int, seed: int) -> None:
    """As `SelfExplainingClassifier.calibrate`."""
    coalitions = check_count("calibrate", "coalitions", coalitions, 4, 2**31 - 2)
    if coalitions % 2:
        fail("calibrate", "coalitions", "even, as coalitions come in pairs", coalitions)
    check_sampled_game("calibrate", model)
    check_images("calibrate", images)
    bits = sample_coalitions(len(images), coalitions, model.players, seed=seed, device=images.device)
    drawn = Coalitions(bits, model.players, paired=True)
    with evaluation_mode(model):
        model.calibration = calibrated(model.shapley_values(images)[0], drawn, model.coalition_values(images, drawn))


def calibrated(phi: Tensor, coalitions: Coalitions, values: Tensor) -> Calibration:
    """The calibration of an explainer by its explanations of images that it was not trained on.

    Args:
        phi: (B, P, K) explanations.
        coalitions: M of every image, in pairs.
        values: (B, M, K) v(S).
    """
    design, left = _regression(phi, coalitions, values)
    pairs = left.shape[1]
    spread, basis = torch.linalg.eigh(design @ design.mT)
    spread = spread.clamp_min(0)
    along = (basis.mT @ left).square()  # (B, pairs, K)
    best = (-math.inf, _RATIOS[0], left.new_zeros(left.shape[2]))
    for ratio in _RATIOS:
        noise = (spread + ratio).unsqueeze(2)
        variance = (along / noise).mean((0, 1)).clamp_min(_LEAST)
        fit = -0.5 * float(left.shape[0] * pairs * variance.log().sum() + left.shape[2] * noise.log().sum())
        if fit > best[0]:
            best = (fit, ratio, variance)
    _, ratio, variance = best
    size = (along / (spread + ratio).unsqueeze(2)).sum(1) / variance  # (B, K), pairs in the mean

    def likelihood(freedom: float) -> float:
        whole, half = (freedom + pairs) / 2, freedom / 2
        constant = math.lgamma(whole) - math.lgamma(half) - pairs / 2 * math.log(freedom - 2)
        return float((constant - whole * torch.log1p(size / (freedom - 2))).sum())

    return Calibration(float(ratio), max(_FREEDOMS, key=likelihood), tuple(variance.tolist()))


def with_errors(
    model: Any, images: Tensor, phi: Tensor, chosen: Tensor | None, evaluations: int, seed: int
) -> tuple[Tensor, Tensor | None]:
    """An explanation (B, P, K), or (B, P) of a class of each image, refined by coalitions; and its standard errors.

    All images have the same coalitions, so that an image's explanation does not depend on its place in the batch.
    """
    known = model.calibration
    if known is None:
        if evaluations:
            remedy = "Call model.calibrate(images) first, with images that it was not trained on."
            fail("explain", "evaluations", "0 for a model without a calibration", evaluations, remedy)
        return phi, None
    whole = phi if chosen is None else phi.unsqueeze(2)
    variance = torch.tensor(known.variance, dtype=torch.float64, device=phi.device)
    variance = variance if chosen is None else variance[chosen].unsqueeze(1)
    if not evaluations:
        error = (variance * (1 - 1 / phi.shape[1])).sqrt().unsqueeze(-2).expand_as(whole).to(phi.dtype)
        return phi, error.reshape(phi.shape)
    bits = sample_coalitions(1, evaluations, model.players, seed=seed, device=images.device)
    of_all = Coalitions(bits.expand(len(images), -1, -1).contiguous(), model.players, paired=True)
    values = model.coalition_values(images, of_all)
    if chosen is not None:
        values = values.gather(2, chosen[:, None, None].expand(-1, evaluations, 1))
    whole, error = refined(whole, Coalitions(bits, model.players, paired=True), values, known, variance)
    return whole.reshape(phi.shape), error.reshape(phi.shape)


def refined(
    phi: Tensor, coalitions: Coalitions, values: Tensor, calibration: Calibration, variance: Tensor
) -> tuple[Tensor, Tensor]:
    """The explanation given an image's coalitions, and the standard error of each of its Shapley values.

    Args:
        phi: (B, P, C) explanations of some classes, or of all.
        coalitions: M of every image, or the same of all (a batch of 1), in pairs.
        values: (B, M, C) v(S) of these classes.
        calibration: of the explainer.
        variance: (B, C) or (C,), s² of these classes.

    Returns:
        values (B, P, C) with the sums of `phi`, and their standard errors (B, P, C).
    """
    design, left = _regression(phi, coalitions, values)
    ratio, freedom, players = calibration.ratio, calibration.freedom, phi.shape[1]
    identity = torch.eye(players, dtype=design.dtype, device=design.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(design.mT @ design + ratio * identity))
    error = inverse @ (design.mT @ left)
    error = error - error.mean(1, keepdim=True)
    # Of δ, whose sum is known to be 0: the part of `inverse` along 1 is 1 / λ.
    share = (inverse.diagonal(dim1=1, dim2=2) - 1 / (ratio * players)).clamp_min(0) * ratio
    variance = variance.to(design)
    size = (left * (left - design @ error)).sum(1).clamp_min(0) / ratio / variance.clamp_min(_LEAST)
    scale = (freedom - 2 + size) / (freedom - 2 + left.shape[1])
    deviation = (share.unsqueeze(2) * (variance * scale).unsqueeze(1)).sqrt()
    return (phi.double() + error).to(phi.dtype), deviation.to(phi.dtype)


def _regression(phi: Tensor, coalitions: Coalitions, values: Tensor) -> tuple[Tensor, Tensor]:
    """float64: z − ½ less its mean (B, M/2, P), and y (B, M/2, C)."""
    present = unpack_bits(coalitions.bits[:, ::2], phi.shape[1]).to(phi.device, torch.float64) - 0.5
    values = at_least_float32(values).double()
    left = (values[:, ::2] - values[:, 1::2]) / 2 - present @ phi.double()
    return present - present.mean(2, keepdim=True), left
