"""The regression of the shares on recorded coalitions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .._modes import evaluating
from ..games.coalitions import Coalitions
from ..models.head import SharesHead
from ..models.self_explaining import SelfExplainingClassifier
from .base import ObjectiveTerms, even_split_error, explained_share, in_unit


class ExplainerObjective:
    """R on recorded coalitions: trains the shares and the blocks before them, and nothing else.

    R = mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², divided by what the even split (f − v(∅))/P leaves (where
    that is no more than the values' rounding, the game is constant, and R is not divided). The encoder runs in
    evaluation mode and without gradient: no weight, statistic or logit of it changes.

    Attributes:
        progress: share of the training done, in [0, 1]; `fit` sets it each step.

    Deterministic: yes.

    Source: the regression: Jethani et al., FastSHAP, ICLR 2022.
    """

    def __init__(self) -> None:
        self.progress = 1.0

    def __call__(
        self, model: SelfExplainingClassifier, images: Tensor, recorded: Sequence[Tensor] | Tensor
    ) -> ObjectiveTerms:
        """The loss of one batch.

        Args:
            model: with the shares head; its coalitions were recorded.
            images: (B, C, H, W).
            recorded: labels, which have no part in it; bits, int32 (B, M, W); values, (B, M, K).

        Returns:
            the terms of the loss: regression and value_r2, the explained share of the variance of these v(S). The best
            values leave what is not additive in the game: value_r2 says nothing of how near they are to it.

        Raises:
            ValueError: for a model with another head, or data that `record_coalitions` did not make.
        """
        if not isinstance(getattr(model, "head", None), SharesHead):
            raise ValueError(
                "ExplainerObjective trains the shares of a model that stays as it is, but this one has none. Use "
                "fv.convert(timm_model)."
            )
        if not isinstance(recorded, (tuple, list)) or len(recorded) != 3:
            raise ValueError(
                "ExplainerObjective learns from recorded coalitions, but it was given labels. Pass "
                "fv.record_coalitions(model, data) to fit in place of the data."
            )
        _, bits, values = recorded
        coalitions = Coalitions(bits, model.players)
        with evaluating(model):
            features, logits = model.game.features_and_logits(images)
            null = model.null_value()
        residual = model.regression_loss(features, logits, coalitions, values.to(logits.dtype), null)
        regression = in_unit(residual, even_split_error(values, logits, null, coalitions), values)
        explained = explained_share(residual.detach(), values)
        return ObjectiveTerms(regression, regression=regression.detach(), value_r2=explained)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
