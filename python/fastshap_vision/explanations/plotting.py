"""Drawing maps of patches, from tensors. Nothing here calls `show()`, and matplotlib is imported only to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import check_dense, fail

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Blue lowers the logit, red raises it, white is nothing. The ends stay light enough to darken.
_COLOURS = ("#1b5fae", "#86b5e3", "#f7f7f7", "#f3a587", "#c4212f")
# One-channel images up to this many pixels a side are drawings, all others photographs.
_DRAWING = 64
_SMOOTH = 8  # points of an outline per pixel
# What is left of a colour where a photograph is black.
_DARKEST = 0.5


def draw_picture(ax: Axes, picture: Any) -> None:
    ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    _frame(ax)


def draw_heatmap(ax: Axes, heat: Tensor, picture: Any, limit: float) -> Any:
    """The heat map, of the image's size, with the image showing through, if any; returns what a colour bar needs.

    A photograph darkens the colours where it is dark. Of a small drawing (a digit) only the outline is drawn: its few
    large pixels would break the patches up, and its background would hide the colours.
    """
    colours = colour_scale(limit)
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


def colour_scale(limit: float) -> Any:
    """From blue at −limit over white at 0 to red at limit, which a colour bar can show."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap, Normalize

    # An odd number of steps gives 0 a step of its own.
    steps = LinearSegmentedColormap.from_list("shapley", _COLOURS, N=257)
    return ScalarMappable(Normalize(-limit, limit), steps)


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


def label_bar(bar: Any, label: str) -> None:
    """A colour bar with few, small ticks."""
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7, width=0.5, length=2)
    bar.ax.locator_params(nbins=3)
    bar.outline.set_linewidth(0.5)


def displayable(image: Tensor) -> Any:
    """(H, W) or (H, W, 3) numpy in [0, 1]; an image is stretched to its own range, a constant one is mid grey."""
    picture = image.detach().float().cpu()
    low, high = picture.min(), picture.max()
    picture = (picture - low) / (high - low) if high > low else torch.full_like(picture, 0.5)
    return picture[0].numpy() if picture.shape[0] == 1 else picture.permute(1, 2, 0).numpy()


def end_of_scale(heat: Tensor) -> float:
    """The end of a symmetric colour scale that holds every value; 1 for a map of zeros."""
    return float(heat.detach().abs().max()) or 1.0


def check_drawing(op: str, images: Tensor | None, batch: int, number: int, classes: Sequence[str] | None) -> None:
    """Whether images and names are those of `batch` images and `number` classes."""
    if images is not None:
        expected = f"({batch}, C, H, W) with C = 1 or 3"
        check_dense(op, "images", images, expected, "Pass model.preprocess(images).")
        if images.ndim != 4 or images.shape[0] != batch or images.shape[1] not in (1, 3):
            fail(op, "images", expected, images)
    if classes is not None and len(classes) != number:
        fail(op, "classes", f"{number} names", list(classes))


def pyplot() -> Any:
    try:
        from matplotlib import pyplot
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Drawing an explanation needs matplotlib: pip install "fastshap-kernels[plot]"'
        ) from error
    return pyplot
