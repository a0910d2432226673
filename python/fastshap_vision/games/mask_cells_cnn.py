"""timm's convolutional networks on their feature grid: cells of pixels are removed, or of the stem's output."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.convnext import ConvNeXtBlock
from torch import Tensor, nn

from fastshap_kernels import coalition_sum, mask_patches

from .._checks import check_choice
from .._modes import evaluation_mode
from .base import SUPPORTED, Features, JointPass, UnsupportedModelError, pass_of_nothing
from .coalitions import Coalitions
from .features import forward_features
from .hooks import check_backbone
from .probe import is_close, perturbed, probe_features
from .readout import check_votes, linear_classifier, read_images, vote
from .stem import split_at_stem

REMOVALS = ("cell", "stem")


class CellRemoval:
    """The game of a convolutional network: each feature-map cell is a player, and what absent cells see is 0.

    With a linear classifier behind the average, present cells vote: v_x(S) = Σ_{p∈S} (W e_p(x_S) + b)/P. With a norm
    or non-linearity behind it (ConvNeXt, MobileNetV3), v_x(S) = classifier(Σ_{p∈S} e_p(x_S)/P).

    x_S is, by `removal`:

    - "cell": the image with the pixels of absent cells at 0. Images are expected after normalisation, so 0 is the
      mean colour.
    - "stem": the stem's output of the whole image, with the cells of absent players at 0. The stem (the layers
      before the first block) runs once per image instead of once per coalition, in training too: its batch norm sees
      each image once, that of later layers sees every coalition. 0 is no response of the stem, and what later layers
      find outside of the image through their own zero padding. Where the stem's windows reach over a patch's border,
      so does what removal leaves: pixels of an absent patch within that reach still act on the stem's cells of its
      present neighbours (5 pixels in ResNet, 7 if its stem is deep, 1 in RegNet, EfficientNet and MobileNetV3, none in
      ConvNeXt), and NaN there spreads. That is not little: in untrained networks on noise, v(S) moved by 0.46
      (ResNet-18), 0.35 (RegNetX-200MF) and 0.08 (EfficientNet-B0) of what new present pixels did when all absent ones
      were new. Use "cell" where removed pixels must not act at all.

    What "stem" saves is the stem's share: 6 % of ResNet-50's time at 224, and nothing in EfficientNet, whose stem is
    cheaper than masking its output, which is larger than the image.

    Coalitions run in channels_last and in the compute dtype (autocast's, else the model's), as `mask_patches` writes
    them. Weights keep the memory format that the user gave them.

    The network's own `forward_head` on a 1×1 map is its classifier on pooled features: no family needs its own code.

    Raises:
        UnsupportedModelError: for a network without a feature map, global average pooling or a linear classifier, or,
            with "stem", a family whose stem is not known.
    """

    packs = False

    def __init__(
        self, backbone: nn.Module, votes: bool, input_size: tuple[int, int, int], removal: str = "cell"
    ) -> None:
        check_choice("removal", removal, REMOVALS)
        self.backbone: Any = backbone
        self.input_size = input_size
        self.view = input_size[1:]
        self.removal = removal
        features = probe_features(self.backbone, input_size)
        self.grid: tuple[int, int] = (features.shape[2], features.shape[3])
        self.players = self.grid[0] * self.grid[1]
        if input_size[1] % self.grid[0] or input_size[2] % self.grid[1]:
            raise UnsupportedModelError(
                f"The feature grid {self.grid} does not divide the image size {input_size[1:]}, so a cell has no patch "
                "of pixels of its own. Choose an image size that is a multiple of the network's reduction."
            )
        self.split = split_at_stem(backbone, input_size, self.grid) if removal == "stem" else None
        is_classified, is_average = _probe_head(self.backbone, features)
        check_votes(self.backbone, votes, is_classified)
        averages_linearly = is_classified and is_average
        self.feature_width = self._vote_features(features).shape[2]
        self.intermediate_widths: list[int] = []
        self.patches_vote = votes or averages_linearly
        self.is_exact_conversion = averages_linearly or not votes

    def features_and_logits(self, images: Tensor) -> tuple[Features, Tensor]:
        """The full image, through timm's own forward pass: its features, and logits (B, K)."""
        check_backbone(self.backbone)
        if not len(images):
            return pass_of_nothing(self)[:2]
        return self._read_images(*forward_features(self, images, len(images)))

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor:
        """v(S) of every coalition: (B, M, K)."""
        check_backbone(self.backbone)
        inputs, dtype = self._inputs(images)
        masked = mask_patches(inputs, coalitions.bits, self.grid, dtype=dtype)
        feature_map = self.backbone.forward_features(masked) if self.split is None else self.split.behind_stem(masked)
        return self._read_values(feature_map, coalitions)

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass:
        """Full images and coalitions in one batch, so that batch norm sees both."""
        check_backbone(self.backbone)
        if not len(images):
            return pass_of_nothing(self, coalitions.count)
        inputs, dtype = self._inputs(images)
        masked = mask_patches(inputs, coalitions.bits, self.grid, dtype=dtype)
        both = torch.cat([inputs.to(dtype), masked])
        feature_map, earlier = (
            forward_features(self, both, len(inputs)) if self.split is None else (self.split.behind_stem(both), [])
        )
        image_map, coalition_map = feature_map.split([inputs.shape[0], masked.shape[0]])
        features, logits = self._read_images(image_map, earlier)
        return JointPass(features, logits, self._read_values(coalition_map, coalitions))

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where cells vote."""
        weight, _ = self.vote_weight()
        if self.patches_vote:
            return weight.new_zeros(weight.shape[0])
        return self.backbone.forward_head(weight.new_zeros(1, self.backbone.num_features, 1, 1))[0]

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the votes."""
        return linear_classifier(self.backbone)

    def explanation_block(self, width: int) -> nn.Module:
        """A convolutional block on the feature grid: ConvNeXt's, which needs no batch statistics."""
        return _GridBlock(width, self.grid)

    def _inputs(self, images: Tensor) -> tuple[Tensor, torch.dtype]:
        """What cells are removed from, images or the stem's output, in channels_last; and the dtype of the result."""
        device = images.device.type
        dtype = self.vote_weight()[0].dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        if self.split is None:
            return images.contiguous(memory_format=torch.channels_last), dtype
        stem_map = self.split.stem(images.to(dtype, memory_format=torch.channels_last))
        return stem_map, stem_map.dtype

    def _read_images(self, feature_map: Tensor, earlier: list[Tensor]) -> tuple[Features, Tensor]:
        """Features and logits (B, K) of the images' map (B, L', h, w); `earlier`, (B, P, C) each."""
        return read_images(self, feature_map, self._vote_features(feature_map), earlier)

    def _vote_features(self, feature_map: Tensor) -> Tensor:
        """(N, L', h, w) → (N, P, L): what the classifier would see if a cell were the whole image."""
        cells = feature_map.flatten(2).mT
        before_linear = self.backbone.forward_head(cells.flatten(0, 1)[:, :, None, None], pre_logits=True)
        return before_linear.unflatten(0, cells.shape[:2])

    def _read_values(self, feature_map: Tensor, coalitions: Coalitions) -> Tensor:
        """(B·M, L', h, w) → (B, M, K)."""
        each = coalitions.bits.flatten(0, 1).unsqueeze(1)
        if self.patches_vote:
            features = self._vote_features(feature_map)
            pooled = coalition_sum(features, each)[:, 0] / self.players
            values = vote(self.backbone, pooled, coalitions.sizes.view(-1, 1), self.players)
        else:
            pooled = coalition_sum(feature_map.flatten(2).transpose(1, 2), each)[:, 0] / self.players
            values = self.backbone.forward_head(pooled[:, :, None, None])
        return values.unflatten(0, coalitions.bits.shape[:2])


class _GridBlock(nn.Module):
    """A ConvNeXt block on features (B, P, L) laid out as their grid."""

    def __init__(self, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.grid = grid
        self.block = ConvNeXtBlock(width, kernel_size=3, ls_init_value=None)

    def forward(self, features: Tensor) -> Tensor:
        cells = features.transpose(1, 2).unflatten(2, self.grid)
        return self.block(cells).flatten(2).transpose(1, 2)


@torch.no_grad()
def _probe_head(backbone: Any, features: Tensor) -> tuple[bool, bool]:
    """Whether the classifier is all that follows the pre-logits, and whether they are the averaged features.

    An error if the features are not averaged.
    """
    with evaluation_mode(backbone), perturbed(backbone):
        linear_classifier(backbone)  # an error if there is none
        average = features.mean((2, 3), keepdim=True)
        logits = backbone.forward_head(features)
        if not is_close(backbone.forward_head(average), logits):
            name, pool = type(backbone).__name__, _pool_type(backbone)
            if pool not in (None, "avg"):
                raise UnsupportedModelError(
                    f"This {name} pools by {pool!r}, not by global averaging.", "Create it with global_pool='avg'."
                )
            raise UnsupportedModelError(f"The head of {name} does not just average the feature map. {SUPPORTED}")
        before_linear = backbone.forward_head(average, pre_logits=True)
        is_classified = is_close(vote(backbone, before_linear), logits)
        return is_classified, bool(torch.equal(before_linear, average[:, :, 0, 0]))


def _pool_type(backbone: Any) -> str | None:
    """timm's name of the pooling behind the feature map, where the model tells."""
    for holder in (backbone, getattr(backbone, "head", None)):
        pool = getattr(holder, "global_pool", None)
        name = pool if isinstance(pool, str) else getattr(pool, "pool_type", None)
        if isinstance(name, str):
            return name
    return None
