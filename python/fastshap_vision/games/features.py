"""What an encoder computes on its way, for the shares to read beside its last features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .._modes import evaluation_mode
from .._runtime.packed_sdpa import cpu_attention
from .base import Game, UnsupportedModelError
from .probe import is_close, perturbed, probe_images


def forward_features(game: Game, inputs: Tensor, images: int) -> tuple[Tensor, list[Tensor]]:
    """timm's `forward_features` of the inputs, and where the game wants them the features before, of the first images.

    Those are (images, P, C) of every stage but the last; maps finer than the grid are averaged to it.
    """
    with cpu_attention(inputs, game.backbone):
        if not game.intermediate_widths:
            return game.backbone.forward_features(inputs), []
        return _forward_with_intermediates(game, inputs, images)


def _forward_with_intermediates(game: Game, inputs: Tensor, images: int) -> tuple[Tensor, list[Tensor]]:
    if game.packs:  # tokens stay tokens: no map is made of them and taken apart again
        output, stages = game.backbone.forward_intermediates(inputs, output_fmt="NLC")
        return output, [stage[:images] for stage in stages[:-1]]
    output, maps = game.backbone.forward_intermediates(inputs)
    return output, [_to_grid(stage[:images], game.grid).flatten(2).mT for stage in maps[:-1]]


def _to_grid(stage: Tensor, grid: tuple[int, int]) -> Tensor:
    """Averages a finer map (B, C, H, W) to the grid; one that has it already is not read through."""
    return stage if stage.shape[-2:] == grid else functional.adaptive_avg_pool2d(stage, grid)


@torch.no_grad()
def probe_widths(game: Game) -> list[int]:
    """C of every stage before the last.

    Raises:
        UnsupportedModelError: for a model with one stage, or whose `forward_intermediates` is not its forward pass.
    """
    backbone = game.backbone
    images, name = probe_images(backbone, game.input_size), type(backbone).__name__
    remedy = "Use `intermediates=False`."
    with evaluation_mode(backbone), perturbed(backbone):
        try:
            output, stages = _forward_with_intermediates(game, images, len(images))
        except (AttributeError, AssertionError, TypeError, RuntimeError) as error:
            raise UnsupportedModelError(f"{name} gives no intermediate features: {error}.", remedy) from error
        expected = backbone.forward_features(images)
    if not is_close(output, expected):
        raise UnsupportedModelError(f"{name} computes other features beside its intermediate ones.", remedy)
    if not stages:
        raise UnsupportedModelError(f"This {name} has one stage, so there are no features before its last.", remedy)
    return [stage.shape[2] for stage in stages]
