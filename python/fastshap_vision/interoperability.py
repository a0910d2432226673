"""Explanations in the shapes that captum and shap users know; neither package is needed to import this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels._checks import check_dense, check_tensor, fail

from .link import at_least_float32

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
        inputs: Any,
        baselines: tuple[None] | None = None,
        target: int | Sequence[int] | Tensor | None = None,
    ) -> Any:
        """Attributes the logit of one class per image to its pixels.

        The Shapley value of a patch is spread evenly over its pixels and channels,
        out[b, c, y, x] = φ_b,p / (C · H/h · W/w), so that summed over the pixels and channels of patch p it is φ_b,p
        again, and summed over the image it is the logit minus its value with no patch present. Pixels that the model
        does not see, right of and below the last whole patches, get 0.

        Args:
            inputs (floating point): (B, C, H, W) images; or a tuple of one such tensor, as captum passes it.
            baselines: None. What stands in for an absent patch was settled when the model was trained.
            target: a class, or B classes; None for each image's predicted class.

        Returns:
            (B, C, H, W), float32 at least, without gradient; a tuple of it where `inputs` is one.

        Raises:
            ValueError: for baselines, or for images that the grid does not divide.

        Deterministic: as the model is.
        """
        if isinstance(inputs, tuple | list):
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
                fail("Attribution.attribute", "inputs", "a tensor (B, C, H, W), or a tuple of one", type(inputs))
            baselines = baselines[0] if isinstance(baselines, tuple) and len(baselines) == 1 else baselines
            return (self.attribute(inputs[0], baselines, target),)
        check_tensor("Attribution.attribute", "inputs", inputs, "(B, C, H, W)", 4)
        if baselines is not None:
            remedy = "Choose what absence means when the model is made and trained (its removal and baseline)."
            got = baselines if isinstance(baselines, Tensor | int | float) else type(baselines)
            fail("Attribution.attribute", "baselines", "None", got, remedy)
        explanation = self.model.explain(inputs, target)
        return _spread(explanation.values_for().detach(), inputs, explanation)


def as_shap(explanation: Explanation, images: Tensor | None = None, classes: Sequence[str] | None = None) -> Any:
    """The same values as a `shap.Explanation`, for shap's plots.

    Without images the features are patches: values (B, P) or (B, P, K), named by row and column. With images they
    are pixels, as `shap.image_plot` draws them: values (B, H, W, C) or (B, H, W, C, K) and the images as data, each
    patch's value spread evenly over its pixels and channels. Either way the values of an image and class sum to its
    logit minus its base value.

    Args:
        explanation: of one target per image, or of every class.
        images: (B, C, H, W) the images explained; pixels that the model did not see get 0.
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
    pictures = check_dense("as_shap", "images", images, "(B, C, H, W)", "Pass model.preprocess(images).").detach().cpu()
    if every:
        layers = [_spread(values[:, :, k], pictures, explanation) for k in range(values.shape[2])]
        pixels = torch.stack(layers, -1).permute(0, 2, 3, 1, 4)
    else:
        pixels = _spread(values, pictures, explanation).permute(0, 2, 3, 1)
    return shap.Explanation(pixels.double().numpy(), data=pictures.permute(0, 2, 3, 1).double().numpy(), **content)


def _spread(values: Tensor, images: Tensor, explanation: Explanation) -> Tensor:
    """(B, P) values over the pixels and channels of (B, C, H, W) images, keeping the sum of every patch."""
    remedy = "Pass model.preprocess(images)."
    if images.ndim != 4 or images.shape[0] != values.shape[0]:
        fail("Explanation", "images", f"({values.shape[0]}, C, H, W)", images, remedy)
    channels, *size = images.shape[1:]
    grid, (height, width) = explanation.grid, explanation.seen_pixels(size)
    if height % grid[0] or width % grid[1]:
        remedy = "Resize the images to the size that was explained."
        fail("Explanation", "images", f"of a size that the grid {grid} divides", images, remedy)
    patch = (height // grid[0], width // grid[1])
    # In half precision a value over so many pixels would vanish.
    maps = (at_least_float32(values) / (channels * patch[0] * patch[1])).unflatten(1, grid)
    pixels = maps.repeat_interleave(patch[0], 1).repeat_interleave(patch[1], 2)
    pixels = functional.pad(pixels, (0, size[1] - width, 0, size[0] - height))
    return pixels.unsqueeze(1).repeat(1, channels, 1, 1)
