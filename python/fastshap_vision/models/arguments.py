"""The arguments that describe a self-explaining model: checked, and as JSON has them."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from typing import Any

import timm

from fastshap_kernels._checks import check_count, check_number, describe, fail

from .._checks import check_choice
from ..games.factory import REMOVALS
from .backbone import FOREIGN, _written

HEADS = ("shares", "votes")
BASES = ("even", "votes")
HEAD_DEPTHS = (0, 1, 2)
LARGEST_IMAGE = 4096  # pixels a side: larger ones have more patches than can be explained
#: Largest whole number among a model's arguments: what is more is a mistake, or an attack on the memory.
LARGEST = 2**16
LARGEST_CLASSES = 2**20


def checked_model_kwargs(arguments: Any) -> dict[str, Any]:
    """`model_kwargs` as JSON has them; what can't be written or does not describe a model is refused."""
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise TypeError(f"Argument `model_kwargs` must be a dict with names, but it is {describe(arguments)}.")
    for key in FOREIGN:
        if key in arguments:
            raise ValueError(
                f"Argument `model_kwargs` must describe a model, but it holds {key!r}. Make that model with "
                "timm.create_model and pass it to fastshap_vision.convert."
            )
    return {key: _written(key, value) for key, value in arguments.items() if value is not None}


def check_choices(head: object, base: object, head_depth: object, intermediates: object, removal: object) -> None:
    check_choice("head", head, HEADS)
    if base is not None:
        check_choice("base", base, BASES)
    check_choice("head_depth", head_depth, HEAD_DEPTHS)
    check_choice("intermediates", intermediates, (False, True))
    if removal is not None:
        check_choice("removal", removal, REMOVALS)


def checked_gradient(value: object, head: str) -> float:
    if value is None:
        return 0.0 if head == "shares" else 1.0
    share = check_number("SelfExplainingClassifier", "backbone_gradient", value, 0)
    if share > 1:
        fail("SelfExplainingClassifier", "backbone_gradient", "a number in [0, 1]", value)
    return share


def check_name(name: object, num_classes: object) -> None:
    check_count("SelfExplainingClassifier", "num_classes", num_classes, 1, LARGEST_CLASSES)
    if isinstance(name, str) and timm.is_model(name):
        return
    close = timm.list_models(f"*{name.split('_')[0]}*")[:5] if isinstance(name, str) and name else []
    raise ValueError(
        f"Argument `model_name` must be a timm model, but it is {describe(name)}. "
        f"{'Close: ' + ', '.join(close) if close else 'See timm.list_models()'}."
    )


def checked_size(img_size: Any) -> tuple[int, int] | None:
    """(H, W), or None."""
    if img_size is None:
        return None
    sides = img_size if isinstance(img_size, list | tuple) else (img_size, img_size)
    for side in sides:
        if isinstance(side, bool) or not isinstance(side, Integral) or not 0 < int(side) <= LARGEST_IMAGE:
            sides = ()
    if len(sides) != 2:
        raise ValueError(
            f"Argument `img_size` must be a whole number of pixels from 1 to {LARGEST_IMAGE}, or (H, W), but it is "
            f"{describe(img_size)}."
        )
    return int(sides[0]), int(sides[1])


def checked_width(head_width: object) -> int | None:
    """A width, or None."""
    if head_width is None:
        return None
    return check_count("SelfExplainingClassifier", "head_width", head_width, 1, LARGEST, "Pass None to have it chosen.")
