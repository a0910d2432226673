"""How a network is tried before it is trusted: in evaluation mode, on random images, far from its initialisation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import evaluation_mode
from .base import SUPPORTED, UnsupportedModelError


@torch.no_grad()
def probe_features(backbone: Any, input_size: tuple[int, int, int]) -> Tensor:
    """The feature map (2, L', h, w) of random images; an error if the model has none."""
    try:
        with evaluation_mode(backbone):
            features = backbone.forward_features(probe_images(backbone, input_size))
    except (AttributeError, TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} computes no features of images {input_size}: {error}. {SUPPORTED}"
        ) from error
    if not isinstance(features, Tensor) or features.ndim != 4 or features.shape[1] != backbone.num_features:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} does not end in a feature map (B, L, h, w). {SUPPORTED}"
        )
    return features


def probe_images(backbone: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    """Two random images, the same at each call: (2, C, H, W)."""
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    return images.to(next(backbone.parameters()))


def is_close(found: Tensor, expected: Tensor) -> bool:
    """Within the rounding of a network's layers, relative to the largest."""
    tolerance = max(1e-3, 8 * torch.finfo(expected.dtype).eps)
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def perturbed(backbone: nn.Module) -> Iterator[None]:
    """Norms, scales, biases, statistics and zero matrices that are random for a while, and then what they were.

    At initialisation a norm may be the identity and a branch may add 0: what they do shows after training only.
    """
    generator = torch.Generator().manual_seed(0)
    # Written past autograd, so that a backward pass that is yet to come finds its tensors as it left them.
    changed = [(tensor.data, name) for name, tensor in _tensors(backbone) if _hides(name, tensor)]
    with torch.inference_mode():  # which may write to all tensors, those made in it too
        before = [tensor.clone() for tensor, _ in changed]
        for tensor, name in changed:
            drawn = torch.randn(tensor.shape, generator=generator).to(tensor)
            if name.endswith("running_var"):
                tensor.mul_(drawn.sigmoid() + 0.5)
            elif tensor.numel() > max(tensor.shape, default=1):
                tensor.copy_(drawn / tensor[0].numel() ** 0.5)
            else:
                tensor.add_(0.1 * (1 + tensor.abs()) * drawn)
    try:
        yield
    finally:
        with torch.inference_mode():
            for (tensor, _), old in zip(changed, before, strict=True):
                tensor.copy_(old)


def _tensors(backbone: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from ((name, tensor) for name, tensor in backbone.named_parameters() if tensor.is_floating_point())
    for name, tensor in backbone.named_buffers():
        if name.endswith(("running_mean", "running_var")):
            yield name, tensor


def _hides(name: str, tensor: Tensor) -> bool:
    """Whether a tensor may make its module the identity or 0: all but a matrix that is not 0."""
    is_vector = tensor.numel() == max(tensor.shape, default=1)
    return tensor.numel() > 0 and (is_vector or not bool(tensor.any()))


def empty_image_value(backbone: Any, input_size: tuple[int, int, int]) -> Tensor:
    """The output on an image of zeros, (K,)."""
    image = next(backbone.parameters()).new_zeros(1, *input_size)
    if not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in backbone.modules()):
        return backbone(image)[0]
    # It would be a batch without variance, and would spoil the running statistics.
    with evaluation_mode(backbone):
        return backbone(image)[0]


@torch.no_grad()
def probe_output(backbone: Any, input_size: tuple[int, int, int]) -> Tensor:
    """What `forward_features` makes of two random images; an error if that is no tensor of features."""
    try:
        with evaluation_mode(backbone):
            output = backbone.forward_features(probe_images(backbone, input_size))
    except (AttributeError, AssertionError, TypeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} computes no features of images {input_size}: {error}. {SUPPORTED}"
        ) from error
    if not isinstance(output, Tensor) or output.ndim not in (3, 4) or backbone.num_features not in output.shape[1:]:
        raise UnsupportedModelError(
            f"{type(backbone).__name__} ends neither in a feature map nor in tokens. {SUPPORTED}"
        )
    return output
