"""Time of a joint step against players, coalitions and classes: python -m bench.step.plot results.json figure.png."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from bench.lib.pictures import pyplot, save
from bench.step.figures import series

COLOURS = {"packed": "#0b6e99", "dense-mask": "#b3541e"}
TITLES = {"P": "P, patches of an image", "M": "M, coalitions of an image", "K": "K, classes"}
SIZES = {"P": "players", "M": "coalitions", "K": "classes"}


def plot(content: dict[str, Any], path: Path) -> None:
    """One panel a size, both axes logarithmic."""
    plt = pyplot()
    found = series(content["rows"], content["kind"])
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.6), layout="constrained")
    for panel, (size, title) in zip(panels, TITLES.items(), strict=True):
        panel.set(xscale="log", yscale="log", xlabel=title)
        panel.set_title(_about(size, found), fontsize=9, loc="left", color="0.35")
        panel.spines[["top", "right"]].set_visible(False)
        if size in found:
            _lines(panel, found[size], SIZES[size])
    panels[0].set_ylabel("ms a step")
    figure.suptitle(f"Time of a joint training step, {content['device']}; dotted: in proportion", x=0.01, ha="left")
    save(figure, path)


def _lines(panel: Any, ways: dict[str, list[dict[str, Any]]], size: str) -> None:
    """Each way's line with its name; our growth in proportion to the size, through its last point."""
    from matplotlib.ticker import LogLocator

    every: list[float] = []
    for way, rows in ways.items():
        sizes, times = [row[size] for row in rows], [row["ms_p50"] for row in rows]
        panel.plot(sizes, times, "o-", color=COLOURS[way], markersize=4)
        place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
        panel.annotate(way, (sizes[-1], times[-1]), color=COLOURS[way], **place)
        every += times
        if way == "packed":
            panel.plot(sizes, [times[-1] * x / sizes[-1] for x in sizes], ":", color="0.6", linewidth=1, zorder=0)
    panel.set_xticks(sizes, [str(x) for x in sizes])
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.minorticks_off()
    panel.tick_params(labelsize=8)
    # A decade and a half at least, so that what hardly grows looks so; the axis is the data's, not the dotted line's.
    middle, reach = (min(every) * max(every)) ** 0.5, max(5.5, 1.5 * (max(every) / min(every)) ** 0.5)
    panel.set_ylim(middle / reach, middle * reach)


def _about(size: str, found: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """What is held fixed in a panel."""
    row = next(iter(found.get(size, {}).values()), [None])[0]
    if row is None:
        return "not measured"
    fixed = {"P": row["players"], "M": row["coalitions"], "K": row["classes"], "B": row["batch"]}
    others = ", ".join(f"{name} {value}" for name, value in fixed.items() if name != size)
    return f"{row['model']}, {others}"


if __name__ == "__main__":
    plot(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
