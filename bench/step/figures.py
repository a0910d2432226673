"""What the rows of steps say of the targets, and of growth."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from bench.lib import targets
from bench.lib.results import Row
from bench.step.sets import OURS, PLAIN, Step, growth

#: What tells rows apart; "players" follows from the model and the image size.
SETTING = ("model", "image_size", "classes", "coalitions", "batch", "mode", "dtype")
KEY = (*SETTING, "way")
DENSE = ("dense-pixel", "dense-mask")
COMPILED = ("dense-compiled", "dense-pixel-compiled")
#: Either of them is a row in bfloat16: each side is taken in the faster one.
BFLOAT16 = ("bfloat16", "autocast")
#: What each size that grows along a line is in a row, and in a step.
SIZES = {"B": "batch", "M": "coalitions", "K": "classes"}


def setting_of(step: Step) -> Row:
    """A step's part of its rows' key."""
    return {name: getattr(step, name) for name in SETTING}


class Table:
    """Finds figures among rows."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = [row for row in rows if "ms_p50" in row]

    def find(self, ways: tuple[str, ...], dtypes: tuple[str, ...] | None = None, **setting: Any) -> list[Row]:
        return [
            row
            for row in self.rows
            if row["way"] in ways
            and (dtypes is None or row["dtype"] in dtypes)
            and all(row[name] == value for name, value in setting.items())
        ]

    def fastest(self, ways: tuple[str, ...], field: str = "ms_p50", **setting: Any) -> float | None:
        """The least of a figure among rows of these ways."""
        return min((row[field] for row in self.find(ways, **setting) if field in row), default=None)

    def times_as_fast(self, others: tuple[str, ...], ours: tuple[str, ...] = OURS, **setting: Any) -> float | None:
        """The fastest of the others' time over ours."""
        theirs, mine = self.fastest(others, **setting), self.fastest(ours, **setting)
        return None if theirs is None or mine is None else theirs / mine

    def share_of_memory(self, others: tuple[str, ...], **setting: Any) -> float | None:
        """The peak of the fastest of ours over the lowest of theirs: what a step adds to the model and the images."""
        mine, theirs = ([row for row in self.find(ways, **setting) if "peak_mb" in row] for ways in (OURS, others))
        if not mine or not theirs:
            return None
        fastest = min(mine, key=lambda row: row["ms_p50"])
        return fastest["peak_mb"] / min(row["peak_mb"] for row in theirs)


def judge(rows: list[Row], device: str) -> list[Row]:
    """Every target about steps on this kind of device beside its figure."""
    table = Table(rows)
    found = _cpu_figures(table) if device == "cpu" else _gpu_figures(table)
    return targets.judge(f"step, {device}", found | _growth_figures(table, device) | _agreement(table))


Figures = dict[str, "float | None"]


def _cpu_figures(table: Table) -> Figures:
    value = {"model": "ViT-S/16", "image_size": 224, "mode": "value", "coalitions": 8}
    joint = {"model": "ViT-S/16", "image_size": 224, "mode": "detached", "dtype": "float32"}
    name = "ViT-S/16 at 224, joint step, M 4, float32: "
    return {
        f"ViT-S/16 at 224, v(S), M 8, {dtype}: times as fast as {way}": table.times_as_fast(
            (way,), dtypes=dtypes, **value
        )
        for dtype, dtypes in (("float32", ("float32",)), ("bfloat16", BFLOAT16))
        for way in DENSE
    } | {
        name + "times as fast as the faster dense way": table.times_as_fast(DENSE, coalitions=4, **joint),
        name + "peak memory over the lower dense one's": table.share_of_memory(DENSE, coalitions=4, **joint),
        "ViT-S/16 at 224, joint step, M 2: time over that of a plain training step": _over_plain(table, **joint),
    }


def _gpu_figures(table: Table) -> Figures:
    value = {"image_size": 224, "mode": "value", "coalitions": 32, "dtypes": BFLOAT16}
    vit = {"model": "ViT-B/16", **value}
    joint = {"model": "ViT-B/16", "image_size": 224, "mode": "detached", "dtypes": BFLOAT16, "batch": 64}
    name, step = "ViT-B/16 at 224, v(S), M 32, bfloat16: ", "ViT-B/16 at 224, joint step, B 64, M 8, bfloat16: "
    return {
        name + "coalitions/s": max((row["coalitions_s"] for row in table.find(OURS, **vit)), default=None),
        name + "times as fast as dense-mask": table.times_as_fast(("dense-mask",), **vit),
        name + "times as fast as dense-compiled": table.times_as_fast(COMPILED, **vit),
        step + "times as fast as dense-compiled": table.times_as_fast(COMPILED, coalitions=8, **joint),
        step + "peak memory over the lower dense one's": table.share_of_memory(
            (*DENSE, *COMPILED), coalitions=8, **joint
        ),
        "ResNet-50 at 224, v(S), M 32, bfloat16: times as fast as dense-pixel": table.times_as_fast(
            ("dense-pixel",), model="ResNet-50", **value
        ),
        "ViT-B/16 at 224, joint step, M 2: time over that of a plain training step": _over_plain(table, **joint),
    }


def _over_plain(table: Table, **setting: Any) -> float | None:
    fast = table.times_as_fast(PLAIN, coalitions=2, **setting)
    return None if fast is None else 1 / fast


def _agreement(table: Table) -> Figures:
    """The largest difference between ways that evaluate the same game."""

    def largest(field: str, *modes: str) -> float | None:
        rows = [row for row in table.rows if row["mode"] in modes and row["dtype"] == "float32"]
        return max((row[field] for row in rows if field in row), default=None)

    gradients = "gradients of packed and dense: largest relative difference of a parameter's, float32"
    return {
        "v(S) of packed and dense: largest difference, float32": largest("difference", "value"),
        "loss of packed and dense: relative difference, float32": largest("difference", "detached", "live"),
        gradients: largest("gradient_difference", "value", "detached", "live"),
    }


# -- growth --------------------------------------------------------------------------------------------------------


def series(rows: list[Row], device: str) -> dict[str, dict[str, list[Row]]]:
    """Of each growing size and way, the rows from the smallest on."""
    table = Table(rows)
    found: dict[str, dict[str, list[Row]]] = {}
    for size, steps in growth(device).items():
        for step in steps:
            for row in table.find(step.ways, **setting_of(step)):
                found.setdefault(size, {}).setdefault(row["way"], []).append(row)
    return found


def _growth_figures(table: Table, device: str) -> Figures:
    ours = {size: ways.get("packed", []) for size, ways in series(table.rows, device).items()}
    by_players = {row["players"]: row for row in ours.get("P", [])}
    ratio = None
    if 49 in by_players and 196 in by_players:
        few, many = by_players[49], by_players[196]
        ratio = (many["ms_p50"] / few["ms_p50"]) / (many["tokens"] / few["tokens"])
    found: Figures = {"growth from P 49 to 196: time over linear in total tokens": ratio}
    for name, field in SIZES.items():
        wanted = [getattr(step, field) for step in growth(device)[name]]
        points = [(row[field], row["ms_p50"]) for row in ours.get(name, [])]
        what = f"growth with {name} from {wanted[0]} to {wanted[-1]}: largest ratio to a straight line"
        found[what] = distance_from_line(points) if {size for size, _ in points} == set(wanted) else None
    return found


def distance_from_line(points: list[tuple[float, float]]) -> float:
    """The largest ratio, either way, between a time and a + b·size, fitted in relative error."""
    sizes, times = torch.tensor(points, dtype=torch.float64).T
    scaled = torch.stack([1 / times, sizes / times], 1)
    solution = torch.linalg.lstsq(scaled, torch.ones_like(times).unsqueeze(1)).solution
    ratios = (scaled @ solution).clamp_min(1e-9)
    return float(torch.maximum(ratios, 1 / ratios).max())
