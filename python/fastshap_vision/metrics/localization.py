"""Attribution maps against masks of the object: the pointing game and segmentation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import check_count, check_dense, check_tensor, fail

from .._checks import ROUNDING
from .score import Score


def pointing_game(maps: Tensor, masks: Tensor, tolerance: int = 15) -> Score:
    """Whether the largest value of a map lies on the object, or within `tolerance` pixels of it.

    Where several pixels share the largest value (a patch enlarged without blending), the score is the share of them
    that hit. A map that is constant, up to float32 rounding, points nowhere and scores 0.

    Args:
        maps (floating point): (B, H, W), larger = more important; see `Explanation.heatmap`.
        masks (bool): (B, H, W), True on the object, which every image must have.
        tolerance: largest distance of a hit from the object, in pixels, Euclidean; 15 is meant for images of 224.

    Returns:
        `Score` in [0, 1].

    Raises:
        ValueError: for maps and masks that do not fit, maps that are not finite, or a mask with no object.

    Source: Zhang et al., Top-down neural attention by excitation backprop, ECCV 2016.

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        >>> masks = torch.tensor([[[False, True], [False, False]]])
        >>> fv.metrics.pointing_game(maps, masks, tolerance=0).mean
        0.5
    """
    maps, masks = _check_maps("pointing_game", maps, masks)
    tolerance = check_count("pointing_game", "tolerance", tolerance, 0, 4096)
    if not masks.flatten(1).any(1).all():
        missing = int(masks.flatten(1).any(1).logical_not().nonzero()[0])
        fail("pointing_game", "masks", "True somewhere in every image", f"all False in image {missing}")
    tolerance = min(tolerance, math.isqrt(maps.shape[1] ** 2 + maps.shape[2] ** 2))  # the diagonal reaches everything
    steps = torch.arange(-tolerance, tolerance + 1, device=maps.device)
    disc = (steps.square().unsqueeze(1) + steps.square() <= tolerance**2).float()
    near = functional.conv2d(masks.unsqueeze(1).float(), disc[None, None], padding=tolerance).squeeze(1) > 0.5
    flat = maps.flatten(1)
    highest = flat == flat.amax(1, keepdim=True)
    hits = (highest & near.flatten(1)).sum(1).double() / highest.sum(1)
    return Score(hits.masked_fill(_constant(flat), 0.0))


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """Maps as segmentations of B images into background (0) and object (1).

    Args:
        correct (float64): (B,) share of the pixels that are labelled right.
        intersection, union (int64): (B, 2) pixels per class.
        average_precision (float64): (B,).

    Example:
        >>> masks = torch.tensor([[[False, True], [False, False]]])
        >>> fv.metrics.segmentation(masks.float(), masks)
        Segmentation(pixel accuracy 1.0000, mIoU 1.0000, mAP 1.0000, 1 images)
    """

    correct: Tensor
    intersection: Tensor
    union: Tensor
    average_precision: Tensor

    @property
    def pixel_accuracy(self) -> Score:
        """Its mean is the accuracy over all pixels of the data set, since all images have as many."""
        return Score(self.correct)

    @property
    def mean_iou(self) -> float:
        """Mean over the two classes of intersection over union, each summed over the data set first.

        A class that no mask and no map has is left out.
        """
        return float((self.intersection.sum(0).double() / self.union.sum(0)).nanmean())

    @property
    def mean_average_precision(self) -> Score:
        """Mean over the images."""
        return Score(self.average_precision)

    def __repr__(self) -> str:
        return (
            f"Segmentation(pixel accuracy {self.pixel_accuracy.mean:.4f}, mIoU {self.mean_iou:.4f}, "
            f"mAP {self.mean_average_precision.mean:.4f}, {len(self.correct)} images)"
        )


def segmentation(maps: Tensor, masks: Tensor) -> Segmentation:
    """Scores maps as segmentations of the object, by the rules of the ImageNet-Segmentation comparison.

    Each map is scaled to [0, 1] by its own least and largest value; the object is where it is above its own mean.
    Average precision is that of the scores [1 − map, map] against the one-hot masks, as one list per image. A map that
    is constant, up to float32 rounding, is 0 everywhere: all background.

    Args:
        maps (floating point): (B, H, W), larger = more important, at the size of the masks; the published figures use
            bilinear maps, `Explanation.heatmap(size, mode="bilinear")`, at 224 x 224.
        masks (bool): (B, H, W), True on the object.

    Returns:
        `Segmentation`.

    Raises:
        ValueError: for maps and masks that do not fit, or maps that are not finite.

    Source: Guillaumin, Küttel, Ferrari, IJCV 2014 (the masks); Chefer, Gur, Wolf, CVPR 2021 (the rules).

    Example:
        >>> maps = torch.tensor([[[0.0, 1.0], [0.0, 1.0]]])
        >>> masks = torch.tensor([[[False, True], [False, False]]])
        >>> fv.metrics.segmentation(maps, masks).pixel_accuracy.mean
        0.75
    """
    maps, masks = _check_maps("segmentation", maps, masks)
    flat, truth = maps.double().flatten(1), masks.flatten(1)
    least, largest = flat.aminmax(dim=1, keepdim=True)
    scaled = ((flat - least) / (largest - least)).masked_fill(_constant(flat).unsqueeze(1), 0.0)
    marked = scaled > scaled.mean(1, keepdim=True)
    intersection = torch.stack([(~marked & ~truth).sum(1), (marked & truth).sum(1)], 1)
    union = torch.stack([(~marked | ~truth).sum(1), (marked | truth).sum(1)], 1)
    # One image at a time: sorting takes many times the memory of the maps.
    precision = [
        _average_precision(torch.cat([1 - row, row]), torch.cat([~mask, mask]))
        for row, mask in zip(scaled, truth, strict=True)
    ]
    return Segmentation((marked == truth).double().mean(1), intersection, union, torch.stack(precision))


def _average_precision(scores: Tensor, positive: Tensor) -> Tensor:
    """Σ over the thresholds of precision · rise of recall; equal scores share one threshold.

    scores float64 (n,), positive bool (n,) with at least one True → float64 scalar.
    """
    scores, order = scores.sort(descending=True)
    positive = positive[order]
    place = torch.arange(1, len(scores) + 1, device=scores.device)
    precision = positive.cumsum(0).double() / place
    # Each member of a group of equal scores takes the precision at the group's last place.
    is_last = torch.cat([scores[1:] != scores[:-1], scores.new_ones(1, dtype=torch.bool)])
    last = torch.where(is_last, place, len(scores)).flip(0).cummin(0).values.flip(0)
    return precision[last - 1][positive].mean()


def _constant(flat: Tensor) -> Tensor:
    """bool (B,): rows (B, H·W) that do not vary by more than float32 rounding."""
    least, largest = flat.aminmax(dim=1)
    return largest - least <= ROUNDING * flat.abs().amax(1)


def _check_maps(op: str, maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    expected = "(B, H, W) of at least one map"
    if not check_tensor(op, "maps", maps, expected, 3).numel():
        fail(op, "maps", f"a floating-point tensor {expected}", maps)
    if maps.is_meta or not maps.isfinite().all():
        fail(op, "maps", "finite", maps if maps.is_meta else "one with NaN or infinite values")
    remedy = "Resize the maps to the masks: explanation.heatmap(size)."
    masks = check_dense(op, "masks", masks, f"bool {tuple(maps.shape)} like `maps`", remedy)
    if masks.shape == maps.shape:
        remedy = "Say what counts as the object: masks > 0."
    if masks.is_meta or masks.dtype != torch.bool or masks.shape != maps.shape:
        fail(op, "masks", f"bool {tuple(maps.shape)} like `maps`", masks, remedy)
    return maps.detach(), masks.to(maps.device)
