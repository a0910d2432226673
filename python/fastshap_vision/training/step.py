"""A training step: the objective's terms as one module, and what is set before the first of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import describe

from .._runtime.processes import together
from .monitor import TERMS


class TrainingStep(nn.Module):
    """The objective's terms as one forward pass, so that accelerate's precision and gradient exchange cover it all."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that an objective that is a module is no part of the model's weights.
        self._objective = (objective,)

    def forward(self, images: Tensor, labels: Tensor, progress: float) -> dict[str, Tensor]:
        with together():
            terms = self._objective[0](self.model, images, labels, progress=progress)
        loss = getattr(terms, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                "fit: the `objective` must return terms with a scalar tensor `loss`, as ObjectiveTerms(loss), but its "
                f"loss is {describe(loss)}."
            )
        return {name: getattr(terms, name) for name in TERMS if getattr(terms, name, None) is not None}


def freeze_others(model: nn.Module, objective: Any) -> None:
    """No gradients of what the objective does not train: none are exchanged. `as_found` gives them back."""
    trained = {id(parameter) for parameter in objective.trained(model)}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.requires_grad_(False)


def prepare_step(model: Any, objective: Any, settings: dict[str, Any]) -> None:
    """What changes how a step is computed, and not what it computes."""
    if settings["grad_checkpointing"]:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(
                "fit: argument `grad_checkpointing` needs a model with set_grad_checkpointing, and "
                f"{type(model).__name__} has none. Leave it out, or train a timm model that has."
            )
        model.set_grad_checkpointing(True)
    if settings["channels_last"]:
        model.to(memory_format=torch.channels_last)
    if settings["compile"]:
        if not hasattr(objective, "compile"):
            raise ValueError(
                f"fit: argument `compile` needs an objective with compile, and {type(objective).__name__} has none. "
                "Leave it out, or use JointObjective or TaskObjective."
            )
        # Shapes are those of full batches; a size seen for the first time gets a program of its own.
        objective.compile(dynamic=False)
