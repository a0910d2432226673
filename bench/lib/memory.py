"""The memory that a call takes at its peak: on a GPU, of the whole process, and of the tensors alone."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.lib.timer import Call


def peak_on_gpu(call: Call, device: torch.device) -> tuple[Any, float, float]:
    """What a call returns, and the bytes allocated at its peak beyond those before it, which come last."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    returned = call()
    torch.cuda.synchronize(device)
    return returned, torch.cuda.max_memory_allocated(device) - before, before


def peak_on_cpu(call: Call, release: Callable[[], None]) -> float:
    """MB that the process's resident memory grows by at a call's peak. Linux only."""
    call()
    release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e6


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


class LiveMemory(TorchDispatchMode):
    """The tensors that are alive after each operator, other than the inputs.

    What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.inputs = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.history: list[dict[int, int]] = []  # bytes by storage, after each operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.inputs:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.history.append({key: size for key, (_, size) in self.alive.items()})
        return out

    def peak(self, without: Iterable[Tensor] = ()) -> int:
        """Largest sum of bytes; `without` are tensors that don't count."""
        excluded = {x.untyped_storage()._cdata for x in without}
        return max(sum(size for key, size in moment.items() if key not in excluded) for moment in self.history)
