"""The regression of the shares on recorded coalitions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

from fastshap_kernels._checks import check_flag

from .._modes import evaluating
from .._runtime.errors import SendableErrors
from .._runtime.processes import part_of, together, whole_of
from .._runtime.signals import leaving_to_main
from ..games.coalitions import Coalitions
from ..games.readout import values_of_features
from ..models.head import SharesHead
from ..models.self_explaining import SelfExplainingClassifier
from .base import Objective, ObjectiveTerms, even_split_error, explained_share, in_unit


class ExplainerObjective(Objective):
    """R on recorded coalitions: trains the shares and the blocks before them, and nothing else.

    R = mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², divided by what the even split (f − v(∅))/P leaves (where
    that is no more than the values' rounding, the game is constant, and R is not divided). The encoder runs in
    evaluation mode and without gradient: no weight, statistic or logit of it changes. Where the values of each image's
    likeliest classes alone were recorded, K is these.

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
        recorded: Mapping[str, Tensor],
        *,
        progress: float = 1.0,
    ) -> ObjectiveTerms:
        """The loss of one batch.

        Args:
            model: with the shares head; its coalitions were recorded.
            images: (B, C, H, W).
            recorded: by name, what `RecordedCoalitions` gives beside the images: "bits", int32 (B, M, W), and "values",
                (B, M, K), or what was recorded in place of them.

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
        if not isinstance(recorded, Mapping) or "bits" not in recorded:
            raise ValueError(
                "ExplainerObjective learns from recorded coalitions, but it was given labels. Pass "
                "fv.record_coalitions(model, data) to fit in place of the data."
            )
        coalitions = Coalitions(recorded["bits"], model.players)
        with evaluating(model):
            features, logits = model.game.features_and_logits(images)
            null = model.null_value()
            values, classes = values_of(model, recorded)
        values = values.to(logits.dtype)
        residual = model.regression_loss(features, logits, coalitions, values, null, classes)
        if classes is not None:
            values = values.gather(2, classes.unsqueeze(1).expand(-1, values.shape[1], -1))
            logits, null = logits.gather(1, classes), null[classes].unsqueeze(1)
        regression = in_unit(residual, even_split_error(values, logits, null, coalitions), values)
        explained = explained_share(residual.detach(), values)
        return ObjectiveTerms(regression, regression=regression.detach(), value_r2=explained)

    def trained(self, model: Any) -> Iterable[nn.Parameter]:
        """The shares and the blocks before them."""
        return (model.head if isinstance(getattr(model, "head", None), SharesHead) else model).parameters()

    @torch.no_grad()
    def evaluate(self, model: Any, data: Any, *, batch_size: int, workers: int = 0) -> dict[str, float | None]:
        """eval_value_r2 of recorded coalitions that were held out; None where it is not defined.

        The mean over images of E[r²(φ̂)] differs from the distance of φ̂ to the Shapley values by a constant and a
        factor: of two heads, that with the higher eval_value_r2 is nearer to them, up to the noise of the coalitions.
        """
        if not hasattr(data, "stored"):
            return {}
        like, found = next(model.parameters()), []
        batches = part_of([list(batch) for batch in BatchSampler(range(len(data)), batch_size, drop_last=False)])
        options: dict[str, Any] = {"num_workers": workers, "worker_init_fn": leaving_to_main()}
        loader = DataLoader(SendableErrors(data), batch_sampler=batches, generator=torch.Generator(), **options)
        with evaluating(model), together(False):
            for images, recorded in loader:
                recorded = {name: tensor.to(like.device) for name, tensor in recorded.items() if name != "label"}
                terms = self(model, images.to(like.device, like.dtype), recorded)
                found.append(terms.value_r2.expand(len(images)).cpu())  # type: ignore[union-attr]
        mean = float(torch.cat(whole_of(found)).nanmean())
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


def values_of(model: SelfExplainingClassifier, recorded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """v(S), (B, M, K), of what was recorded, and the classes (B, k) of each image that it was recorded for.

    None for all of them; the values of others are 0.
    """
    if "features" in recorded:
        return values_of_features(model.backbone, recorded["features"]), None
    values = recorded["values"].float()
    if "classes" not in recorded:
        return values, None
    classes = recorded["classes"].long()
    chosen = classes.unsqueeze(1).expand(-1, values.shape[1], -1)
    return values.new_zeros(*values.shape[:2], model.num_classes).scatter_(2, chosen, values), classes
