"""Which game explains a model: how the patches outside a coalition are removed from its input."""

from __future__ import annotations

import logging
from typing import Any

from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from .._log import say_once
from .base import Game, UnsupportedModelError
from .drop_tokens_eva import EvaGame
from .drop_tokens_vit import VisionTransformerGame
from .features import probe_widths
from .mask_attention import MaskedAttention
from .mask_cells_cnn import CellRemoval
from .mask_cells_tokens import TokenCellRemoval
from .mask_image import WholeImageCells, WholeImageTokens
from .probe import probe_output

#: "token": the token is taken out of the sequence. "cell": the patch's pixels become 0, and its cell is left out of the
#: average. "stem": what a convolutional network's stem makes of the patch becomes 0, likewise. "pixel": its pixels
#: become 0, and the model sees that image as any other.
REMOVALS = ("token", "cell", "stem", "pixel")


def make_game(
    backbone: Any,
    votes: bool,
    input_size: tuple[int, int, int],
    removal: str | None,
    intermediates: bool = False,
) -> tuple[Game, str]:
    """The game of a timm model, and its removal, chosen where it is None: "token" if the model can, else "cell".

    Within "token", packed tokens come before attention masks. A choice slower than packed tokens is logged once.

    With `intermediates` it gives the features of every stage beside the last ones.

    Raises:
        UnsupportedModelError: for a model that has no such game, or whose images are one patch.
        ValueError: for `intermediates` with a removal that runs the network in parts.
    """
    if isinstance(backbone, VisionTransformer | Eva) and not len(backbone.blocks):
        raise UnsupportedModelError(
            f"This {type(backbone).__name__} has no block (depth 0), and the explaining layers are like its last one.",
            "Create it with depth=1 or more.",
        )
    game, chosen = _choose_game(backbone, votes, input_size, removal)
    if game.players < 2:
        stages = getattr(backbone, "feature_info", [])
        side = max((stage["reduction"] for stage in stages), default=max(input_size[1:]))  # of a patch, in pixels
        raise UnsupportedModelError(
            f"This {type(backbone).__name__} sees an image of {input_size[1:]} pixels as one patch, and two are needed "
            "for shares.",
            f"Pass img_size={2 * side}, or make the patches smaller (patch_size) where the model has such.",
        )
    if intermediates and chosen == "stem":
        raise ValueError(
            "Argument `intermediates` can't be True with removal='stem', which runs the network in parts. Use "
            "removal='cell'."
        )
    if intermediates:
        game.intermediate_widths = probe_widths(game)
    return game, chosen


def _choose_game(backbone: Any, votes: bool, input_size: tuple[int, int, int], removal: str | None) -> tuple[Game, str]:
    if removal in (None, "token"):
        try:
            return _drop_tokens(backbone, votes), "token"
        except UnsupportedModelError as error:
            if removal == "token":
                raise UnsupportedModelError(
                    str(error), "Or pass removal='cell', or None for the best it can."
                ) from error
            reason = error.reason
    output = probe_output(backbone, input_size)
    is_map = output.ndim == 4 and output.shape[1] == backbone.num_features
    if removal == "pixel":
        return (WholeImageCells if is_map else WholeImageTokens)(backbone, votes, input_size), removal
    if is_map:
        if removal is None:
            say_once(f"A {type(backbone).__name__} is explained by cell removal.", logging.INFO)
        return CellRemoval(backbone, votes, input_size, removal or "cell"), removal or "cell"
    if removal == "stem":
        raise UnsupportedModelError(
            f"Argument `removal` can be 'stem' for convolutional networks, but the model is a "
            f"{type(backbone).__name__}. Pass removal='cell', or None for the best it can."
        )
    game = TokenCellRemoval(backbone, votes, input_size)
    if removal is None:
        say_once(f"{reason} Its cells are removed instead: another game, and all tokens are computed.", logging.WARNING)
    return game, "cell"


def _drop_tokens(backbone: Any, votes: bool) -> Game:
    """Packed tokens, or attention masks where packing does not know the model's blocks."""
    if not isinstance(backbone, VisionTransformer | Eva):
        raise UnsupportedModelError(
            f"A {type(backbone).__name__} can't drop tokens, which needs timm's VisionTransformer or Eva."
        )
    try:
        return EvaGame(backbone, votes) if isinstance(backbone, Eva) else VisionTransformerGame(backbone, votes)
    except UnsupportedModelError as error:
        game = MaskedAttention(backbone, votes)
        game.check_blocks()
        say_once(
            f"{error.reason} Attention to absent tokens is masked instead: the same values, but all are computed.",
            logging.WARNING,
        )
        return game
