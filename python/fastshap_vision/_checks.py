"""Argument checks of the training API."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastshap_kernels._checks import MAX_PLAYERS, check_count, check_tensor, describe, fail


def check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """One of the choices (True is not 1 here, but NumPy's 1 is), else a ValueError that lists them."""
    value = int(value) if isinstance(value, np.integer) else value
    if not any(
        isinstance(value, type(choice)) and value == choice and (value is not True or choice is True)
        for choice in choices
    ):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"Argument `{argument}` must be one of {listed}, but it is {describe(value)}.")


def check_classes(op: str, argument: str, value: object, batch: int, classes: int, what: str = "") -> Tensor:
    """int64 (B,) on the CPU or where `value` lies: one class for all images, or one for each.

    Args:
        value: a whole number, or (B,) of them: a tensor, an array or a sequence.
        what: which else is allowed, for the message.
    """
    expected = f"{what}a class from 0 to {classes - 1}, or {batch} of them, one per image"
    value = int(value) if isinstance(value, np.integer) else value
    try:
        wanted = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        fail(op, argument, expected, value)
    is_plain = not wanted.is_nested and wanted.layout == torch.strided and not (wanted.is_meta or wanted.is_quantized)
    is_whole = not (wanted.is_floating_point() or wanted.is_complex() or wanted.dtype == torch.bool)
    if not is_plain or not is_whole or wanted.shape not in ((), (batch,)):
        fail(op, argument, expected, value)
    wanted = wanted.long()
    if wanted.numel() and not 0 <= int(wanted.min()) <= int(wanted.max()) < classes:
        found = f"holds {int(wanted.min())} to {int(wanted.max())}" if wanted.ndim else f"is {int(wanted)}"
        raise ValueError(f"{op}: argument `{argument}` must be {expected}, but it {found}.")
    return wanted.expand(batch)


def shortened(error: Exception) -> str:
    """An error's message in one line of 500 characters at most: PyTorch lists every tensor of a model that differs."""
    text = " ".join(str(error).split())
    return text if len(text) <= 500 else text[:500] + "…"


# Below this share of an image's largest value, differences between players are float32 rounding.
ROUNDING = 1e-6


def check_game(op: str, argument: str, game: Any, *methods: str) -> int:
    """P of a game that has `players` and the methods."""
    players = getattr(game, "players", None)
    missing = [name for name in methods if not callable(getattr(game, name, None))]
    if missing or isinstance(players, bool) or not isinstance(players, int) or players < 1:
        expected = f"a game, with the number of its `players` and `{'` and `'.join(methods)}`"
        remedy = "Convert a timm model with fv.convert(model); for coalition values alone any classifier will do, in "
        fail(op, argument, expected, type(game), remedy + "fv.MaskedImageGame(classifier, grid).")
    return players


def check_sampled_game(op: str, model: Any) -> int:
    """P of a game that has coalitions between none and all."""
    players = check_game(op, "model", model, "coalition_values")
    remedy = "One player alone has φ = v(N) − v(∅): take exact_values."
    return check_count(op, "model.players", players, 2, MAX_PLAYERS, remedy if players == 1 else "")


def check_images(op: str, images: object) -> None:
    """Floating-point (B, C, H, W), at least one image, of finite pixels."""
    pixels = check_tensor(op, "images", images, "(B, C, H, W)", 4)
    if not len(pixels):
        fail(op, "images", "a tensor (B, C, H, W) of at least one image", pixels)
    if pixels.is_meta or not all_finite(pixels):
        got = pixels if pixels.is_meta else "one with NaN or infinite pixels"
        fail(op, "images", "a tensor (B, C, H, W) of finite pixels", got, "Leave those images out.")


def check_values(op: str, values: object, batch: int, coalitions: int) -> None:
    """Floating-point (B, M, K): what a game gives for its coalitions."""
    expected = f"a game whose coalition_values are floating-point ({batch}, {coalitions}, K)"
    if not isinstance(values, Tensor) or not values.is_floating_point():
        fail(op, "game", expected, values)
    if values.ndim != 3 or values.shape[:2] != (batch, coalitions) or not values.shape[2]:
        fail(op, "game", expected, values)


def all_finite(numbers: Tensor) -> bool:
    """Whether no number is NaN or infinite; where their sum is finite, that is known."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def check_finite(op: str, what: str, values: Tensor) -> None:
    if not values.isfinite().all():
        raise ValueError(f"{op}: {what} is not always finite. Check the model's weights and the images.")
