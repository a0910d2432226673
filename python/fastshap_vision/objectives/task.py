"""The task alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._runtime.packed_sdpa import cpu_attention
from .base import ObjectiveTerms

TaskLoss = Callable[[Tensor, Tensor], Tensor]


class TaskObjective:
    """The task alone, for any model that returns logits: the plain baseline."""

    def __init__(self, task_loss: TaskLoss | None = None) -> None:
        self.task_loss = task_loss or nn.functional.cross_entropy
        self.progress = 1.0
        self._compiled: Callable[..., ObjectiveTerms] | None = None

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> ObjectiveTerms:
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

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
