"""What the processes of a run agree on: who chooses, what all do or none does, and that all hold the same model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from .._runtime.digest import digest_of_tensors
from .._runtime.errors import sendable
from .monitor import TrainingError

T = TypeVar("T")


def of_main(work: Callable[[], T]) -> T:
    """What the work in process 0 gives, or the error that it ends in, in every process."""
    if PartialState().num_processes == 1:
        return work()
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome = [work(), None]
        except Exception as error:  # whatever it is, no process may wait for this one
            outcome = [None, sendable(error)]
    found, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    return found


def of_all(work: Callable[[], T]) -> list[T]:
    """What the work gives in each process; where one fails, all stop with the error of the first that did."""
    if PartialState().num_processes == 1:
        return [work()]
    outcome: tuple[T | None, Exception | None]
    try:
        outcome = (work(), None)
    except Exception as error:
        outcome = (None, sendable(error))
    outcomes = gather_object([outcome])
    for _, failure in outcomes:
        if failure is not None:
            raise failure
    return [found for found, _ in outcomes]


def check_settings(settings: Mapping[str, Any]) -> None:
    """All processes were called with the same settings, for as many images and the same recorded coalitions.

    Raises:
        ValueError: they were not.
    """
    for process, other in enumerate(of_all(lambda: json.loads(json.dumps(dict(settings))))):
        differing = [name for name in settings if other.get(name) != json.loads(json.dumps(settings[name]))]
        if differing:
            name = differing[0]
            raise ValueError(
                f"fit: all processes must be called with the same arguments and data, but {name} is "
                f"{settings[name]!r} in process {PartialState().process_index} and {other.get(name)!r} in process "
                f"{process}. Call fit alike in each."
            )


def check_model(model: nn.Module, when: str, remedy: str) -> None:
    """All processes hold the same parameters and buffers, to the bit.

    Raises:
        TrainingError: they don't.
    """
    found = of_all(lambda: fingerprints(model))
    for process, other in enumerate(found):
        differing = [name for name in found[0] | other if found[0].get(name) != other.get(name)]
        if differing:
            raise TrainingError(
                f"fit: all processes must hold the same model {when}, but {len(differing)} of {len(found[0])} tensors "
                f"differ between processes 0 and {process}, {differing[0]} among them. {remedy}"
            )


def fingerprints(model: nn.Module) -> dict[str, str]:
    """A digest of each parameter and buffer; none where there is but one process to compare."""
    if PartialState().num_processes == 1:
        return {}
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: digest_of_tensors({name: tensor}) for name, tensor in named}


def share_buffers(buffers: Iterable[Tensor]) -> None:
    """Gives every process the buffers of process 0, such as the running statistics of batch norm.

    DistributedDataParallel does so before every step: those of process 0 are the statistics of the run, and all that
    the others have is one step of their own beyond. Their mean would mix both.
    """
    if PartialState().num_processes > 1:
        for buffer in buffers:
            content = buffer.contiguous()
            torch.distributed.broadcast(content, 0)
            buffer.copy_(content)
