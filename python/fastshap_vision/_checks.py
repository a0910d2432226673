"""Argument checks of the training API."""

from __future__ import annotations


def check_choice(argument: str, value: object, choices: tuple[object, ...]) -> None:
    """One of the choices, else a ValueError that lists them."""
    if value not in choices:
        raise ValueError(f"Argument `{argument}` must be one of {', '.join(map(repr, choices))}, but it is {value!r}.")
