"""What an encoder computes on its way, for the shares to read beside its last features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .cpu_attention import cpu_attention
from .game import Game, UnsupportedModelError
from .probe import evaluation_mode, is_close, perturbed, probe_images


class MergedFeatures(nn.Module):
    """The last features plus a linear map of the normalised earlier ones: (B, P, L + ΣC) → (B, P, L).

    Args:
        width: L, of the last features, which come first.
        earlier_widths: C of each stage before the last.
    """

    def __init__(self, width: int, earlier_widths: list[int]) -> None:
        super().__init__()
        self.widths = [width, *earlier_widths]
        self.norms = nn.ModuleList(nn.LayerNorm(earlier) for earlier in earlier_widths)
        self.linear = nn.Linear(sum(earlier_widths), width)

    def forward(self, features: Tensor) -> Tensor:
        last, *earlier = features.split(self.widths, -1)
        normed = [norm(stage) for norm, stage in zip(self.norms, earlier, strict=True)]
        return last + self.linear(torch.cat(normed, -1))


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
    remedy = "Use intermediates=False."
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
