"""Times of calls on a CUDA device, and what the device can do at most.

A call is timed by CUDA events around it. Before the first event the device reads a buffer larger than its L2 cache, so
that no input is there, and then spins until the host has queued the whole call: the time between the events is the
device's own, without the host's. What the host takes is reported apart. The providers of one row are called by turns,
so that clocks and heat are the same for all.

On the processor, for tests of this code, it is the host's time that counts.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

Call = Callable[[], object]

_CACHE_BYTES = 2**28  # more than twice the L2 of any device so far
_CYCLES_PER_MS = 2_000_000  # a little above the clock of any device so far
_WARM_UP = 3


@dataclass
class Times:
    """Milliseconds of one provider's calls, and its memory."""

    device: list[float]
    host: list[float]
    peak_bytes: int
    returned_bytes: int

    def fields(self) -> dict[str, float]:
        low, middle, high = (percentile(self.device, share) for share in (0.2, 0.5, 0.8))
        host = statistics.median(self.host)
        return {
            "ms_p20": low,
            "ms_p50": middle,
            "ms_p80": high,
            "host_ms": host,
            "calls": len(self.device),
            "peak_mb": self.peak_bytes / 1e6,
            "returned_mb": self.returned_bytes / 1e6,
        }


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of the values do not exceed."""
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


class Timer:
    """Times calls by turns, for about `seconds` a set of providers."""

    def __init__(self, device: torch.device, seconds: float, most_rounds: int = 40) -> None:
        self.device, self.seconds, self.most_rounds = device, seconds, most_rounds
        self.cuda = device.type == "cuda"
        self.cache = torch.zeros(_CACHE_BYTES // 4 if self.cuda else 1, device=device)

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def measure(self, providers: dict[str, Call]) -> dict[str, Times | Exception]:
        """The times of each provider, or what it raised."""
        results: dict[str, Times | Exception] = {}
        spins, once = {}, 0.0
        for name, call in providers.items():
            try:
                results[name] = Times([], [], *self._warm_up(call))
                started = time.perf_counter()
                call()
                spins[name] = 1.5 * (time.perf_counter() - started) * 1e3
                self.synchronize()
                once += time.perf_counter() - started + spins[name] / 1e3
            except Exception as error:
                results[name] = error
        rounds = max(5, min(self.most_rounds, int(self.seconds / max(once, 1e-6))))
        for _ in range(rounds):
            pending = []
            for name, spin in spins.items():
                times = results[name]
                assert isinstance(times, Times)
                pending.append((times, *self._time(providers[name], spin)))
            self.synchronize()
            for times, elapsed, host in pending:
                times.device.append(elapsed())
                times.host.append(host)
        return results

    def _warm_up(self, call: Call) -> tuple[int, int]:
        """Compiles, if there is anything to; the bytes at a call's peak beyond its inputs, and those it returns."""
        for _ in range(_WARM_UP):
            call()
        self.synchronize()
        if not self.cuda:
            return 0, 0
        gc.collect()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        returned = call()
        self.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) - before
        tensors = returned if isinstance(returned, list) else [returned]
        return peak, sum(x.nbytes for x in tensors if isinstance(x, torch.Tensor))

    def _time(self, call: Call, spin: float) -> tuple[Callable[[], float], float]:
        """Queues one call; returns what will tell its milliseconds, and those of the host."""
        if not self.cuda:
            started = time.perf_counter()
            call()
            milliseconds = (time.perf_counter() - started) * 1e3
            return lambda: milliseconds, milliseconds
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.cache.sum()
        torch.cuda._sleep(int(max(spin, 0.1) * _CYCLES_PER_MS))
        started = time.perf_counter()
        first.record()
        call()
        last.record()
        return lambda: first.elapsed_time(last), (time.perf_counter() - started) * 1e3

    def ceilings(self, values: int = 2**29, side: int = 8192) -> dict[str, float]:
        """What a row is held against: GB/s of a large copy, TFLOP/s of large matrix products."""
        source = torch.randn(values // 2, device=self.device).view(torch.bfloat16)
        target = torch.empty_like(source)
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
        work = {"copy": 2 * source.nbytes / 1e6}
        a, b = torch.randn(2, side, side, device=self.device)
        pairs = {"bfloat16": (a.bfloat16(), b.bfloat16()), "float16": (a.half(), b.half())}
        for name, (x, y) in pairs.items():
            calls[name] = lambda x=x, y=y: x @ y
        for name, allow in (("float32", False), ("tf32", True)):
            calls[name] = lambda allow=allow: _product(a, b, allow)
        work |= dict.fromkeys([*pairs, "float32", "tf32"], 2 * side**3 / 1e9)
        names = {"copy": "copy_gb_s"}
        found = {}
        for name, call in calls.items():
            times = self.measure({name: call})[name]
            if isinstance(times, Times):
                found[names.get(name, f"{name}_tflop_s")] = work[name] / percentile(times.device, 0.5)
        return found


def _product(a: torch.Tensor, b: torch.Tensor, allow_tf32: bool) -> torch.Tensor:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    try:
        return a @ b
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
