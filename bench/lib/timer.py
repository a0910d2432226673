"""The one timer: calls by turns on one device, so that its clocks, heat and other guests are the same for all.

`by="wall"` is from an idle device to an idle device, the host's part included: what a training loop waits for. Calls
shorter than a turn's 50 ms are repeated within it.

`by="events"` is the device's own time, between CUDA events around one call. Before the first event the device reads a
buffer larger than its L2 cache, so that no input is there, and then spins until the host has queued the whole call.
What the host takes is kept apart. On the processor, to try such programs, it is one call's wall time.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

Call = Callable[[], Any]
T = TypeVar("T")
CPU = torch.device("cpu")
_TURN = 0.05  # seconds
_CACHE_BYTES = 2**28  # more than twice the L2 of any device so far
_CYCLES_PER_MS = 2_000_000  # a little above the clock of any device so far


@dataclass
class Times:
    """Milliseconds of a call, in every turn: the device's or the whole, and the host's part of them."""

    turns: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.turns)

    def fields(self) -> dict[str, float]:
        found = {f"ms_p{share}": percentile(self.turns, share / 100) for share in (20, 50, 80)}
        return found | {"ms_p50": self.median, "turns": len(self.turns)}


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Call, device: torch.device = CPU, repeats: int = 1) -> float:
    """Seconds of a call, from an idle device to an idle device."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def timed(call: Callable[[], T], device: torch.device = CPU) -> tuple[T, float]:
    """What one call returns, and its seconds."""
    found: list[T] = []
    taken = seconds(lambda: found.append(call()), device)
    return found[0], taken


def milliseconds_of(call: Callable[[int], Any], turns: int, untimed: int) -> float:
    """Median of call(0), call(1), …, after a few that are not counted."""
    counter = itertools.count()
    times = [seconds(lambda: call(next(counter))) for _ in range(untimed + turns)]
    return statistics.median(times[untimed:]) * 1e3


class Timer:
    """Times calls by turns, for about `length` seconds all together, at least `least` turns and at most `most`."""

    def __init__(
        self, device: torch.device, length: float, least: int = 5, most: int = 40, *, by: str = "events"
    ) -> None:
        self.device, self.length, self.least, self.most = device, length, least, most
        self.wall, self.cuda = by == "wall", device.type == "cuda"
        self._cache = torch.zeros(_CACHE_BYTES // 4 if self.cuda and not self.wall else 1, device=device)

    def measure(self, calls: dict[str, Call]) -> dict[str, Times]:
        """Times by name. All must have been called before, so that nothing is left to compile."""
        found = {name: Times() for name in calls}
        once = {name: seconds(call, self.device) for name, call in calls.items()}
        if self.wall:
            repeats = {name: max(1, min(50, int(_TURN / taken))) for name, taken in once.items()}
            turn = sum(taken * repeats[name] for name, taken in once.items())
        else:
            repeats = {}
            turn = sum(2.5 * taken for taken in once.values())  # the device spins for 1.5 of it
        for index in range(max(self.least, min(self.most, int(self.length / max(turn, 1e-9))))):
            pending = []
            # To and fro, so that none always follows the same one.
            for name in list(calls)[:: -1 if index % 2 else 1]:
                if self.wall or not self.cuda:
                    taken = seconds(calls[name], self.device, repeats.get(name, 1)) * 1e3
                    pending.append((found[name], lambda taken=taken: taken, taken))
                else:
                    pending.append((found[name], *self._queue(calls[name], 1.5e3 * once[name])))
            synchronize(self.device)
            for times, elapsed, host in pending:
                times.turns.append(elapsed())
                times.host.append(host)
        return found

    def _queue(self, call: Call, spin: float) -> tuple[Callable[[], float], float]:
        """Queues one call behind a spin of so many ms; returns what will tell its time, and the host's."""
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.sum()
        torch.cuda._sleep(int(max(spin, 0.1) * _CYCLES_PER_MS))
        started = time.perf_counter()
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last), (time.perf_counter() - started) * 1e3

    def ceilings(self, side: int, values: int, *products: Callable[[Tensor, Tensor], Tensor]) -> dict[str, float]:
        """What a call is held against: GB/s of a copy of so many bfloat16 values, TFLOP/s of `side` x `side` products.

        Float32's is that of the fastest of PyTorch's own product and `products`.
        """
        a, b = torch.randn(2, side, side, device=self.device)
        source = torch.zeros(values, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        calls: dict[str, Call] = {"copy_gb_s": lambda: target.copy_(source), "float32_tflop_s": lambda: a @ b}
        for dtype in (torch.bfloat16, torch.float16)[: 1 + self.cuda]:  # float16 products are slow on processors
            x, y = a.to(dtype), b.to(dtype)
            calls[f"{dtype}_tflop_s".removeprefix("torch.")] = lambda x=x, y=y: x @ y
        if self.cuda:
            calls["tf32_tflop_s"] = lambda: _product_in_tf32(a, b)
        calls |= {f"product {index}": lambda product=product: product(a, b) for index, product in enumerate(products)}
        for call in calls.values():
            call()
        work = dict.fromkeys(calls, 2 * side**3 / 1e9) | {"copy_gb_s": 2 * source.nbytes / 1e6}
        # The best of the turns: it is a ceiling.
        found = {name: work[name] / min(times.turns) for name, times in self.measure(calls).items()}
        others = [found.pop(f"product {index}") for index in range(len(products))]
        return found | {"float32_tflop_s": max([found["float32_tflop_s"], *others])}


def _product_in_tf32(a: Tensor, b: Tensor) -> Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
