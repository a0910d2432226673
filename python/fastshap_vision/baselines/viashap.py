"""ViaSHAP: a model that regresses the label and its own Shapley values at once."""

from __future__ import annotations

from torch import Tensor, nn

from fastshap_kernels._checks import check_number

from ..models.head import VotesHead
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.base import ObjectiveTerms
from ..objectives.joint import JointObjective


class ViaSHAPObjective(JointObjective):
    """ViaSHAP's objective, for a model with head="votes": α · MSE(Σ_p Φ_p, onehot(y)) + β · R.

    R = mean over B, M, K of (f(∅) + Σ_{p∈S} Φ_p − f(x_S))², with gradients through Φ and f(x_S) alike, and unpaired
    coalitions from the Shapley kernel. The model regresses the one-hot label and is its own game.

    Where it differs from its source: an absent patch is removed as the model removes it (ViaSHAP sets its pixels to
    0), and absent patches do not vote, so that f(∅) = 0.

    Args:
        alpha, beta: α and β; the source takes α = 1 and β from 8 to 16.
        coalitions: M, per image and step.
        seed: of the sampler.

    Labels are int64 (B,).

    Raises:
        ValueError: for arguments out of range, and in a step, for a model with another head.

    Source: Alkhatib et al., Prediction via Shapley Value Regression (ViaSHAP), ICML 2025.

    Example:
        >>> model = fv.SelfExplainingClassifier("test_vit", num_classes=10, img_size=48, head="votes")
        >>> terms = fv.baselines.ViaSHAPObjective(beta=10)(model, images, labels)
        >>> torch.allclose(terms.loss, terms.task + 10 * terms.regression)
        True
    """

    def __init__(self, alpha: float = 1.0, beta: float = 10.0, coalitions: int = 2, seed: int = 0) -> None:
        self.alpha = check_number("ViaSHAPObjective", "alpha", alpha, 0)
        super().__init__(
            coalitions,
            regression_weight=check_number("ViaSHAPObjective", "beta", beta, 0),
            error="raw",
            target="live",
            paired=False,
            regression_ramp=(0.0, 0.0),
            task_loss=self._task,
            seed=seed,
        )

    def _task(self, logits: Tensor, labels: Tensor) -> Tensor:
        wanted = nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        return self.alpha * nn.functional.mse_loss(logits, wanted)

    def __call__(
        self, model: SelfExplainingClassifier, images: Tensor, labels: Tensor, *, progress: float = 1.0
    ) -> ObjectiveTerms:
        """The loss of one batch: images (B, C, H, W), labels int64 (B,)."""
        if not isinstance(model.head, VotesHead):
            raise ValueError(
                "ViaSHAP's objective regresses votes, but the model has another head. Create it with head='votes'."
            )
        return super().__call__(model, images, labels, progress=progress)
