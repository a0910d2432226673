"""What a user may have hung on a model's modules: hooks, and other forward methods."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils.module_tracker import ModuleTracker

from .base import UnsupportedModelError
from .sharded import is_of_sharding

_KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
#: The methods of a timm model that the games call or stand in for.
_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pos_embed")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward; gathering its weights is no more."""
    of = module.__dict__
    found = of["_forward_hooks"] or of["_forward_pre_hooks"] or of["_backward_hooks"] or of["_backward_pre_hooks"]
    return bool(found) and not all(is_of_sharding(hook) for kind in _KINDS for hook in of[kind].values())


def has_global_hooks() -> bool:
    """Whether there are hooks on every module; those that count operations for torch change nothing."""
    return any(
        not isinstance(getattr(hook, "__self__", None), ModuleTracker)
        for hooks in (
            torch_module._global_forward_hooks,
            torch_module._global_forward_pre_hooks,
            torch_module._global_backward_hooks,
            torch_module._global_backward_pre_hooks,
        )
        for hook in hooks.values()
    )


def is_overridden(module: nn.Module) -> bool:
    """Whether this one module has a forward of its own, beside its class's."""
    return "forward" in module.__dict__


def is_plain(module: Any, *kinds: type[nn.Module]) -> bool:
    """Whether a module is of just one of these classes, and calling it is that class's forward and nothing else."""
    return type(module) in kinds and not has_hooks(module) and not is_overridden(module)


def check_backbone(backbone: Any) -> None:
    """Raises an error for what a pass of the games, made of the model's parts, would miss without a word."""
    name = type(backbone).__name__
    if has_hooks(backbone):
        raise UnsupportedModelError(
            f"This {name} has hooks of its own, which its explanation would not see: it is made of what "
            "forward_features and forward_head compute.",
            "Remove them, or register them on the module inside that they are about, such as the classifier.",
        )
    if any(method in backbone.__dict__ for method in _METHODS):
        found = next(method for method in _METHODS if method in backbone.__dict__)
        raise UnsupportedModelError(
            f"This {name} has another `{found}` than its class, which its explanation may not see.",
            "Make a subclass of the model, or change the module inside that it is about.",
        )
    if backbone.training and getattr(backbone, "distilled_training", False):
        raise UnsupportedModelError(
            f"This {name} returns the logits of both its classifiers in training, but one is explained: their mean.",
            "Call set_distilled_training(False).",
        )
