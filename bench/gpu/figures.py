"""How a GPU's measurements stand to the targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bench.lib import targets
from bench.lib.results import Row
from bench.lib.targets import STREAMING

OURS = ("triton", "cuda", "cpu")
KEY = ("op", "dtype", "shape", "mode", "backend")
#: Rivals that a target names otherwise than after "times as fast as".
_RIVALS = {
    "eager or reference": ("eager", "reference"),
    "eager or reference, compiled": ("eager, compiled", "reference, compiled"),
}


def groups(rows: list[Row]) -> Iterator[tuple[Row, dict[str, Row]]]:
    """What providers were compared on (op, dtype, shape, mode), and their rows by backend, failures left out."""
    found: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in rows:
        if "ms_p50" in row:
            found.setdefault(tuple(row[name] for name in KEY[:-1]), {})[row["backend"]] = row
    for by_backend in found.values():
        yield next(iter(by_backend.values())), by_backend


def judge(rows: list[Row]) -> list[Row]:
    """Each target beside the worst of the rows that it is about."""
    at_most = {target.what for target in targets.TARGETS["gpu"] if target.at_most}
    worst: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        worst[what] = (max if what in at_most else min)(worst.get(what, value), value)

    for about, by_backend in groups(rows):
        ours = min((by_backend[name] for name in OURS if name in by_backend), key=_milliseconds, default=None)
        if ours is not None:
            _note_group(about, ours, by_backend, note)
    return targets.judge("gpu", worst)


def _note_group(about: Row, ours: Row, by_backend: dict[str, Row], note: Any) -> None:
    op, mode = about["op"], about["mode"]
    if op in STREAMING and mode != "both" and "of_ceiling" in ours:
        note(f"{op}, {mode}: share of copy bandwidth", ours["of_ceiling"])
    name = f"{op}, M 32" if op == "shapley_regression_loss" and "M 32" in about["shape"] else op
    for target in targets.TARGETS["gpu"]:
        start, _, rival = target.what.partition(": times as fast as ")
        others = [by_backend[other]["ms_p50"] for other in _RIVALS.get(rival, (rival,)) if other in by_backend]
        if start == f"{name}, {mode}" and others:
            note(target.what, min(others) / ours["ms_p50"])
    if op == "sample_coalitions":
        note(f"{op}, {mode}: ms", ours["ms_p50"])
    if op == "linear_shapley_loss" and mode == "both" and ours["peak_mb"] and "eager" in by_backend:
        eager, less = by_backend["eager"], f"{op}, {mode}: times less memory than eager"
        note(less, eager["peak_mb"] / ours["peak_mb"])
        beyond = [max(row["peak_mb"] - row["returned_mb"], 1.0) for row in (eager, ours)]
        note(f"{less}, beyond the gradients returned", beyond[0] / beyond[1])


def _milliseconds(row: Row) -> float:
    return row["ms_p50"]
