"""What a model's input must be."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import check_dense

from .._checks import check_choice, check_classes

_HALF_OR_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def check_images(model: nn.Module, expected: tuple[int, int, int], images: Tensor) -> None:
    """Whether images are (B, *expected), on the device and in the dtype of the model."""
    form = f"(B, {', '.join(map(str, expected))})"
    check_dense("SelfExplainingClassifier", "images", images, f"a tensor {form}", "Pass model.preprocess(images).")
    if images.ndim != 4 or tuple(images.shape[1:]) != expected:
        raise ValueError(
            f"Argument `images` must be a tensor {form}, but it is {tuple(images.shape)}. Resize the images, or "
            "create the model with another img_size or in_chans."
        )
    weight = next(model.parameters())
    if images.device != weight.device and weight.device.type != "meta":  # where accelerate keeps it elsewhere
        raise ValueError(
            f"Argument `images` must be on the model's device, {weight.device}, but it is on {images.device}. Pass "
            f"images.to({str(weight.device)!r})."
        )
    if not images.is_floating_point():
        raise ValueError(
            f"Argument `images` must be normalised {weight.dtype}, but it is {images.dtype}. Pass uint8 pixels to "
            "model.preprocess(images), which normalises them."
        )
    is_cast = torch.is_autocast_enabled(images.device.type) and images.dtype in _HALF_OR_SINGLE
    if images.dtype != weight.dtype and not is_cast:
        raise ValueError(
            f"Argument `images` must be {weight.dtype} like the model's weights, but it is {images.dtype}. Pass "
            f"images.to({weight.dtype})."
        )


def chosen_classes(op: str, target: int | Sequence[int] | Tensor | str | None, logits: Tensor) -> Tensor | None:
    """The class of each image that is explained, int64 (B,), of logits (B, K); None for all."""
    batch, classes = logits.shape
    if target is None:
        return logits.argmax(1)
    if isinstance(target, str):
        check_choice("target", target, ("all",))
        return None
    return check_classes(op, "target", target, batch, classes, "None, 'all', ").to(logits.device).clone()
