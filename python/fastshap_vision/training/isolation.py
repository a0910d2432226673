"""What a run changes beyond its arguments, and how that becomes what it was."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn

from .batch_norm import own_batch_norms


@contextmanager
def as_found(model: nn.Module, objective: Any) -> Iterator[None]:
    """What a run changes beyond its arguments becomes what it was.

    accelerate keeps precision and gradient accumulation for the whole process: a run has its own, and the caller's
    come back after it; processes that have joined stay joined. So do the random generators, which parameters are
    trained, whether blocks checkpoint their activations, and whether the objective's step is compiled.
    """
    states = (GradientState, AcceleratorState, PartialState)
    contents = [dict(state._shared_state) for state in states]
    for state in states[:2]:
        state._shared_state.clear()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    name = "grad_checkpointing"
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpointing = [(module, getattr(module, name)) for module in model.modules() if hasattr(module, name)]
    parts = [objective, *getattr(objective, "__dict__", {}).values()]  # an objective may hold another one
    is_last = {name: _is_channels_last(parameter) for name, parameter in model.named_parameters()}
    compiled = [(part, part._compiled) for part in parts if hasattr(part, "_compiled")]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())), own_batch_norms(model):
            yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        for module, enabled in checkpointing:
            setattr(module, name, enabled)
        _lay_out(model, is_last)
        for part, step in compiled:
            part._compiled = step
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        if PartialState._shared_state.get("num_processes", 1) > 1:
            contents[2] = dict(PartialState._shared_state)
        for state, content in zip(states, contents, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


def _is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def _lay_out(model: nn.Module, is_last: dict[str, bool]) -> None:
    """Weights of convolutions lie in memory as they lay."""
    for name, parameter in model.named_parameters():
        if _is_channels_last(parameter) and not is_last.get(name, True):
            parameter.data = parameter.data.contiguous()
