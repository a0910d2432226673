"""v(∅) of a model in evaluation, which is the same at every call."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .._modes import every_module
from ..games.base import Game
from ..games.hooks import has_global_hooks, has_hooks, is_overridden

#: Of a tensor of up to `_SMALL` elements all are compared, of a larger one so many.
_SMALL, _COMPARED = 4096, 128
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
    without gradients and in evaluation mode, for transformers that are timm's and PyTorch's own modules, without hooks.
    Of weights that are written through `.data`, which PyTorch does not count, some elements are compared, in all rows
    and columns in turn: a write to a few may be missed, and so is a changed attribute, such as a norm's eps.
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
    if has_global_hooks() or not all(map(_does_what_its_tensors_say, modules)):
        return None
    kept = [tensors for module in modules for tensors in (module._parameters, module._buffers) if tensors]
    found = [tensor for tensors in kept for tensor in tensors.values() if tensor is not None]
    are_plain = all(type(tensor) in (Tensor, nn.Parameter) and not tensor.is_inference() for tensor in found)
    return found if are_plain else None


def _does_what_its_tensors_say(module: nn.Module) -> bool:
    is_known = type(module).__module__.startswith(("timm.", "torch.nn.modules."))
    return is_known and not (module.training or has_hooks(module) or is_overridden(module))


def _can_be_sampled(tensor: Tensor) -> bool:
    is_dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor.device.type == "cpu" and is_dense and tensor.itemsize in _BITS


def _sample(tensor: Tensor) -> np.ndarray:
    """A view of a dense tensor: of all, or of elements evenly spread over it, in another column each."""
    step = 1 if tensor.numel() <= _SMALL else tensor.numel() // _COMPARED
    while math.gcd(step, tensor.shape[-1] if tensor.ndim else 1) > 1:
        step += 1
    sample = tensor.detach().as_strided((-(-tensor.numel() // step),), (step,))
    return sample.view(_BITS[tensor.itemsize]).numpy()
