"""Words coloured by their Shapley values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .plotting import colour_scale

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Characters of a line, and the points of a letter.
_LINE, _LETTERS = 34, 9.0


def draw_words(ax: Axes, words: Sequence[str], values: Tensor, limit: float) -> Any:
    """The words as they follow each other, on as many lines as they need; returns what a colour bar needs.

    Words are drawn as text, whatever they hold: dollar signs are no mathematics.
    """
    scale = colour_scale(limit)
    colours = scale.to_rgba(values.detach().float().cpu().numpy())
    ax.set_axis_off()
    places = _places(words)
    rows = places[-1][0] + 1 if places else 1
    for (line, start), word, colour in zip(places, words, colours, strict=True):
        ax.text(
            start / _LINE,
            1 - (line + 0.5) / rows,
            word,
            transform=ax.transAxes,
            fontsize=_LETTERS,
            family="monospace",
            va="center",
            parse_math=False,
            bbox={"facecolor": colour, "edgecolor": "0.6", "linewidth": 0.4, "boxstyle": "round,pad=0.2"},
        )
    return scale


def _places(words: Sequence[str]) -> list[tuple[int, int]]:
    """The line of each word, and its first column."""
    found, line, column = [], 0, 0
    for word in words:
        if column and column + len(word) > _LINE:
            line, column = line + 1, 0
        found.append((line, column))
        column += len(word) + 2
    return found
