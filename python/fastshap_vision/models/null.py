"""v(∅) of a model in evaluation, which is the same at every call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..games.base import Game
from ..games.hooks import has_global_hooks, has_hooks, is_overridden

#: Elements of each tensor that are compared.
_COMPARED = 64


class _Known(NamedTuple):
    state: tuple[Any, ...]
    samples: list[Tensor]  # views of the weights
    content: Tensor  # of the samples, at the time of `null`
    null: Tensor


class KeptNull:
    """Gives `game.null()`, computed again only where something that it depends on may have changed.

    Where a class token reads what is left, it takes a pass through all weights for one token. It is kept on the CPU,
    without gradients and in evaluation mode, for transformers whose blocks are timm's own and have no hooks. Of weights
    that are written through `.data`, which PyTorch does not count, some elements are compared.
    """

    def __init__(self, game: Game) -> None:
        self._game = game
        self._known: _Known | None = None

    def __call__(self) -> Tensor:
        if self._game.patches_vote or not self._game.packs or torch.is_grad_enabled():
            return self._game.null()
        tensors = None if torch.compiler.is_compiling() or has_global_hooks() else _weights(self._game.backbone)
        if tensors is None:
            self._known = None
            return self._game.null()
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        state = (autocast, *[(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors])
        known = self._known
        if known is None or known.state != state or not torch.equal(torch.cat(known.samples), known.content):
            samples = [_sample(tensor) for tensor in tensors]
            self._known = known = _Known(state, samples, torch.cat(samples), self._game.null())
        return known.null.clone()


def _weights(backbone: nn.Module) -> list[Tensor] | None:
    """Parameters and buffers; None where one of them, or what a module does, may change unseen."""
    found: list[Tensor] = []
    for module in backbone.modules():
        if module.training or has_hooks(module) or is_overridden(module):
            return None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None:
                continue
            if tensor.device.type != "cpu" or tensor.is_inference() or not _is_dense(tensor):
                return None
            found.append(tensor)
    return found


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _sample(tensor: Tensor) -> Tensor:
    """A view of elements evenly spread over a dense tensor, 64 to 127 of a larger one."""
    step = max(1, tensor.numel() // _COMPARED)
    return tensor.detach().as_strided((-(-tensor.numel() // step),), (step,))
