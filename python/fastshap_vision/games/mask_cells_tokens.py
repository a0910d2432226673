"""Models that end in tokens: absent patches' pixels are 0, and every token stays.

That reaches transformers whose tokens can't be dropped: windows (Swin), hybrid stems, pooling between the stages,
mixers.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.layers import PatchDropout, PatchDropoutWithIndices
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from fastshap_kernels import coalition_sum, mask_patches

from .._modes import evaluation_mode
from .base import SUPPORTED, Features, JointPass, UnsupportedModelError, pass_of_nothing
from .coalitions import Coalitions
from .features import forward_features
from .hooks import check_backbone
from .probe import empty_image_value, is_close, perturbed, probe_output
from .readout import check_votes, linear_classifier, read_images, vote


class TokenCellRemoval:
    """The game of a model that ends in tokens (N, Q + P, L) or in a feature map (N, h, w, L): its cells are players.

    Images are expected after normalisation, so 0 is the mean colour. What v(S) reads depends on the model:

    - averaged patches before a linear classifier vote: v_x(S) = Σ_{p∈S} (W e_p(x_S) + b)/P, and v(∅) = 0;
    - with a norm or non-linearity behind the average, v_x(S) = classifier(Σ_{p∈S} e_p(x_S)/P);
    - with a class token or any other pooling, v_x(S) is the model's output on the masked image, and v(∅) that on an
      image of zeros.
    """

    packs = False

    def __init__(self, backbone: nn.Module, votes: bool, input_size: tuple[int, int, int]) -> None:
        self.backbone: Any = backbone
        self.input_size = input_size
        self.view = input_size[1:]
        if any(isinstance(part, PatchDropout | PatchDropoutWithIndices) for part in backbone.modules()):
            raise UnsupportedModelError(
                f"This {type(backbone).__name__} has patch_drop_rate > 0, which drops players in training. Create it "
                "without this option."
            )
        output = probe_output(self.backbone, input_size)
        self.prefix, self.grid = _layout(self.backbone, output, input_size)
        self.players = self.grid[0] * self.grid[1]
        if input_size[1] % self.grid[0] or input_size[2] % self.grid[1]:
            raise UnsupportedModelError(
                f"The grid {self.grid} of tokens does not divide the image size {input_size[1:]}, so a token has no "
                "patch of pixels of its own. Choose an image size that is a multiple of the patch size."
            )
        self._is_map = output.ndim == 4
        self._averages, is_classified, is_average = self._probe_head(output)
        check_votes(self.backbone, votes, is_classified)
        self.feature_width = self._features(output).shape[2]
        self.intermediate_widths: list[int] = []
        if self.vote_weight()[0].shape[1] != self.feature_width:
            raise UnsupportedModelError(
                f"The classifier of {type(backbone).__name__} reads {self.vote_weight()[0].shape[1]} features, but its "
                f"tokens have {self.feature_width}. {SUPPORTED}"
            )
        averages_linearly = self._averages and is_classified and is_average
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
        masked = mask_patches(images, coalitions.bits, self.grid)
        return self._read_values(self.backbone.forward_features(masked), coalitions)

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass:
        """Full images and coalitions in one batch."""
        check_backbone(self.backbone)
        if not len(images):
            return pass_of_nothing(self, coalitions.count)
        masked = mask_patches(images, coalitions.bits, self.grid)
        output, earlier = forward_features(self, torch.cat([images, masked]), len(images))
        of_images, of_coalitions = output.split([images.shape[0], masked.shape[0]])
        features, logits = self._read_images(of_images, earlier)
        return JointPass(features, logits, self._read_values(of_coalitions, coalitions))

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        weight, _ = self.vote_weight()
        if self.patches_vote:
            return weight.new_zeros(weight.shape[0])
        if self._averages:
            return self.backbone.forward_head(self._one_cell(weight.new_zeros(1, self.backbone.num_features)))[0]
        return empty_image_value(self.backbone, self.input_size)

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the votes; a distilled model's two classifiers are averaged, as in its own forward pass."""
        return linear_classifier(self.backbone)

    def explanation_block(self, width: int) -> nn.Module:
        """A transformer block on the tokens."""
        heads = next(n for n in range(max(1, width // 64), 0, -1) if width % n == 0)
        return Block(width, heads, qkv_bias=True)

    def _cells(self, output: Tensor) -> Tensor:
        """The tokens of the players: (N, P, L')."""
        return output.flatten(1, 2) if self._is_map else output[:, self.prefix :]

    def _one_cell(self, cells: Tensor) -> Tensor:
        """Cells (N, L') as outputs with that cell alone, which the model's own head then reads."""
        if self._is_map:
            return cells[:, None, None, :]
        return torch.cat([cells.new_zeros(cells.shape[0], self.prefix, cells.shape[1]), cells[:, None]], 1)

    def _features(self, output: Tensor) -> Tensor:
        """(N, P, L), what the classifier would see if a cell were the whole image."""
        cells = self._cells(output)
        if not self._averages:
            return cells
        read = self.backbone.forward_head(self._one_cell(cells.flatten(0, 1)), pre_logits=True)
        return read.unflatten(0, cells.shape[:2])

    def _read_images(self, output: Tensor, earlier: list[Tensor]) -> tuple[Features, Tensor]:
        """Features and logits (B, K) of the full images; `earlier` (B, P, C) each."""
        return read_images(self, output, self._features(output), earlier)

    def _read_values(self, output: Tensor, coalitions: Coalitions) -> Tensor:
        """The outputs (B·M, …) of the masked images → (B, M, K)."""
        each = coalitions.bits.flatten(0, 1).unsqueeze(1)
        if self.patches_vote:
            features = self._features(output)
            pooled = coalition_sum(features, each)[:, 0] / self.players
            values = vote(self.backbone, pooled, coalitions.sizes.view(-1, 1), self.players)
        elif self._averages:
            pooled = coalition_sum(self._cells(output), each)[:, 0] / self.players
            values = self.backbone.forward_head(self._one_cell(pooled))
        else:
            values = self.backbone.forward_head(output)
        return values.unflatten(0, coalitions.bits.shape[:2])

    @torch.no_grad()
    def _probe_head(self, output: Tensor) -> tuple[bool, bool, bool]:
        """Whether the head averages the cells, whether a linear classifier is all that then follows the pre-logits,
        and whether these are the average itself."""
        backbone = self.backbone
        with evaluation_mode(backbone), perturbed(backbone):
            linear_classifier(backbone)  # an error if there is none
            average = self._cells(output).mean(1)
            logits, expected = backbone.forward_head(output), backbone.forward_head(output, pre_logits=True)
            is_classified = expected.ndim == 2 and is_close(vote(backbone, expected), logits)
            try:
                found = backbone.forward_head(self._one_cell(average), pre_logits=True)
            except (RuntimeError, AssertionError):
                return False, is_classified, False  # the head wants all the cells
        return is_close(found, expected), is_classified, is_close(found, average)


def _layout(backbone: Any, output: Tensor, input_size: tuple[int, int, int]) -> tuple[int, tuple[int, int]]:
    """Q and the grid (h, w) of an output (N, h, w, L) or (N, Q + P, L)."""
    if output.ndim == 4:
        return 0, (output.shape[1], output.shape[2])
    given = getattr(getattr(backbone, "patch_embed", None), "grid_size", None) or (0, 0)
    known = getattr(backbone, "num_prefix_tokens", None)
    for prefix in (0, 1, 2) if known is None else (known,):
        players = output.shape[1] - prefix
        grid = (given[0], given[1]) if 1 < players == given[0] * given[1] else _grid(players, input_size)
        if grid is not None:
            return prefix, grid
    raise UnsupportedModelError(
        f"{type(backbone).__name__} ends in {output.shape[1]} token(s), which are no grid of patches of images "
        f"{input_size}. {SUPPORTED}"
    )


def _grid(players: int, input_size: tuple[int, int, int]) -> tuple[int, int] | None:
    """The grid of at least two square patches that an image is cut into, if there is one."""
    _, height, width = input_size
    if players < 2:
        return None
    rows = math.isqrt(players * height // width)
    if rows < 1 or players % rows or rows * width != players // rows * height:
        return None
    return rows, players // rows
