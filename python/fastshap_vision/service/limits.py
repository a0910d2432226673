"""What a request may take."""

from __future__ import annotations

from dataclasses import dataclass, fields

from fastshap_kernels._checks import check_count, fail


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them at once, may take.

    Args:
        bytes: of a request's body, from 1.
        pixels: of an image, from 1. In memory a pixel takes up to 16 bytes; two images are decoded at once.
        seconds: from the begin of a request to its answer, above 0.
        requests: at once, from 1. Those beyond are told to come again.

    Raises:
        ValueError: for a limit out of its range.

    Example:
        >>> from fastshap_vision.service import Limits
        >>> Limits(pixels=1_000_000).bytes
        10000000
    """

    bytes: int = 10_000_000
    pixels: int = 25_000_000
    seconds: float = 30.0
    requests: int = 64

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "seconds":
                check_count("Limits", field.name, value, 1, 2**40)
            elif isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                fail("Limits", "seconds", "a finite number above 0", value)
