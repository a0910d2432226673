"""Explanations in the shapes that captum and shap users know; neither package is needed to import this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fastshap_kernels._checks import fail

if TYPE_CHECKING:
    from .explanation import Explanation


class _Explains(Protocol):
    """What an adapter asks of a model: `explain`, as `SelfExplainingClassifier` has it."""

    def explain(self, images: Tensor, target: Any = None) -> Explanation: ...


class Attribution:
    """A model's own Shapley values behind captum's `attribute(inputs, baselines, target)`.

    Args:
        model: a `SelfExplainingClassifier`, or anything with its `explain`.
    """

    def __init__(self, model: _Explains) -> None:
        self.model = model

    def attribute(
        self,
        inputs: Tensor,
        baselines: None = None,
        target: int | Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """Attributes the logit of one class per image to its pixels.

        The Shapley value of a patch is spread evenly over its pixels and channels,
        out[b, c, y, x] = φ_b,p / (C · H/h · W/w), so that summed over the pixels and channels of patch p it is φ_b,p
        again, and summed over the image it is the logit minus its value with no patch present.

        Args:
            inputs (floating point): (B, C, H, W) images, H and W multiples of the model's grid (h, w).
            baselines: None. What stands in for an absent patch was settled when the model was trained.
            target: a class, or B classes; None for each image's predicted class.

        Returns:
            (B, C, H, W), without gradient.

        Raises:
            ValueError: for baselines, or for images that the grid does not divide.

        Deterministic: as the model is.
        """
        if baselines is not None:
            remedy = "Choose what absence means when the model is made and trained (its removal and baseline)."
            fail("Attribution.attribute", "baselines", "None", baselines, remedy)
        if target is not None and not isinstance(target, int | Tensor):
            target = torch.tensor(target, device=inputs.device)
        explanation = self.model.explain(inputs, target)
        return _spread(explanation.values_for().detach(), inputs, explanation.grid)


def as_shap(explanation: Explanation, images: Tensor | None = None, classes: Sequence[str] | None = None) -> Any:
    """The same values as a `shap.Explanation`, for shap's plots.

    Without images the features are patches: values (B, P) or (B, P, K), named by row and column. With images they
    are pixels, as `shap.image_plot` draws them: values (B, H, W, C) or (B, H, W, C, K) and the images as data, each
    patch's value spread evenly over its pixels and channels. Either way the values of an image and class sum to its
    logit minus its base value.

    Args:
        explanation: of one target per image, or of every class.
        images: (B, C, H, W) the images explained, H and W multiples of the grid.
        classes: K names; only used where every class is explained.

    Returns:
        shap.Explanation.

    Raises:
        ModuleNotFoundError: where shap is not installed.
        ValueError: for images that do not fit the explanation, or the wrong number of names.
    """
    try:
        import shap
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("as_shap needs the package shap: pip install shap") from error
    if classes is not None and len(classes) != explanation.logits.shape[1]:
        fail("as_shap", "classes", f"{explanation.logits.shape[1]} names", list(classes))
    values = explanation.values.detach().cpu()
    null = explanation.null.detach().cpu()
    every = explanation.target is None
    rows, columns = explanation.grid
    base = null.expand(len(explanation), -1) if explanation.target is None else null[explanation.target.cpu()]
    content: dict[str, Any] = {
        "base_values": base.double().numpy(),
        "output_names": list(classes) if every and classes is not None else None,
    }
    if images is None:
        names = [f"patch ({row}, {column})" for row in range(rows) for column in range(columns)]
        return shap.Explanation(values.double().numpy(), feature_names=names, **content)
    pictures = images.detach().cpu()
    if every:
        layers = [_spread(values[:, :, k], pictures, explanation.grid) for k in range(values.shape[2])]
        pixels = torch.stack(layers, -1).permute(0, 2, 3, 1, 4)
    else:
        pixels = _spread(values, pictures, explanation.grid).permute(0, 2, 3, 1)
    return shap.Explanation(pixels.double().numpy(), data=pictures.permute(0, 2, 3, 1).double().numpy(), **content)


def _spread(values: Tensor, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, P) values over the pixels and channels of (B, C, H, W) images, keeping the sum of every patch."""
    if images.ndim != 4 or images.shape[0] != values.shape[0]:
        fail("Explanation", "images", f"({values.shape[0]}, C, H, W)", images)
    channels, height, width = images.shape[1:]
    if height % grid[0] or width % grid[1]:
        remedy = "Resize the images to the size that was explained."
        fail("Explanation", "images", f"of a size that the grid {grid} divides", images, remedy)
    patch = (height // grid[0], width // grid[1])
    maps = (values / (channels * patch[0] * patch[1])).unflatten(1, grid)
    pixels = maps.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    return pixels.unsqueeze(1).repeat(1, channels, 1, 1)
