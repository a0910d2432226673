"""v(∅) of a model in evaluation, which is the same at every call."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._modes import every_module
from ..games.base import Game
from ..games.hooks import has_global_hooks, has_hooks, is_overridden

#: Elements of each tensor that are compared.
_COMPARED = 64
#: What their bits are compared as, by bytes of one.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Known(NamedTuple):
    state: tuple[Any, ...]
    samples: list[np.ndarray]  # views of the weights
    content: np.ndarray  # of the samples, at the time of `null`
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
        if self._game.patches_vote or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self._game.null()
        modules = every_module(self._game.backbone)
        tensors = _weights(modules)
        if tensors is None:
            self._known = None
            return self._game.null()
        autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
        state = (autocast, modules, [(id(tensor), tensor.data_ptr(), tensor._version) for tensor in tensors])
        known = self._known
        if known is None or known.state != state or not np.array_equal(np.concatenate(known.samples), known.content):
            self._known = None
            if not self._game.packs or not all(map(_can_be_sampled, tensors)):
                return self._game.null()
            samples = [_sample(tensor) for tensor in tensors]
            self._known = known = _Known(state, samples, np.concatenate(samples), self._game.null())
        return known.null.clone()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose weights are others."""
        return {"_game": self._game, "_known": None}


def _weights(modules: list[nn.Module]) -> list[Tensor] | None:
    """Parameters and buffers; None where there may be a version of them unseen, or what a module does may change."""
    if has_global_hooks() or any(module.training or has_hooks(module) or is_overridden(module) for module in modules):
        return None
    kept = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
    found = [tensor for tensors in kept for tensor in tensors.values() if tensor is not None]
    return None if any(tensor.is_inference() for tensor in found) else found


def _can_be_sampled(tensor: Tensor) -> bool:
    is_dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor.device.type == "cpu" and is_dense and tensor.itemsize in _BITS


def _sample(tensor: Tensor) -> np.ndarray:
    """A view of elements evenly spread over a dense tensor, 64 to 127 of a larger one."""
    step = max(1, tensor.numel() // _COMPARED)
    sample = tensor.detach().as_strided((-(-tensor.numel() // step),), (step,))
    return sample.view(_BITS[tensor.itemsize]).numpy()
