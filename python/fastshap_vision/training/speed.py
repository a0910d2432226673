"""How fast a run is, and what holds it up."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch


class Speed:
    """Counts the images, coalitions and seconds of this process, and those in which it waited for data.

    Args:
        device: that the run computes on.
        processes: of the run, taken to be as fast as this one.
        coalitions: M of each image; 0 where there are none.
    """

    def __init__(self, device: torch.device, processes: int, coalitions: int) -> None:
        self.device, self.processes, self.coalitions = device, processes, coalitions
        self.images, self.waited, self.started = 0, 0.0, time.perf_counter()
        self._last = (0, 0.0, 0.0)

    def waiting(self, loader: Iterable[Any]) -> Iterator[Any]:
        """The loader's batches; what they take to come is waited for."""
        batches = iter(loader)
        while True:
            begun = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self.waited += time.perf_counter() - begun
            self.images += len(batch[0])
            yield batch

    def lap(self) -> dict[str, float | None]:
        """`figures` since the last lap, or the beginning."""
        now = self._now()
        found = self._figures(*(new - old for new, old in zip(now, self._last, strict=True)))
        self._last = now
        return found

    def figures(self) -> dict[str, float | None]:
        """Images and coalitions a second of all processes, the share of time spent waiting for data, gigabytes."""
        return self._figures(*self._now())

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def _now(self) -> tuple[int, float, float]:
        return self.images, self.waited, self.seconds

    def _figures(self, images: float, waited: float, seconds: float) -> dict[str, float | None]:
        speed = images * self.processes / max(seconds, 1e-9)
        return {
            "images_per_second": speed,
            "coalitions_per_second": speed * self.coalitions or None,
            "data_wait": waited / max(seconds, 1e-9),
            "peak_memory_gb": _peak_memory(self.device),
        }


def _peak_memory(device: torch.device) -> float | None:
    """Of tensors on a GPU since the process began, else of the process; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9
