"""Pictures of explanations. Nothing here calls `show()`, and matplotlib is imported only when something is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import check_dense, fail

from .explanation import Explanation

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Blue lowers the logit, red raises it, white is nothing. The ends stay light enough to darken.
_COLOURS = ("#1b5fae", "#86b5e3", "#f7f7f7", "#f3a587", "#c4212f")
# One-channel images up to this many pixels a side are drawings, all others photographs.
_DRAWING = 64
_SMOOTH = 8  # points of an outline per pixel
# What is left of a colour where a photograph is black.
_DARKEST = 0.5
_PAGE_CELL = 1.45  # inches


def plot_explanation(
    explanation: Explanation,
    images: Tensor | None = None,
    index: int = 0,
    target: int | None = None,
    ax: Axes | None = None,
    classes: Sequence[str] | None = None,
    limit: float | None = None,
) -> tuple[Figure, Axes]:
    """Draws the heat map of one image, over the image where it is given, with a colour bar.

    Args:
        explanation: what to draw.
        images: (B, C, H, W) the images explained, C = 1 or 3, in any unit: stretched to their own range.
        index: which image of the batch.
        target: a class; None for the target explained, or the predicted class where all are.
        ax: where to draw; None makes a figure.
        classes: K names for the title.
        limit: the value at the ends of the colour scale, which is symmetric about 0; None for the largest drawn.

    Returns:
        (figure, axes).

    Raises:
        ModuleNotFoundError: where matplotlib is not installed.
        ValueError: for an image, a target or names that do not fit the explanation.
    """
    pyplot = _pyplot()
    _check("Explanation.plot", images, explanation, classes)
    if limit is not None and not (isinstance(limit, Real) and 0 < float(limit) < float("inf")):
        fail("Explanation.plot", "limit", "a finite number above 0, or None", limit)
    one = explanation[index]
    chosen = int(one.targets(target))
    if ax is None:
        _, ax = pyplot.subplots(figsize=(4.2, 3.6), dpi=150, layout="constrained")
    picture = None if images is None else _displayable(images[index])
    heat = one.heatmap(target=chosen)[0]
    drawn = _draw_heatmap(ax, _over(one, chosen, picture), picture, _limit(heat) if limit is None else limit)
    ax.set_title(_class_title(one, chosen, classes), fontsize=10)
    figure: Any = ax.get_figure()
    bar = figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.03)
    _label_bar(bar, f"Shapley value ({one.unit})")
    return figure, ax


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
    pyplot = _pyplot()
    if explanations.target is not None:
        fail("explanation_page", "explanations", 'of every class, made with target="all"', explanations)
    if exact.shape != explanations.values.shape:
        fail("explanation_page", "exact", f"{tuple(explanations.values.shape)} like the explanations' values", exact)
    if len(explanations) == 0 or explanations.logits.shape[1] < 2:
        fail("explanation_page", "explanations", "of at least one image and two classes", explanations)
    _check("explanation_page", images, explanations, classes)
    rows = len(explanations)
    size = (5 * _PAGE_CELL + 1.0, rows * (_PAGE_CELL + 0.24) + 0.25)
    figure, axes = pyplot.subplots(rows, 5, figsize=size, dpi=150, layout="constrained", squeeze=False)
    figure.get_layout_engine().set(h_pad=0.06)
    truth = replace(explanations, values=exact.to(explanations.values))
    for b in range(rows):
        _draw_row(figure, axes[b], _displayable(images[b]), explanations[b], truth[b], classes)
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
    limit = max(_limit(heat) for pair in maps for heat in pair)
    _draw_picture(axes[0], picture)
    for place, (k, (heat, reference)) in enumerate(zip(best, maps, strict=True)):
        left, right = axes[1 + 2 * place], axes[2 + 2 * place]
        drawn = _draw_heatmap(left, _over(ours, k, picture), picture, limit)
        _draw_heatmap(right, _over(exact, k, picture), picture, limit)
        left.set_title(_class_title(ours, k, classes), fontsize=8)
        right.set_title(f"r = {_correlation(heat, reference):.2f}", fontsize=8)
    _label_bar(figure.colorbar(drawn, ax=list(axes), fraction=0.03, pad=0.015, shrink=0.88, aspect=14), ours.unit)


def _draw_picture(ax: Axes, picture: Any) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _frame(ax)


def _over(one: Explanation, target: int, picture: Any) -> Tensor:
    """The heat map of one image at the size of its picture, or on the grid where there is none."""
    return one.heatmap(None if picture is None else picture.shape[:2], target)[0]


def _draw_heatmap(ax: Axes, heat: Tensor, picture: Any, limit: float) -> Any:
    """The heat map, of the image's size, with the image showing through, if any; returns what a colour bar needs.

    A photograph darkens the colours where it is dark. Of a small drawing (a digit) only the outline is drawn: its few
    large pixels would break the patches up, and its background would hide the colours.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # An odd number of steps gives 0 a step of its own.
    steps = LinearSegmentedColormap.from_list("shapley", _COLOURS, N=257)
    colours = ScalarMappable(Normalize(-limit, limit), steps)
    painted = colours.to_rgba(heat.detach().float().cpu().numpy())[..., :3]
    is_drawing = picture is not None and picture.ndim == 2 and max(heat.shape) <= _DRAWING
    if picture is not None and not is_drawing:
        grey = picture if picture.ndim == 2 else picture @ (0.299, 0.587, 0.114)
        painted *= (_DARKEST + (1 - _DARKEST) * grey)[..., None]
    ax.imshow(painted, interpolation="nearest")
    if is_drawing:
        _draw_outline(ax, picture)
    _frame(ax)
    return colours


def _draw_outline(ax: Axes, picture: Any) -> None:
    """The line at half brightness, which invents no detail; nothing for a constant picture."""
    if not picture.min() < 0.5 < picture.max():
        return
    height, width = picture.shape
    smooth = _resize(torch.from_numpy(picture), (height * _SMOOTH, width * _SMOOTH), "bilinear").numpy()
    rows, columns = ((numpy.arange(side * _SMOOTH) + 0.5) / _SMOOTH - 0.5 for side in (height, width))
    ax.contour(columns, rows, smooth, levels=[0.5], colors="0.15", linewidths=0.8)


def _resize(picture: Tensor, size: Sequence[int], mode: str) -> Tensor:
    return functional.interpolate(picture[None, None], size=tuple(size), mode=mode)[0, 0]


def _frame(ax: Axes) -> None:
    """No ticks, and a hairline, so that white is seen to belong to the picture."""
    ax.set_xticks([])
    ax.set_yticks([])
    for side in ax.spines.values():
        side.set(linewidth=0.4, color="0.6")


def _label_bar(bar: Any, label: str) -> None:
    """A colour bar with few, small ticks."""
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7, width=0.5, length=2)
    bar.ax.locator_params(nbins=3)
    bar.outline.set_linewidth(0.5)


def _displayable(image: Tensor) -> Any:
    """(H, W) or (H, W, 3) numpy in [0, 1]; an image is stretched to its own range, a constant one is mid grey."""
    picture = image.detach().float().cpu()
    low, high = picture.min(), picture.max()
    picture = (picture - low) / (high - low) if high > low else torch.full_like(picture, 0.5)
    return picture[0].numpy() if picture.shape[0] == 1 else picture.permute(1, 2, 0).numpy()


def _limit(heat: Tensor) -> float:
    """The end of a symmetric colour scale that holds every value; 1 for a map of zeros."""
    return float(heat.detach().abs().max()) or 1.0


def _class_title(one: Explanation, target: int, classes: Sequence[str] | None) -> str:
    name = str(target) if classes is None else str(classes[target])
    probability = float(one.probabilities[0, target])
    title = f"{name} · {'<1%' if probability < 0.01 else f'{probability:.0%}'}"
    return f"{title}\n(untrained explainer)" if one.untrained else title


def _correlation(first: Tensor, second: Tensor) -> float:
    pair = torch.stack([first.detach().double().flatten(), second.detach().double().flatten()])
    return float(torch.corrcoef(pair)[0, 1])


def _check(op: str, images: Tensor | None, explanation: Explanation, classes: Sequence[str] | None) -> None:
    if images is not None:
        expected = f"({len(explanation)}, C, H, W) with C = 1 or 3"
        check_dense(op, "images", images, expected, "Pass model.preprocess(images).")
        if images.ndim != 4 or images.shape[0] != len(explanation) or images.shape[1] not in (1, 3):
            fail(op, "images", expected, images)
    if classes is not None and len(classes) != explanation.logits.shape[1]:
        fail(op, "classes", f"{explanation.logits.shape[1]} names", list(classes))


def _pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Drawing an explanation needs matplotlib: pip install "fastshap-kernels[plot]"'
        ) from error
    return pyplot
