"""timm convolutional networks in two parts: the stem, and what runs behind it."""

from __future__ import annotations

from itertools import chain
from typing import Any, NamedTuple

import torch
from timm.models import ByobNet, ConvNeXt, EfficientNet, MobileNetV3, RegNet, ResNet, checkpoint_seq
from torch import Tensor, nn

from .._modes import evaluation_mode
from .base import UnsupportedModelError
from .probe import is_close, perturbed, probe_images


class _Parts(NamedTuple):
    """Names of a family's modules, in the order of its `forward_features`."""

    stem: tuple[str, ...]
    stages: tuple[str, ...]  # what the family checkpoints when asked to
    end: tuple[str, ...] = ()


_FAMILIES: dict[type[nn.Module], _Parts] = {
    ResNet: _Parts(("conv1", "bn1", "act1", "maxpool"), ("layer1", "layer2", "layer3", "layer4")),
    RegNet: _Parts(("stem",), ("s1", "s2", "s3", "s4"), ("final_conv",)),
    ByobNet: _Parts(("stem",), ("stages",), ("final_conv",)),
    EfficientNet: _Parts(("conv_stem", "bn1"), ("blocks",), ("conv_head", "bn2")),
    MobileNetV3: _Parts(("conv_stem", "bn1"), ("blocks",)),
    ConvNeXt: _Parts(("stem",), ("stages",), ("norm_pre",)),
}


class SplitNetwork:
    """`forward_features` of a timm network as `behind_stem(stem(images))`.

    Modules are looked up by name at each call, so that what the user replaces in the model is used.

    Raises:
        UnsupportedModelError: for a family whose stem is not known; the message names those that are.
    """

    def __init__(self, backbone: nn.Module) -> None:
        parts = _FAMILIES.get(type(backbone))
        if parts is None:
            raise UnsupportedModelError(
                f"Argument `removal` can't be 'stem' for {type(backbone).__name__}: its stem is not known. "
                f"Supported: timm's {', '.join(family.__name__ for family in _FAMILIES)}. Use removal='cell'."
            )
        self.backbone: Any = backbone
        self.parts = parts

    def stem(self, images: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', h', w')."""
        return self._run(self.parts.stem, images)

    def behind_stem(self, stem_map: Tensor) -> Tensor:
        """(N, C', h', w') → the feature map (N, L', h, w), with gradient checkpointing where the model has it on."""
        if getattr(self.backbone, "grad_checkpointing", False):
            stages = chain.from_iterable(getattr(self.backbone, name) for name in self.parts.stages)
            stage_map = checkpoint_seq(list(stages), stem_map)
        else:  # RegNet's and ConvNeXt's stages checkpoint themselves
            stage_map = self._run(self.parts.stages, stem_map)
        return self._run(self.parts.end, stage_map)

    def _run(self, names: tuple[str, ...], features: Tensor) -> Tensor:
        for name in names:
            features = getattr(self.backbone, name)(features)
        return features


@torch.no_grad()
def split_at_stem(backbone: nn.Module, input_size: tuple[int, int, int], grid: tuple[int, int]) -> SplitNetwork:
    """Splits a network, once it is sure that the parts make it up and that the grid divides the stem's output.

    Args:
        backbone: a timm model.
        input_size: (C, H, W) of an image.
        grid: (h, w) of the feature map.
    """
    split = SplitNetwork(backbone)
    images = probe_images(backbone, input_size)
    with evaluation_mode(backbone), perturbed(backbone):
        stem_map = split.stem(images)
        height, width = stem_map.shape[2:]
        if height % grid[0] or width % grid[1]:
            raise UnsupportedModelError(
                f"The feature grid {grid} does not divide the stem's output ({height}, {width}), so a cell has no part "
                "of it. Choose an image size that is a multiple of the network's reduction, or removal='cell'."
            )
        expected = split.backbone.forward_features(images)
        if not is_close(split.behind_stem(stem_map), expected):
            raise UnsupportedModelError(
                f"This {type(backbone).__name__}'s forward_features is more than its stem and stages, so "
                "removal='stem' would be another network's game. Use removal='cell'."
            )
    return split
