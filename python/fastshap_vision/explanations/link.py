"""What a game's values are (logits, probabilities or log-probabilities), and how one is made of another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import fail

from .._runtime.precision import at_least_float32


def probabilities(logits: Tensor) -> Tensor:
    """(…, K), float32 at least: the softmax; of one logit alone, whose softmax is 1 whatever it is, the sigmoid."""
    logits = at_least_float32(logits)
    return logits.sigmoid() if logits.shape[-1] == 1 else logits.softmax(-1)


def log_probabilities(logits: Tensor) -> Tensor:
    """(…, K), float32 at least: logarithm of `probabilities`."""
    logits = at_least_float32(logits)
    return functional.logsigmoid(logits) if logits.shape[-1] == 1 else logits.log_softmax(-1)


def log_distribution(logits: Tensor) -> Tensor:
    """Logarithms of the probabilities of all classes: (…, K), or (…, 2) for one logit, of the class and of its lack."""
    logits = at_least_float32(logits)
    if logits.shape[-1] == 1:
        logits = torch.cat([logits, torch.zeros_like(logits)], -1)
    return logits.log_softmax(-1)


#: What v(S) is, of logits.
LINKS: dict[str, Callable[[Tensor], Tensor]] = {
    "probability": probabilities,
    "logit": at_least_float32,
    "log_probability": log_probabilities,
}


def link_of(op: str, game: object) -> str:
    """What the values of a game are: its attribute `link`; a game without one gives logits."""
    link = getattr(game, "link", "logit")
    if not isinstance(link, str) or link not in LINKS:
        fail(op, "game.link", f"one of {', '.join(map(repr, LINKS))}", link)
    return link


def log_probabilities_of(op: str, values: Tensor, link: str) -> Tensor:
    """Logarithm of the probabilities that a game's values (…, K) stand for.

    A probability of 0 counts as the smallest normal number of its dtype, so that differences of logarithms are finite.

    Raises:
        ValueError: for values that can't be what `link` says they are.
    """
    if link == "logit":
        return log_probabilities(values)
    highest, lowest = (1.0, 0.0) if link == "probability" else (0.0, -torch.inf)
    least, most = (float(end) for end in torch.aminmax(values))
    if least < lowest or most > highest + 1e-2:  # in half precision rounding passes the end by as much as 2^-8
        expected = f"{link!r} for values from {lowest:g} to {highest:g}"
        fail(
            op, "game.link", expected, link, f"Its values reach from {least:g} to {most:g}: give it the link they have."
        )
    return values.clamp_min(torch.finfo(values.dtype).tiny).log() if link == "probability" else values
