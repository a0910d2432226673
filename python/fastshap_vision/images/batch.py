"""The images that `explain` takes: pictures, and inputs that are normalised already; one, or many."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastshap_kernels._checks import describe

from .decode import as_viewed
from .preprocessing import Preprocessing

EXPECTED = (
    "normalised floats (B, C, H, W) or (C, H, W), a PIL image, uint8 pixels (with channels first in a tensor, last in "
    "an array), or a list of single images"
)


def as_batch(images: Any, size: tuple[int, int, int], preprocessing: Preprocessing | None, like: Tensor) -> Tensor:
    """Images of every kind as one batch (B, C, H, W).

    Args:
        images: see `EXPECTED`. Pictures (PIL images and uint8 pixels) are resized, cropped and normalised; floats are
            taken as they are.
        size: (C, H, W) of the model's input.
        preprocessing: how a picture becomes an input; None where the model has none.
        like: pictures and arrays take the device and dtype of this tensor; other tensors keep theirs.

    Raises:
        TypeError: for images of another type.
        ValueError: for pictures that can't become an input, or lists of images of several sizes.
    """
    if isinstance(images, Tensor):
        if not _is_pixels(images):
            return images[None] if not images.is_nested and images.ndim == 3 else images
        images = images.movedim(-3, -1).cpu().numpy()
    if isinstance(images, list | tuple):
        for image in images:
            _check_single(image)
        return _joined([as_batch(image, size, preprocessing, like) for image in images], size, like)
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim == 4:
        return _joined([as_batch(image, size, preprocessing, like) for image in images], size, like)
    if isinstance(images, np.ndarray) and np.issubdtype(images.dtype, np.floating):
        inputs = torch.from_numpy(np.ascontiguousarray(images, np.float64)).to(like)
        return inputs[None] if inputs.ndim == 3 else inputs
    if isinstance(images, np.ndarray) and images.dtype == np.uint8:
        images = _picture(images)
    if isinstance(images, Image.Image):
        return _prepared(images, preprocessing).to(like)[None]
    raise TypeError(f"Argument `images` must be {EXPECTED}, but it is {describe(images)}.")


def _is_pixels(images: Tensor) -> bool:
    return not images.is_nested and images.dtype == torch.uint8 and images.ndim in (3, 4) and not images.is_meta


def _check_single(image: object) -> None:
    """A list holds no lists and no batches."""
    is_batch = isinstance(image, Tensor | np.ndarray) and (getattr(image, "is_nested", False) or image.ndim > 3)
    if is_batch or isinstance(image, list | tuple):
        raise TypeError(
            f"Argument `images` must be {EXPECTED}, but the list holds one that is {describe(image)}. Join batches "
            "with torch.cat."
        )


def _joined(batches: list[Tensor], size: tuple[int, int, int], like: Tensor) -> Tensor:
    if not batches:
        return like.new_zeros(0, *size)
    kinds = {(batch.shape[1:], batch.dtype, batch.device) for batch in batches}
    if len(kinds) > 1:
        found = ", ".join(sorted({describe(batch[0]) for batch in batches}))
        raise ValueError(
            f"Argument `images` must hold images of one size, dtype and device, but the list holds {found}. Resize and "
            "move them first."
        )
    return torch.cat(batches)


def _picture(pixels: np.ndarray) -> Image.Image:
    """uint8 (H, W) or (H, W, C)."""
    if pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (1, 3, 4)) or not pixels.size:
        raise ValueError(
            f"Argument `images` must have uint8 pixels (H, W, C) with 1, 3 or 4 channels, but it has {pixels.shape}. "
            "Channels come last in an array, first in a tensor."
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _prepared(picture: Image.Image, preprocessing: Preprocessing | None) -> Tensor:
    if preprocessing is None:
        raise ValueError(
            "Argument `images` holds pictures, which only models of greyscale or RGB images can prepare. Pass "
            "normalised tensors (B, C, H, W)."
        )
    try:
        return preprocessing.transform()(as_viewed(picture, preprocessing.mode))
    except (OSError, ValueError) as error:
        raise ValueError(f"Argument `images` holds a picture that can't be read: {error}.") from error
