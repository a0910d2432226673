"""What every objective returns, and the units of a regression's error."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .._runtime.processes import mean_of_all
from ..games.coalitions import Coalitions


class Objective(Protocol):
    """What `fit` needs of an objective; a subclass gives the call and inherits the rest.

    Example:
        >>> class Smoothed(fv.Objective):
        ...     def __call__(self, model, images, labels, *, progress=1.0):
        ...         loss = torch.nn.functional.cross_entropy(model(images), labels, label_smoothing=0.1)
        ...         return fv.ObjectiveTerms(loss)
        >>> len(fv.fit(model, data, objective=Smoothed(), epochs=1, batch_size=4).history)
        1
    """

    def __call__(self, model: Any, images: Tensor, labels: Any, *, progress: float = 1.0) -> ObjectiveTerms:
        """The loss of one batch.

        Args:
            model: what is trained.
            images: (B, C, H, W).
            labels: what the data give beside the images.
            progress: the share of the training that is done, in [0, 1].
        """
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """What it was made with, as far as words and numbers say it: a resumed run must have the same."""
        return {}

    def check(self, model: Any, data: Any) -> None:
        """Raises a ValueError, before the first step, for a model or data that it can't learn from."""
        return None

    def trained(self, model: Any) -> Iterable[nn.Parameter]:
        """The parameters that the loss depends on; `fit` freezes the others while it trains."""
        return model.parameters()

    def label_classes(self, model: Any) -> int | None:
        """K where labels must be class numbers below K, as each batch is then checked for; else None."""
        return None

    def evaluate(self, model: Any, data: Any, *, batch_size: int, workers: int = 0) -> dict[str, float | None]:
        """Further columns of the history, of data that are not trained on, in evaluation mode."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run goes on from: tensors, numbers, words, None, lists, tuples and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        return None


class ObjectiveTerms(NamedTuple):
    """What one step's loss is made of; all but `loss` are detached scalars, None where the term is off.

    Args:
        loss: what is minimised.
        task: the task's loss on whole images.
        regression: R, in the unit that `error` says.
        masked_task: the task's loss on masked images.
        value_r2: the share of the coalition values' variance that φ explains; NaN where they don't vary.
        spread: standard deviation of the coalition values; near 0 the game has collapsed.

    Example:
        >>> terms = fv.JointObjective()(model, images, labels)
        >>> terms.loss.requires_grad, terms.task.requires_grad, terms.masked_task is None
        (True, False, True)
    """

    loss: Tensor
    task: Tensor | None = None
    regression: Tensor | None = None
    masked_task: Tensor | None = None
    value_r2: Tensor | None = None
    spread: Tensor | None = None


def variance_of(values: Tensor) -> Tensor:
    """Variance of v(S), (B, M, K), over batch and coalitions, mean over classes; of the batches of all processes."""
    wide = _wide(values).flatten(0, 1)
    own, mean = wide.var(0, correction=0), wide.mean(0)
    return mean_of_all((own + (mean - mean_of_all(mean)).square()).mean())


def even_split_error(values: Tensor, logits: Tensor, null: Tensor, coalitions: Coalitions) -> Tensor:
    """Mean squared error that the even split (f − v(∅))/P leaves of v(S), (B, M, K); of the batches of all processes.

    Logits (B, K); v(∅) (K,), or of each image (B, 1, K).
    """
    share = coalitions.sizes.unsqueeze(2).to(values.dtype) / coalitions.players
    even = null + share * (logits.unsqueeze(1) - null)
    return mean_of_all(_wide(values - even).square().mean())


def in_unit(residual: Tensor, unit: Tensor, values: Tensor) -> Tensor:
    """R, a mean squared error of v(S), in a unit; in the values' own where the unit is no more than their rounding.

    A game that is constant has nothing to explain: divided by rounding, R would be any number, and its gradient too.
    """
    return residual / unit.masked_fill(_is_rounding(unit, values), 1.0)


def explained_share(residual: Tensor, values: Tensor) -> Tensor:
    """value_r2, the explained share of the variance of v(S), (B, M, K); NaN where they vary by rounding only."""
    variance = variance_of(values)
    return 1 - residual / variance.masked_fill(_is_rounding(variance, values), math.nan)


def _is_rounding(square: Tensor, values: Tensor) -> Tensor:
    """Whether a mean square of differences of v(S) is no more than what rounding makes of equal values.

    Equal values were seen to differ by 3 eps in float32, from one way to evaluate a coalition to another.
    """
    eps = max(16 * torch.finfo(torch.float32).eps, 2 * torch.finfo(values.dtype).eps)
    return square <= eps**2 * mean_of_all(_wide(values).square().mean())


def _wide(values: Tensor) -> Tensor:
    """At least float32: squares of float16 vanish."""
    return values if values.dtype == torch.float64 else values.float()


def check_not_recorded(objective: Objective, data: Any) -> None:
    """Raises a ValueError for recorded coalitions given to an objective of labelled images."""
    if hasattr(data, "stored"):
        raise ValueError(
            f"fit: {type(objective).__name__} learns from labelled images, but train_data are recorded coalitions. "
            "Pass the images, or use ExplainerObjective."
        )
