"""The processes of a run: accelerate's, once it is sure that each of them sees all the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from torch import Tensor

T = TypeVar("T")

#: Whether all processes are at the same point: then what each finds may be exchanged.
_is_together = False

#: Variables by which a launcher tells each process how many it started.
COUNTS = ("WORLD_SIZE", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
#: Variables by which accelerate is told to split a model, in ways that no model here has been run in.
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_TP": "tensor parallelism",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor, context or sequence parallelism",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker's data parallelism",
}


def processes() -> PartialState:
    """accelerate's state of the processes, which this one joins if it has not yet.

    Where there is no GPU, or ACCELERATE_USE_CPU says so, they work on their CPUs and speak by gloo.

    Raises:
        ValueError: a launcher started more processes than see each other: each would take itself for the only one, and
            all would write into one folder. Or accelerate is set to split the model.
    """
    for name, engine in REFUSED.items():
        if parse_flag_from_env(name):
            shards = " Then fit(fsdp=True) trains in shards." if engine == "FSDP" else ""
            raise ValueError(
                f"fastshap_vision: accelerate is set to train by {engine} ({name} is {os.environ[name]!r}), which is "
                f"not supported. Choose multi-GPU or multi-CPU in `accelerate config`, or unset {name}.{shards}"
            )
    without_gpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    state = PartialState(cpu=without_gpu)
    _check_counts(state.num_processes)
    return state


def _check_counts(found: int) -> None:
    """No launcher's count is above accelerate's; below it may be, as srun's is where each task starts torchrun."""
    for name in COUNTS:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > found:
            raise ValueError(
                f"fastshap_vision: {name} says that {text} processes were started, but this one sees {found} in all. "
                "Each would train alone, and write into the same folder. Start them by `torchrun --nproc_per_node=N` "
                "or `accelerate launch`, on several nodes once on each, and leave accelerate.PartialState() to "
                f"fastshap_vision. For a run of one process, set {name}=1."
            )
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() != found:
        raise ValueError(
            f"fastshap_vision: torch.distributed has {distributed.get_world_size()} processes, but accelerate sees "
            f"{found}. Let accelerate begin the process group: leave out torch.distributed.init_process_group."
        )


@contextmanager
def together(yes: bool = True) -> Iterator[None]:
    """All processes run what is within, each on its part of the data; or, with False, each on its own."""
    global _is_together
    before, _is_together = _is_together, yes and PartialState().num_processes > 1
    try:
        yield
    finally:
        _is_together = before


def mean_of_all(mean: Tensor) -> Tensor:
    """The mean over the processes, without gradient, where they are together; each has as many images."""
    if not _is_together:
        return mean
    total = mean.detach().clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def part_of(whole: Sequence[T]) -> Sequence[T]:
    """Every so manyth, where the processes are together: the part of this one. `whole_of` puts the parts together."""
    return whole[PartialState().process_index :: PartialState().num_processes] if _is_together else whole


def whole_of(found: list[Any]) -> list[Any]:
    """What the processes found of their parts, in the order of the whole."""
    if not _is_together:
        return found
    parts = gather_object([found])
    return [part[row] for row in range(len(parts[0])) for part in parts if row < len(part)]
