"""timm backbones: how they are made, described and prepared for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from timm.layers import get_act_layer, get_norm_layer
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn

from fastshap_kernels._checks import describe

from ..images.preprocessing import Preprocessing

#: Arguments of `timm.create_model` that are no part of a model's description. Some load files, pickles among them.
FOREIGN = ("checkpoint_path", "num_classes", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay")


def describe_model(model: nn.Module) -> dict[str, Any]:
    """The arguments that `timm.create_model` makes a model from, as timm records them, JSON-able.

    Activations and norms that are given as classes are written by timm's names for them.

    Raises:
        ValueError: for an argument that can't be written.
    """
    recorded = getattr(model, "_model_args", {})
    arguments = {key: value for key, value in (recorded | get_model_args(model)).items() if value is not None}
    return {key: _written(key, value) for key, value in arguments.items()}


def _written(key: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        name = _layer_name(value)
    if name is None:
        raise ValueError(
            f"A model must be made from arguments that JSON can hold, to be saved and loaded, but timm.create_model is "
            f"given {key}={value!r}. Pass timm's name of a layer, such as act_layer='silu' or "
            "norm_layer='layernorm2d', or make a model whose architecture has it."
        )
    return name


def _layer_name(layer: Any) -> str | None:
    """timm's name of an activation or norm class, if it has one."""
    name = getattr(layer, "__name__", "").lower()
    for lookup in (get_act_layer, get_norm_layer):
        try:
            found = lookup(name) if name else None
        except KeyError:
            continue
        if found is layer:
            return name
    return None


@torch.no_grad()
def project_by_identity(backbone: Any) -> None:
    """Gives a tower whose output is its pooled features, without a projection, the identity as its projection.

    Its output does not change, and a game finds what it knows: a linear layer behind the pool.
    """
    if getattr(backbone, "num_classes", None) != 0 or not hasattr(backbone, "reset_classifier"):
        return
    like = next(backbone.parameters())
    backbone.reset_classifier(backbone.num_features)
    projection = backbone.get_classifier().to(like)
    torch.nn.init.eye_(projection.weight)
    torch.nn.init.zeros_(projection.bias)


def timm_arguments(
    name: str, num_classes: int, size: Sequence[int] | None, arguments: Mapping[str, Any]
) -> dict[str, Any]:
    """All arguments of `timm.create_model`: models of one size are told which."""
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own: dict[str, Any] = {"num_classes": num_classes}
    if size is not None and config is not None and config.fixed_input_size:
        own["img_size"] = tuple(size)
    return {**arguments, **own}


def create_backbone(
    name: str, num_classes: int, size: tuple[int, int] | None, arguments: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **timm_arguments(name, num_classes, size, arguments))
    except (TypeError, KeyError, AttributeError, AssertionError) as error:
        raise TypeError(
            f"Argument `model_kwargs` must hold arguments of timm's {name!r}, but with {dict(arguments)} timm fails: "
            f"{type(error).__name__}: {error}"
        ) from error


def input_size_of(backbone: Any, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W): as asked for, else as the model was built, else as timm's configuration says."""
    built = get_model_input_config(backbone)
    channels, height, width = built["input_size"]
    if size is not None and size != (height, width) and built["fixed_input_size"]:
        raise other_size(backbone, (height, width), size)
    return (channels, height, width) if size is None else (channels, *size)


def other_size(backbone: Any, built: tuple[int, int], size: tuple[int, int]) -> ValueError:
    resize = f", or call set_input_size(img_size={size}) on it first" if hasattr(backbone, "set_input_size") else ""
    return ValueError(
        f"Argument `img_size` must be {built}, the size that this {type(backbone).__name__} was created for, but it is "
        f"{size}. Create it with timm.create_model(…, img_size={size}){resize}."
    )


def settings_of(backbone: Any) -> dict[str, Any]:
    """What changes the game of a timm model, and can be changed by the model's own methods."""
    recorded = get_model_args(backbone)
    return {key: recorded.get(key) for key in ("num_classes", "global_pool", "img_size", "in_chans")}


def preprocessing_of(
    backbone: Any, input_size: tuple[int, int, int], asked: dict[str, Any] | Preprocessing | None
) -> Preprocessing | None:
    """As asked for, else as timm's configuration says; None for images that are neither greyscale nor RGB."""
    if asked is not None:
        if not isinstance(asked, (Preprocessing, Mapping)):
            raise TypeError(
                f"Argument `preprocessing` must be a Preprocessing, its dict or None, but it is {describe(asked)}."
            )
        try:
            return asked if isinstance(asked, Preprocessing) else Preprocessing.from_dict(asked)
        except ValueError as error:
            raise ValueError(f"Argument `preprocessing` describes none: {error}") from error
    channels, *size = input_size
    if channels not in (1, 3):
        return None
    return Preprocessing.of_model(backbone, (size[0], size[1]), channels)


def check_unchanged(model: Any) -> None:
    """Raises an error where the backbone of a self-explaining model is not as it was converted."""
    if torch.compiler.is_compiling():
        return
    if model.game.backbone is not model.backbone:
        raise _was_reset("it is another module")
    now = settings_of(model.backbone)
    if now != model._converted:
        key = next(key for key in now if now[key] != model._converted[key])
        raise _was_reset(f"{key} was {model._converted[key]!r} and is {now[key]!r}")


def check_classes_unchanged(model: Any, logits: Tensor) -> None:
    """Raises an error where the backbone has other classes than when it was converted."""
    if logits.shape[-1] != model.num_classes:
        raise _was_reset(f"it had {model.num_classes} classes and has {logits.shape[-1]}")


def _was_reset(what: str) -> ValueError:
    return ValueError(
        f"The backbone was changed after its conversion: {what}. Change it first and then convert it: "
        "fastshap_vision.convert(model.backbone)."
    )
