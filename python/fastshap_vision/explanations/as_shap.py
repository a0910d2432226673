"""Explanations in the shapes that shap's users know; shap is not needed to import this."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastshap_kernels._checks import check_dense, fail

from .pixels import spread


def as_shap(
    values: Tensor,
    null: Tensor,
    target: Tensor | None,
    grid: tuple[int, int],
    seen: tuple[float, float] = (1.0, 1.0),
    images: Tensor | None = None,
    classes: Sequence[str] | None = None,
) -> Any:
    """Shapley values as a `shap.Explanation`, for shap's plots.

    Without images the features are patches: values (B, P) or (B, P, K), named by row and column. With images they
    are pixels, as `shap.image_plot` draws them: values (B, H, W, C) or (B, H, W, C, K) and the images as data, each
    patch's value spread evenly over its pixels and channels. Either way the values of an image and class sum to its
    logit minus its base value.

    Args:
        values, null, target, grid, seen: as in `Explanation`.
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
    if classes is not None and len(classes) != len(null):
        fail("as_shap", "classes", f"{len(null)} names", list(classes))
    values, null = values.detach().cpu(), null.detach().cpu()
    every = target is None
    rows, columns = grid
    base = null.expand(len(values), -1) if target is None else null[target.cpu()]
    content: dict[str, Any] = {
        "base_values": base.double().numpy(),
        "output_names": list(classes) if every and classes is not None else None,
    }
    if images is None:
        names = [f"patch ({row}, {column})" for row in range(rows) for column in range(columns)]
        return shap.Explanation(values.double().numpy(), feature_names=names, **content)
    pictures = check_dense("as_shap", "images", images, "(B, C, H, W)", "Pass model.preprocess(images).").detach().cpu()
    if every:
        layers = [spread(values[:, :, k], pictures, grid, seen) for k in range(values.shape[2])]
        pixels = torch.stack(layers, -1).permute(0, 2, 3, 1, 4)
    else:
        pixels = spread(values, pictures, grid, seen).permute(0, 2, 3, 1)
    return shap.Explanation(pixels.double().numpy(), data=pictures.permute(0, 2, 3, 1).double().numpy(), **content)
