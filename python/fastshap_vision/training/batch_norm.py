"""Batch norm's running statistics: counted once a batch, and its modules as they were before a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


@contextmanager
def counted_once(modules: Sequence[_BatchNorm]) -> Iterator[None]:
    """For a backward pass with gradient checkpointing, which runs the forward pass of blocks once more.

    The outputs are the same and the statistics stay: a momentum of 0 leaves them to the bit.
    """
    kept = [(module.momentum, module.num_batches_tracked) for module in modules]
    for module in modules:
        module.momentum, module.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for module, (momentum, number) in zip(modules, kept, strict=True):
            module.momentum, module.num_batches_tracked = momentum, number


@contextmanager
def own_batch_norms(model: nn.Module) -> Iterator[None]:
    """Takes out again what stands in their place after it, such as SyncBatchNorm, which has the same tensors."""
    own = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, _BatchNorm)
    ]
    try:
        yield
    finally:
        for parent, name, child in own:
            child.train(parent.get_submodule(name).training)
            setattr(parent, name, child)
