"""v(∅) of a model in evaluation, which is the same at every call."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..games.base import Game
from ..games.hooks import has_global_hooks, has_hooks, is_overridden


class KeptNull:
    """Gives `game.null()`, computed again only where something that it depends on may have changed.

    Where a class token reads what is left, it takes a pass through all weights for one token. It is kept on the CPU,
    without gradients and in evaluation mode, for transformers whose blocks are timm's own and have no hooks. Of weights
    that are written through `.data`, which PyTorch does not count, some elements are compared.
    """

    def __init__(self, game: Game) -> None:
        self._game = game
        self._known: tuple[Any, Tensor, Tensor] | None = None  # state, fingerprint, v(∅)

    def __call__(self) -> Tensor:
        if not self._is_kept():
            return self._game.null()
        tensors = list(chain(self._game.backbone.parameters(), self._game.backbone.buffers()))
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        state = (autocast, *((id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors))
        # What is written through `.data` counts as no new version: some elements of every tensor are compared.
        fingerprint = torch.cat([_sample(tensor.detach()).double() for tensor in tensors])
        if self._known is None or self._known[0] != state or not torch.equal(self._known[1], fingerprint):
            self._known = state, fingerprint, self._game.null()
        return self._known[2].clone()

    def _is_kept(self) -> bool:
        backbone: nn.Module = self._game.backbone
        if self._game.patches_vote or torch.is_grad_enabled() or torch.compiler.is_compiling() or has_global_hooks():
            return False
        if not self._game.packs:
            return False
        if any(module.training or has_hooks(module) or is_overridden(module) for module in backbone.modules()):
            return False
        return all(
            tensor.device.type == "cpu" and not tensor.is_inference()
            for tensor in chain(backbone.parameters(), backbone.buffers())
        )


def _sample(tensor: Tensor) -> Tensor:
    """Elements evenly spread over a tensor, 64 to 127 of a larger one."""
    flat = tensor.reshape(-1)
    return flat[:: max(1, len(flat) // 64)]
