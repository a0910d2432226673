"""The task alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .._runtime.packed_sdpa import cpu_attention
from ..models.head import SharesHead
from .base import Objective, ObjectiveTerms, check_not_recorded

TaskLoss = Callable[[Tensor, Tensor], Tensor]


def label_classes_of(task_loss: TaskLoss, model: Any) -> int | None:
    """K of a model with `num_classes`, where cross-entropy needs labels below it."""
    return getattr(model, "num_classes", None) if task_loss is nn.functional.cross_entropy else None


def without_shares(model: Any) -> Iterable[nn.Parameter]:
    """The parameters that the logits depend on."""
    return model.backbone.parameters() if isinstance(getattr(model, "head", None), SharesHead) else model.parameters()


class TaskObjective(Objective):
    """The task alone, for any model that returns logits: the plain baseline.

    Args:
        task_loss: (logits, labels) → scalar; default cross-entropy.

    Example:
        >>> objective = fv.TaskObjective(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
        >>> terms = objective(model, images, labels)
        >>> torch.equal(terms.loss, terms.task), terms.regression
        (True, None)
    """

    def __init__(self, task_loss: TaskLoss | None = None) -> None:
        self.task_loss = task_loss or nn.functional.cross_entropy
        self._compiled: Callable[..., ObjectiveTerms] | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor, *, progress: float = 1.0) -> ObjectiveTerms:
        """The loss of one batch: images (B, C, H, W), labels as `task_loss` takes them."""
        return (self._compiled or self.terms)(model, images, labels)

    def terms(self, model: nn.Module, images: Tensor, labels: Tensor) -> ObjectiveTerms:
        """The loss of one batch, a pure function."""
        with cpu_attention(images, model):
            logits = model(images)
        loss = self.task_loss(logits, labels)
        return ObjectiveTerms(loss, loss.detach())

    def compile(self, **options: Any) -> None:
        """Compiles the step in place, as `nn.Module.compile` does; `options` are those of `torch.compile`."""
        self._compiled = torch.compile(self.terms, **options)

    def check(self, model: Any, data: Any) -> None:
        """Refuses recorded coalitions, which have no task."""
        check_not_recorded(self, data)

    def trained(self, model: Any) -> Iterable[nn.Parameter]:
        """All but the shares of a self-explaining model."""
        return without_shares(model)

    def label_classes(self, model: Any) -> int | None:
        """K, for cross-entropy."""
        return label_classes_of(self.task_loss, model)
