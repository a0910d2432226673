"""What methods of attribution are given, what they promise, and what they share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fastshap_vision as fv
from fastshap_kernels._checks import fail

#: Masked images, or images with their gradients, in one forward pass.
AT_ONCE = 256


class Game(Protocol):
    """The game of leave-one-out and KernelSHAP: a `SelfExplainingClassifier`, a `MaskedImageGame`, or the like."""

    players: int  # P
    grid: tuple[int, int]  # (h, w)

    def coalition_values(self, images: Tensor, bits: Tensor) -> Tensor: ...  # (B, M, K)


@dataclass(frozen=True)
class Subject:
    """A model to explain, and the game whose patches are explained.

    Args:
        model: a timm VisionTransformer, or a timm CNN that ends in a feature map; images (B, C, H, W) → logits (B, K).
        game: gives the grid, and v(S) to the methods that evaluate coalitions.
    """

    model: Any
    game: Game

    @classmethod
    def of(cls, classifier: fv.SelfExplainingClassifier) -> Subject:
        """The timm model inside of a self-explaining one, in that model's own game.

        Raises:
            ValueError: where its logits are not the timm model's.
        """
        if not classifier.is_exact_conversion:
            fail("Subject.of", "classifier", "one whose logits are its backbone's", type(classifier.head))
        return cls(classifier.backbone, classifier)

    @property
    def grid(self) -> tuple[int, int]:
        return self.game.grid

    @property
    def players(self) -> int:
        return self.game.players

    @property
    def family(self) -> str:
        return "vit" if isinstance(self.model, VisionTransformer) else "cnn"


Attribute = Callable[[Subject, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Method:
    """A method of attribution; call it with a subject, images (B, C, H, W) and target, int64 (B,).

    Args:
        name: for tables.
        families: of models that it serves, of "vit" and "cnn".
        evaluations: players → forward passes that an image costs; a backward pass counts as two more.
        attribute: what it does, once arguments are checked and the model is in evaluation mode.
    """

    name: str
    families: tuple[str, ...]
    evaluations: Callable[[int], int]
    attribute: Attribute

    def __call__(self, subject: Subject, images: Tensor, target: Tensor) -> Tensor:
        """Attributions (B, P), float32, without gradient. Modes, flags and random states are left as they were.

        Raises:
            ValueError: for a family that is not served, no image, an image that the grid does not divide, or a bad
                target.

        Deterministic: as the model is; noise and samples follow from fixed seeds.
        """
        if subject.family not in self.families:
            fail(self.name, "subject", f"a model of {' or '.join(self.families)}", type(subject.model).__name__)
        if not isinstance(images, Tensor) or images.ndim != 4 or len(images) == 0:
            fail(self.name, "images", "a tensor (B, C, H, W) of at least one image", images)
        patch_size(images, subject.grid)
        check_target(self.name, target, images, subject.model.num_classes)
        with evaluating(subject.model, subject.game):
            return self.attribute(subject, images.detach(), target).detach().float()


def check_target(op: str, target: Tensor, images: Tensor, classes: int) -> None:
    """One class per image."""
    remedy = "Give one class per image, on the images' device."
    expected = f"int64 ({len(images)},) in [0, {classes}) on {images.device}"
    if not isinstance(target, Tensor) or target.dtype != torch.int64 or target.shape != images.shape[:1]:
        fail(op, "target", expected, target, remedy)
    if target.device != images.device:
        fail(op, "target", expected, target, remedy)
    if bool((target < 0).any() or (target >= classes).any()):
        fail(op, "target", expected, target.tolist(), remedy)


@contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    roots = [model for model in models if isinstance(model, nn.Module)]
    modes = [(module, module.training) for root in roots for module in root.modules()]
    for root in roots:
        root.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """captum draws from PyTorch's global generator: seeded here, and put back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def patch_size(images: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """Pixels of a patch, (H/h, W/w)."""
    height, width = images.shape[-2:]
    if height % grid[0] or width % grid[1]:
        fail("patch_size", "images", f"of a size that the grid {grid} divides", images)
    return height // grid[0], width // grid[1]


def to_patches(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """Sums over the pixels, and channels, of each patch: (B, C, H, W) or (B, H, W) → (B, P), row by row."""
    if maps.ndim == 4:
        maps = maps.sum(1)
    height, width = patch_size(maps, grid)
    return maps.unflatten(2, (grid[1], width)).unflatten(1, (grid[0], height)).sum((2, 4)).flatten(1)


def in_parts(call: Callable[[Tensor, Tensor], Tensor], images: Tensor, target: Tensor, rows: int) -> Tensor:
    """`call` on parts of the images; `rows` is how many images in a forward pass each of them becomes."""
    count = max(1, AT_ONCE // rows)
    parts = zip(images.split(count), target.split(count), strict=True)
    return torch.cat([call(image, of) for image, of in parts])


def of_target(values: Tensor, target: Tensor) -> Tensor:
    """(B, M, K) → (B, M), each image's class `target`."""
    return values.gather(2, target.view(-1, 1, 1).expand(-1, values.shape[1], 1))[..., 0]
