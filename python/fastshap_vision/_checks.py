"""Argument checks of the training API."""

from __future__ import annotations

import torch
from torch import Tensor

from fastshap_kernels._checks import describe, fail


def check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """One of the choices (True is not 1 here), else a ValueError that lists them."""
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
