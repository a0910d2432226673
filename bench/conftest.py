"""Pairs under pytest-benchmark: a plain and a fused version, timed by turns, each a row of its results."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from pytest_benchmark.plugin import benchmark as plain_benchmark  # noqa: F401 (a second fixture, under this name)

import fastshap_vision as fv
from bench.lib.machine import processor
from bench.lib.rows import Row
from bench.lib.timer import seconds

#: "returned": glibc's default, large blocks that are freed go back to the system, and the next ones are fresh pages.
#: "kept": as after `fv.keep_freed_memory()`, which `fastshap train` calls. Both sides have the same.
MEMORY = os.environ.get("FASTSHAP_BENCH_MEMORY", "returned")

#: A pair takes this many seconds, or this many turns: a burst of other work must not be most of what is measured.
LENGTH, MOST = 1.0, 200


def pytest_sessionstart(session: pytest.Session) -> None:
    if MEMORY == "kept":
        fv.keep_freed_memory()
    elif MEMORY != "returned":
        raise ValueError(f"FASTSHAP_BENCH_MEMORY must be 'returned' or 'kept', but it is {MEMORY!r}.")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info |= {"processor": processor(), "threads": torch.get_num_threads()}


class Pair:
    """pair(op, shape, against, fused, plain): times both by turns, `rounds` of them at least.

    `against` says in words what the plain side is; what else is known of the pair is kept beside the times.
    """

    def __init__(self, fused: BenchmarkFixture, plain: BenchmarkFixture) -> None:
        self.fused, self.plain = fused, plain

    def __call__(
        self,
        op: str,
        shape: str,
        against: str,
        fused: Callable[[], Any],
        plain: Callable[[], Any],
        rounds: int = 15,
        warmup: int = 2,
        **more: Any,
    ) -> None:
        about = {"op": op, "shape": shape, "against": against, "memory": MEMORY, "threads": torch.get_num_threads()}
        for side, benchmark in (("fused", self.fused), ("plain", self.plain)):
            benchmark.extra_info = about | more | {"side": side, "test": benchmark.fullname}
            benchmark.name, benchmark.group = f"{benchmark.name}: {side}", f"{op}: {shape}, against {against}"
        self.plain.pedantic(plain, warmup_rounds=warmup)
        for _ in range(warmup):
            fused()
        turns = max(rounds, min(MOST, int(LENGTH / (seconds(plain) + seconds(fused)))))

        def plain_turn() -> None:
            self.plain.stats.update(seconds(plain))

        self.fused.pedantic(fused, setup=plain_turn, rounds=turns)

    def of_row(self, row: Row, mode: str = "both", op: str | None = None, **options: Any) -> None:
        """The CPU kernel of a row's op beside the row's first rival."""
        case, against = row.case("cpu"), next(iter(row.rivals))
        makers = row.providers(case)
        fused, plain = (makers[name]().calls(mode)[0] for name in ("cpu", against))
        self(op or row.op, row.shape, against, fused, plain, **options)


@pytest.fixture
def pair(benchmark, plain_benchmark) -> Pair:  # noqa: F811
    torch.manual_seed(0)
    return Pair(benchmark, plain_benchmark)
