"""One thing after another is measured, whatever becomes of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import torch

from bench.lib import machine
from bench.lib.results import Results

T = TypeVar("T")


def measure_all(
    results: Results,
    items: Iterable[T],
    measure: Callable[[T], None],
    describe: Callable[[T], str],
    device: torch.device,
    until: float,
) -> str:
    """Measures items; what was left out, and why, is in the file and returned as text. None begins after `until`."""
    left_out = results.content["left_out"] = []
    for item in items:
        started = time.time()
        try:
            if started > until:
                raise TimeoutError("no time was left")
            measure(item)
        except Exception as error:
            left_out.append(f"{describe(item)}: {machine.describe(error)}")
        clean_up(device)
        print(f"{describe(item)}: {time.time() - started:.0f} s", flush=True)
    results.write()
    return "\n".join(["left out:", *(left_out or ["nothing"])])


def clean_up(device: torch.device) -> None:
    """Frees what was compiled and held."""
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
