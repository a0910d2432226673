"""Times of whole steps by turns, the memory that a step needs, and the device's rate of matrix products.

A step is timed with what the host does, from an idle device to an idle device: that is what a training loop waits for.
Steps shorter than a turn's 50 ms are repeated within it.
"""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastshap_vision._runtime.onednn_linear import cpu_linears

_TURN = 0.05  # seconds


def measure(
    calls: dict[str, Callable[[], Any]], device: torch.device, seconds: float, least: int, most: int = 40
) -> dict[str, list[float]]:
    """Milliseconds of a call, for each name and turn. All must have been called before."""
    once = {name: _time(call, device, 1) for name, call in calls.items()}
    repeats = {name: max(1, min(50, int(_TURN / taken))) for name, taken in once.items()}
    turn = sum(taken * repeats[name] for name, taken in once.items())
    found: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(max(least, min(most, int(seconds / max(turn, 1e-9))))):
        # To and fro, so that none always follows the same one.
        for name in list(calls)[:: -1 if index % 2 else 1]:
            found[name].append(_time(calls[name], device, repeats[name]) * 1e3)
    return found


def _time(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device, side: int) -> dict[str, float]:
    """TFLOP/s of products of `side` x `side` matrices, and GB/s of a copy of 64 such matrices.

    In float32 on the processor by the faster of the two libraries that PyTorch carries.
    """
    a, b = torch.randn(2, side, side, device=device)
    x, y = a.bfloat16(), b.bfloat16()
    source = torch.zeros(64, side, side, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)

    def linear() -> torch.Tensor:
        with cpu_linears(a):
            return torch.nn.functional.linear(a, b)

    calls: dict[str, Callable[[], Any]] = {
        "float32_tflop_s": lambda: a @ b,
        "linear_tflop_s": linear,
        "bfloat16_tflop_s": lambda: x @ y,
        "copy_gb_s": lambda: target.copy_(source),
    }
    for call in calls.values():
        call()
    work = dict.fromkeys(calls, 2 * side**3 / 1e9) | {"copy_gb_s": 2 * source.nbytes / 1e6}
    # The best of the turns: it is a ceiling.
    found = {name: work[name] / min(times) for name, times in measure(calls, device, 2.0, 5).items()}
    found["float32_tflop_s"] = max(found["float32_tflop_s"], found.pop("linear_tflop_s"))
    return found


def peak_on_gpu(
    call: Callable[[], torch.Tensor], release: Callable[[], None], device: torch.device
) -> tuple[torch.Tensor, dict[str, float]]:
    """What a step returns, and the MB that it allocates at its peak beyond what is there before it.

    From the first call of a way on: what it captures stays, and its pools count too.
    """
    release()
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    release()
    outcome = call()
    torch.cuda.synchronize(device)
    return outcome, {"peak_mb": (torch.cuda.max_memory_allocated(device) - before) / 1e6, "state_mb": before / 1e6}


def peak_on_cpu(call: Callable[[], Any], release: Callable[[], None]) -> float:
    """MB that the process's resident memory grows by at a step's peak. Linux only."""
    call()
    release()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier steps freed would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _resident("VmRSS")
    call()
    return (_resident("VmHWM") - before) / 1e6


def _resident(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")
