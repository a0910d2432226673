"""How close a model's own Shapley values are to the true ones: exact values, KernelSHAP estimates, and metrics.

That Σ_p Φ_p = f(x) − v(∅) holds proves nothing: it holds by construction. These metrics compare value by value.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastshap_kernels._checks import check_count, check_flag, fail

from .._checks import ROUNDING, check_finite, check_game, check_images
from .._modes import evaluating
from ..estimators.base import ReferenceValues
from ..estimators.exact import _IMAGES_TOGETHER, exact_values
from ..estimators.kernel_shap import kernel_shap_values
from ..explanations.explanation import relative_efficiency_gap
from ._statistics import mean_and_error

if TYPE_CHECKING:
    from ..models.self_explaining import SelfExplainingClassifier


@dataclass(frozen=True)
class Fidelity:
    """Agreement of a model's Shapley values Φ with reference values φ over B images, P players and K classes.

    The predicted class is the one with the largest v(N). ± in the table is one standard error over the images.

    Args:
        reference: "exact" or "kernel_shap".
        images, players, classes: B, P, K.
        r2: 1 − Σ (Φ − φ)² / Σ (φ − mean φ)² over all entries. NaN for a game with nothing to explain: where φ differs
            from its mean by no more than float32 rounding, 1e-6 of the image's largest |φ|, |v(N)| or |v(∅)|.
        r2_beyond_even: 1 − Σ (Φ − φ)² / Σ (φ − (v(N) − v(∅))/P)²: 0 for the even split, which the logits alone give.
            NaN where φ is the even split, up to the same rounding.
        r2_predicted: as `r2`, over the entries of each image's predicted class.
        correlation: Pearson over the players, for every class: K means over the images. Where φ is the same for all
            players of an image, up to the same rounding, there is none, and the image is left out (NaN when none is
            left); where only Φ is, it counts as 0.
        correlation_predicted, correlation_predicted_standard_error: the same for the predicted class.
        correlated_images: how many of the images have a correlation for their predicted class.
        mean_squared_error, mean_squared_error_standard_error: mean of (Φ − φ)², in the squared unit of v.
        efficiency_gap: largest |Σ_p Φ_p + v(∅) − v(N)|, relative to the image's largest |v(N)| or |v(∅)|.
        reference_noise: root of mean squared standard error over mean (φ − mean φ)²; 0 for exact values, NaN where
            `r2` is.
        r2_attainable: the `r2` that exact values are expected to score against this reference, 1 − noise².
        evaluations: coalitions that the reference took, over all images.
        seconds: wall time that the reference took.

    Example:
        >>> found = fv.fidelity(model, images[:1])
        >>> found.reference, found.players, found.classes, found.evaluations
        ('exact', 9, 10, 512)
    """

    reference: str
    images: int
    players: int
    classes: int
    r2: float
    r2_beyond_even: float
    r2_predicted: float
    correlation: tuple[float, ...]
    correlation_predicted: float
    correlation_predicted_standard_error: float
    correlated_images: int
    mean_squared_error: float
    mean_squared_error_standard_error: float
    efficiency_gap: float
    reference_noise: float
    r2_attainable: float
    evaluations: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """JSON-able: what is not defined (NaN) is None."""

        def plain(value: Any) -> Any:
            if isinstance(value, tuple):
                return [plain(item) for item in value]
            return None if isinstance(value, float) and math.isnan(value) else value

        return {name: plain(value) for name, value in asdict(self).items()}

    def __str__(self) -> str:
        defined = [(value, k) for k, value in enumerate(self.correlation) if not math.isnan(value)]
        mean = sum(value for value, _ in defined) / len(defined) if defined else math.nan
        lowest = f"   lowest {min(defined)[0]:.3f}, class {min(defined)[1]}" if defined else ""
        left_out = self.images - self.correlated_images
        without = f"   {left_out} of {self.images} images left out" if left_out else ""
        lines = [
            ("R², all classes", f"{self.r2:.3f}"),
            ("R² beyond the even split", f"{self.r2_beyond_even:.3f}"),
            ("R², predicted class", f"{self.r2_predicted:.3f}"),
            ("correlation, mean of classes", f"{mean:.3f}{lowest}"),
            (
                "correlation, predicted class",
                f"{self.correlation_predicted:.3f} ± {self.correlation_predicted_standard_error:.3f}{without}",
            ),
            ("mean squared error", f"{self.mean_squared_error:.3g} ± {self.mean_squared_error_standard_error:.2g}"),
            ("efficiency gap, relative", f"{self.efficiency_gap:.1e}"),
        ]
        if self.reference_noise:
            lines.append(
                ("noise of the reference", f"{self.reference_noise:.3f}   R² attainable {self.r2_attainable:.3f}")
            )
        lines.append(("evaluations", f"{self.evaluations:,} in {self.seconds:.1f} s"))
        width = max(len(name) for name, _ in lines)
        against = {"exact": "exact Shapley values", "kernel_shap": "KernelSHAP"}[self.reference]
        head = f"Against {against}: {self.images} images, {self.players} players, {self.classes} classes"
        return "\n".join([head, *(f"  {name:<{width}}  {value}" for name, value in lines)])


def fidelity(
    model: SelfExplainingClassifier,
    images: Tensor,
    reference: str | ReferenceValues = "exact",
    coalitions: int = 4096,
    seed: int = 0,
    *,
    batch: int = 65536,
    progress: bool = False,
) -> Fidelity:
    """Compares a model's own Shapley values with exact or KernelSHAP values of the same images.

    Args:
        model: a SelfExplainingClassifier, or a module with its `players`, `shapley_values` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as in training.
        reference: "exact" (P ≤ 20), "kernel_shap", or what exact_values or kernel_shap_values returned for `images`.
        coalitions, seed: of KernelSHAP; see `kernel_shap_values`.
        batch: coalitions handed to the model at once; it cuts them to what memory holds.
        progress: show a progress bar.

    Returns:
        `Fidelity`.

    Raises:
        ValueError: for an unknown reference, one of other images, too many players for exact values, no image, or a
            model whose Shapley values are not finite.

    Deterministic: as the model is, but for `seconds`.

    Example:
        >>> reference = fv.exact_values(model, images[:1])
        >>> fv.fidelity(model, images[:1], reference).r2 <= 1
        True
    """
    check_images("fidelity", images)
    players = check_game("fidelity", "model", model, "coalition_values", "shapley_values")
    coalitions = check_count("fidelity", "coalitions", coalitions, 2, 2**31 - 1)
    seed = check_count("fidelity", "seed", seed, 0, 2**64 - 1)
    batch = check_count("fidelity", "batch", batch, 1, 2**31 - 1)
    check_flag("fidelity", "progress", progress)
    if isinstance(reference, str) and reference == "exact":
        reference = exact_values(model, images, batch=batch, progress=progress)
    elif isinstance(reference, str) and reference == "kernel_shap":
        reference = kernel_shap_values(model, images, coalitions, seed, batch=batch, progress=progress)
    elif not isinstance(reference, ReferenceValues):
        fail("fidelity", "reference", '"exact", "kernel_shap" or ReferenceValues', reference)
    with evaluating(model):
        parts = [model.shapley_values(part)[0] for part in images.split(_IMAGES_TOGETHER)]
    ours = torch.cat(parts).double()
    if ours.ndim != 3 or ours.shape[:2] != (len(images), players):
        fail("fidelity", "model", f"a game whose shapley_values are ({len(images)}, {players}, K)", ours)
    if reference.phi.shape != ours.shape:
        fail("fidelity", "reference", f"of the same images, (B, P, K) = {tuple(ours.shape)}", reference.phi)
    check_finite("fidelity", "the model's Φ", ours)
    check_finite("fidelity", "the reference's φ", reference.phi)
    return _compare(ours, reference.phi.to(ours.device), reference)


def _compare(ours: Tensor, phi: Tensor, reference: ReferenceValues) -> Fidelity:
    """The metrics of Φ (`ours`) against φ (`phi`), both float64 (B, P, K)."""
    null, grand = reference.null.to(ours), reference.grand.to(ours)
    batch, players, classes = ours.shape
    predicted = grand.argmax(1)
    chosen = predicted.view(-1, 1, 1).expand(-1, players, 1)
    even = ((grand - null) / players).unsqueeze(1).expand_as(phi)
    # (B, 1, 1): what float32 can't tell apart in the values that φ is made of.
    largest = torch.stack([phi.abs().amax(1), null.abs(), grand.abs()]).amax((0, 2))
    rounding = ROUNDING * largest.view(-1, 1, 1)
    correlation = _correlation(ours, phi, rounding)
    errors = (ours - phi).square().mean((1, 2))
    noise = 0.0
    if reference.standard_error is not None:
        spread, least = (phi - phi.mean()).square().mean(), rounding.square().mean()
        error = reference.standard_error.square().mean().to(spread.device)
        noise = float((error / spread).sqrt()) if spread > least else math.nan
    correlation_predicted = mean_and_error(correlation.gather(1, predicted.unsqueeze(1)))
    mean_squared_error = mean_and_error(errors.unsqueeze(1))
    return Fidelity(
        reference="exact" if reference.standard_error is None else "kernel_shap",
        images=batch,
        players=players,
        classes=classes,
        r2=_r2(ours, phi, phi.mean(), rounding),
        r2_beyond_even=_r2(ours, phi, even, rounding),
        r2_predicted=_r2(ours.gather(2, chosen), phi.gather(2, chosen), phi.gather(2, chosen).mean(), rounding),
        correlation=tuple(mean_and_error(correlation)[0].tolist()),
        correlation_predicted=float(correlation_predicted[0]),
        correlation_predicted_standard_error=float(correlation_predicted[1]),
        correlated_images=int(correlation.gather(1, predicted.unsqueeze(1)).isfinite().sum()),
        mean_squared_error=float(mean_squared_error[0]),
        mean_squared_error_standard_error=float(mean_squared_error[1]),
        efficiency_gap=relative_efficiency_gap(ours, grand, null),
        reference_noise=noise,
        r2_attainable=1 - noise**2,
        evaluations=reference.evaluations,
        seconds=reference.seconds,
    )


def _r2(ours: Tensor, phi: Tensor, baseline: Tensor, rounding: Tensor) -> float:
    """1 − Σ (ours − φ)² / Σ (φ − baseline)²; NaN where φ is the baseline, up to `rounding` (B, 1, 1)."""
    rest = (phi - baseline).square().sum()
    if rest <= rounding.expand_as(phi).square().sum():
        return math.nan
    return 1 - float((ours - phi).square().sum() / rest)


def _correlation(ours: Tensor, phi: Tensor, rounding: Tensor) -> Tensor:
    """(B, K) Pearson over the players: NaN where φ varies by `rounding` alone, 0 where only ours does."""

    def centred(values: Tensor, rounding: Tensor) -> tuple[Tensor, Tensor]:
        constant = values.amax(1) - values.amin(1) <= rounding.squeeze(2)
        return values - values.mean(1, keepdim=True), constant

    x, x_constant = centred(ours, ROUNDING * ours.abs().amax((1, 2), keepdim=True))
    y, y_constant = centred(phi, rounding)
    product = (x * y).sum(1) / (x.square().sum(1) * y.square().sum(1)).sqrt()
    return product.masked_fill(x_constant, 0.0).masked_fill(y_constant, math.nan)
