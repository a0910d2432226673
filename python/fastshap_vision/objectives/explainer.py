"""The regression of the shares on recorded coalitions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from fastshap_kernels._checks import check_flag

from .._modes import evaluating
from ..games.coalitions import Coalitions
from ..models.head import SharesHead
from ..models.self_explaining import SelfExplainingClassifier
from .base import Objective, ObjectiveTerms, even_split_error, explained_share, in_unit


class ExplainerObjective(Objective):
    """R on recorded coalitions: trains the shares and the blocks before them, and nothing else.

    R = mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², divided by what the even split (f − v(∅))/P leaves (where
    that is no more than the values' rounding, the game is constant, and R is not divided). The encoder runs in
    evaluation mode and without gradient: no weight, statistic or logit of it changes.

    Args:
        keep_best: keeps a copy of the head as it was after the epoch whose `value_r2` on held-out coalitions was the
            highest, for `restore_best`; it is part of a checkpoint.

    Source: the regression: Jethani et al., FastSHAP, ICLR 2022.

    Example:
        >>> recorded = fv.record_coalitions(model, data, coalitions=8)
        >>> result = fv.fit(model, recorded, objective=fv.ExplainerObjective(), epochs=1, batch_size=4)
        >>> result.history[0]["value_r2"] <= 1
        True
    """

    def __init__(self, keep_best: bool = False) -> None:
        self.keep_best = check_flag("ExplainerObjective", "keep_best", keep_best)
        self._best: dict[str, Tensor] | None = None
        self._best_value_r2 = -math.inf

    def __call__(
        self,
        model: SelfExplainingClassifier,
        images: Tensor,
        recorded: Sequence[Any] | Tensor,
        *,
        progress: float = 1.0,
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

    @torch.no_grad()
    def evaluate(self, model: Any, data: Any, *, batch_size: int, workers: int = 0) -> dict[str, float | None]:
        """eval_value_r2 of recorded coalitions that were held out; None where it is not defined.

        The mean over images of E[r²(φ̂)] differs from the distance of φ̂ to the Shapley values by a constant and a
        factor: of two heads, that with the higher eval_value_r2 is nearer to them, up to the noise of the coalitions.
        """
        if not hasattr(data, "bits"):
            return {}
        like, found = next(model.parameters()), []
        loader = DataLoader(data, batch_size, num_workers=workers, generator=torch.Generator())
        with evaluating(model):
            for images, (labels, bits, values) in loader:
                recorded = (labels, bits.to(like.device), values.to(like.device))
                terms = self(model, images.to(like.device, like.dtype), recorded)
                found.append(terms.value_r2.expand(len(images)))  # type: ignore[union-attr]
        mean = float(torch.cat(found).nanmean())
        if self.keep_best and (self._best is None or mean > self._best_value_r2):
            self._best_value_r2 = mean
            self._best = {name: tensor.detach().cpu().clone() for name, tensor in model.head.state_dict().items()}
        return {"eval_value_r2": None if math.isnan(mean) else mean}

    def restore_best(self, model: SelfExplainingClassifier) -> float | None:
        """Gives the head of the best evaluation back to the model; its `value_r2`, or None where there was none."""
        if self._best is None:
            return None
        model.head.load_state_dict(self._best)
        return self._best_value_r2

    @property
    def settings(self) -> dict[str, Any]:
        return {"keep_best": self.keep_best}

    def state_dict(self) -> dict[str, Any]:
        """The best head so far."""
        return {"best": self._best, "best_value_r2": self._best_value_r2}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._best_value_r2 = state["best"], float(state["best_value_r2"])
