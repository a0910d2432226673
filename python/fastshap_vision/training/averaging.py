"""The exponential moving average of a model's weights and statistics, by timm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn


class Average:
    """What is evaluated and kept of a run, in place of the weights of the last update.

    Args:
        model: what is trained.
        decay: of the average at each update.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = model
        self.average = ModelEmaV3(model, decay=decay)

    @property
    def module(self) -> nn.Module:
        return self.average.module

    def update(self, updates: int) -> None:
        """Takes in the weights after so many updates of the run; the first is copied."""
        self.average.update(self.model, step=updates)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model holds the average for the while."""
        kept = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.apply()
        try:
            yield
        finally:
            _fill(self.model, kept)

    def apply(self) -> None:
        """The model holds the average from now on."""
        _fill(self.model, self.module.state_dict())

    def state_dict(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state)


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensors[name])
