"""A page that sets explanations beside the exact values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastshap_kernels._checks import fail

from .explanation import Explanation
from .plotting import check_drawing, displayable, draw_heatmap, draw_picture, end_of_scale, label_bar, pyplot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL = 1.45  # inches


def explanation_page(
    images: Tensor,
    explanations: Explanation,
    exact: Tensor,
    classes: Sequence[str] | None = None,
    reference: str = "exact",
) -> tuple[Figure, Any]:
    """A page that sets our Shapley values beside the exact ones: a row an image.

    Columns: the image; the predicted class, ours and exact; the runner-up, ours and exact. All heat maps of a row
    share one symmetric colour scale, shown at its end. r is Pearson's correlation over the patches.

    Args:
        images: (B, C, H, W), C = 1 or 3, in any unit: stretched to their own range.
        explanations: of every class, made with `target="all"`.
        exact: (B, P, K) exact Shapley values, or an estimate of them, of the same images.
        classes: K names; None for the numbers.
        reference: what the headings call `exact`, say "KernelSHAP".

    Returns:
        (figure, axes): axes is an array (B, 5).

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
        ValueError: where images, explanations and exact values do not fit each other.
    """
    figures = pyplot()
    if explanations.target is not None:
        fail("explanation_page", "explanations", 'of every class, made with target="all"', explanations)
    if exact.shape != explanations.values.shape:
        fail("explanation_page", "exact", f"{tuple(explanations.values.shape)} like the explanations' values", exact)
    if len(explanations) == 0 or explanations.logits.shape[1] < 2:
        fail("explanation_page", "explanations", "of at least one image and two classes", explanations)
    check_drawing("explanation_page", images, len(explanations), explanations.logits.shape[1], classes)
    rows = len(explanations)
    size = (5 * _CELL + 1.0, rows * (_CELL + 0.24) + 0.25)
    figure, axes = figures.subplots(rows, 5, figsize=size, dpi=150, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.06)
    truth = replace(explanations, values=exact.to(explanations.values))
    for b in range(rows):
        _draw_row(figure, axes[b], displayable(images[b]), explanations[b], truth[b], classes)
    headings = ("image", *(f"{of}: {whose}" for of in ("predicted", "runner-up") for whose in ("ours", reference)))
    for ax, heading in zip(axes[0], headings, strict=True):
        place = {"xy": (0.5, 1.0), "xycoords": "axes fraction", "xytext": (0, 19), "textcoords": "offset points"}
        ax.annotate(heading, **place, ha="center", va="bottom", fontsize=8, fontweight="bold")
    return figure, axes


def _draw_row(
    figure: Figure, axes: Any, picture: Any, ours: Explanation, exact: Explanation, classes: Sequence[str] | None
) -> None:
    """One image of the page: the picture, then ours and exact for the two likeliest classes."""
    best = ours.logits[0].topk(2).indices.tolist()
    maps = [(ours.heatmap(target=k)[0], exact.heatmap(target=k)[0]) for k in best]
    limit = max(end_of_scale(heat) for pair in maps for heat in pair)
    draw_picture(axes[0], picture)
    for place, (k, (heat, reference)) in enumerate(zip(best, maps, strict=True)):
        left, right = axes[1 + 2 * place], axes[2 + 2 * place]
        drawn = draw_heatmap(left, ours.heatmap(picture.shape[:2], k)[0], picture, limit)
        draw_heatmap(right, exact.heatmap(picture.shape[:2], k)[0], picture, limit)
        left.set_title(ours.title(k, classes), fontsize=8)
        right.set_title(f"r = {_correlation(heat, reference):.2f}", fontsize=8)
    label_bar(figure.colorbar(drawn, ax=list(axes), fraction=0.03, pad=0.015, shrink=0.88, aspect=14), ours.unit)


def _correlation(first: Tensor, second: Tensor) -> float:
    pair = torch.stack([first.detach().double().flatten(), second.detach().double().flatten()])
    return float(torch.corrcoef(pair)[0, 1])
