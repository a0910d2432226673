"""Blocks whose weights lie in parts on several processes, by PyTorch's FSDP2, and are whole while the block runs.

A pass that computes with a block's parts, as the packed pass does, is no call of the block: it runs inside of a method
that FSDP2 knows of.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

#: What stands in a sharded block's __dict__: the method that gathers its weights, and its class before.
_GATHERED, _CLASS = "run_gathered", "class_before_sharding"


def shard_block(block: nn.Module, shard: Callable[[nn.Module], Any]) -> None:
    """Shards a block in place by `shard`, a call of torch.distributed.fsdp.fully_shard."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    of: Any = block
    of.class_before_sharding = type(block)
    of.run_gathered = _run
    shard(block)
    register_fsdp_forward_method(block, _GATHERED)


def run_gathered(block: nn.Module, work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives, which computes with the block's parts; where the block is sharded, they are whole then.

    Tensors that gradients flow back to must be among the arguments and in what comes back.
    """
    run = block.__dict__.get(_GATHERED)
    return work(*arguments) if run is None else run(work, *arguments)


def class_of(block: nn.Module) -> type:
    """The block's class; sharding gives it a subclass."""
    return block.__dict__.get(_CLASS, type(block))


def is_sharded(backbone: Any) -> bool:
    """Whether the model's blocks are; then all processes must run equally many passes through them."""
    return any(_GATHERED in block.__dict__ for block in getattr(backbone, "blocks", ()))


def is_of_sharding(hook: Any) -> bool:
    """Whether FSDP2 hung a hook on its block, to gather the weights and to free them."""
    return type(getattr(hook, "__self__", None)).__module__.startswith("torch.distributed.fsdp")


def _run(work: Callable[..., Any], *arguments: Any) -> Any:
    return work(*arguments)
