"""Any timm model on whole masked images: as in RISE, FastSHAP and ViaSHAP, and what grey patches mean to most."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import UnsupportedModelError
from .coalitions import Coalitions
from .mask_cells_cnn import CellRemoval
from .mask_cells_tokens import TokenCellRemoval
from .probe import empty_image_value


class _WholeImage:
    """v_x(S) is the model's output on the image with absent patches' pixels at 0, absent cells and all.

    So v(∅) is its output on an image of zeros, and `fv.MaskedImageGame` with the mean colour is the same game. With
    "cell" the same image is masked, and what the model makes of the absent cells is left out.
    """

    backbone: Any
    input_size: tuple[int, int, int]

    def __init__(self, backbone: nn.Module, votes: bool, input_size: tuple[int, int, int]) -> None:
        if votes:
            raise UnsupportedModelError(
                "Argument `head` can't be 'votes' with removal='pixel', where absent patches act too. Use "
                "head='shares', or removal='cell'."
            )
        super().__init__(backbone, votes, input_size)  # type: ignore[call-arg]
        self.patches_vote = False

    def null(self) -> Tensor:
        """v(∅): (K,)."""
        return empty_image_value(self.backbone, self.input_size)

    def _read_values(self, output: Tensor, coalitions: Coalitions) -> Tensor:
        """What `forward_features` makes of B·M masked images → (B, M, K)."""
        return self.backbone.forward_head(output).unflatten(0, coalitions.bits.shape[:2])


class WholeImageCells(_WholeImage, CellRemoval):
    """Of a convolutional network."""


class WholeImageTokens(_WholeImage, TokenCellRemoval):
    """Of a model that ends in tokens."""
