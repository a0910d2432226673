"""Why an image and a text match: Shapley values of patches and of words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastshap_kernels._checks import check_count, fail

from ..explanations.plotting import check_drawing, displayable, draw_heatmap, draw_picture, label_bar, pyplot
from ..explanations.words import draw_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(eq=False, repr=False)
class PairExplanation:
    """Shapley values of the patches of B images and of the words of their texts, in units of the score.

    values of pair b: image[b].sum() + text[b].sum() = score[b] − null[b], whichever of both play.

    Args:
        image (floating point): (B, P), or None where patches don't play.
        text (floating point): (n,) of each pair's n words, or None where words don't play.
        words: what each token that can play says, of each pair.
        score, null (floating point): (B,), with all players, and with none.
        grid: (h, w) of the patches, P = h·w.
        errors: standard errors of each pair's values, of the patches that play and then of the words; None of a pair
            whose values are exact.
        evaluations: coalitions evaluated, over all pairs.

    Example:
        >>> values = torch.tensor([[0.5, 0.0, 0.0, -0.1]]), [torch.tensor([0.2, 0.4])]
        >>> found = fv.PairExplanation(*values, [["red", "car"]], torch.ones(1), torch.zeros(1), (2, 2))
        >>> found.efficiency_gap() < 1e-6
        True
    """

    image: Tensor | None
    text: list[Tensor] | None
    words: list[list[str]]
    score: Tensor
    null: Tensor
    grid: tuple[int, int]
    errors: Sequence[Tensor | None] = ()
    evaluations: int = 0

    def __len__(self) -> int:
        return len(self.score)

    def __repr__(self) -> str:
        players = " and ".join(name for name in ("image", "text") if getattr(self, name) is not None)
        pairs = "1 pair" if len(self) == 1 else f"{len(self)} pairs"
        return f"PairExplanation({pairs}, players={players!r}, grid={self.grid}, evaluations={self.evaluations})"

    def efficiency_gap(self) -> float:
        """The largest |Σ values + null − score| over pairs, relative to the largest |score| or |null|."""
        sums = [self._all_of(b).double().sum() for b in range(len(self))]
        if not sums:
            return 0.0
        gap = (torch.stack(sums) + self.null.double() - self.score.double()).abs().max()
        return float(gap / torch.maximum(self.score.abs().max(), self.null.abs().max()).clamp_min(1e-30))

    def _all_of(self, index: int) -> Tensor:
        image = self.score.new_zeros(0) if self.image is None else self.image[index].flatten()
        return torch.cat([image, self.score.new_zeros(0) if self.text is None else self.text[index]])

    def plot(
        self, images: Tensor | None = None, index: int = 0, limit: float | None = None
    ) -> tuple[Figure, Sequence[Axes]]:
        """Draws the patches of one pair as a heat map, and its words below, coloured by the same scale.

        Args:
            images: (B, C, H, W) the images explained, C = 1 or 3, in any unit: stretched to their own range.
            index: which pair.
            limit: the value at the ends of the colour scale, which is symmetric about 0; None for the largest drawn.

        Returns:
            (figure, (axes of the image, axes of the words)).

        Raises:
            ModuleNotFoundError: where matplotlib is not installed.
            ValueError: for images or an index that do not fit the explanation.

        Example:
            >>> values = torch.randn(1, 4), [torch.randn(2)]
            >>> found = fv.PairExplanation(*values, [["red", "car"]], torch.ones(1), torch.zeros(1), (2, 2))
            >>> figure, axes = found.plot(torch.rand(1, 3, 16, 16))
        """
        figures = pyplot()
        index = check_count("PairExplanation.plot", "index", index, 0, len(self) - 1)
        check_drawing("PairExplanation.plot", images, len(self), 1, None)
        if limit is not None and not (isinstance(limit, Real) and 0 < float(limit) < float("inf")):
            fail("PairExplanation.plot", "limit", "a finite number above 0, or None", limit)
        end = float(self._all_of(index).abs().max()) or 1.0 if limit is None else float(limit)
        picture = None if images is None else displayable(images[index])
        figure: Any = figures.figure(figsize=(4.4, 4.4), dpi=150, layout="constrained")
        above, below = figure.subplots(2, 1, height_ratios=(5, 1))
        if self.image is not None:
            heat = self.image[index].unflatten(0, self.grid)
            if picture is not None:
                size = tuple(picture.shape[:2])
                heat = torch.nn.functional.interpolate(heat[None, None], size=size, mode="nearest")[0, 0]
            draw_heatmap(above, heat, picture, end)
        elif picture is not None:
            draw_picture(above, picture)
        else:
            above.set_axis_off()
        values = torch.zeros(len(self.words[index])) if self.text is None else self.text[index]
        scale = draw_words(below, self.words[index], values, end)
        above.set_title(f"score {float(self.score[index]):.3g}, of nothing {float(self.null[index]):.3g}", fontsize=10)
        label_bar(figure.colorbar(scale, ax=[above, below], fraction=0.046, pad=0.03), "Shapley value (score)")
        return figure, (above, below)
