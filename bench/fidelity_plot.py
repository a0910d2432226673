"""Pictures of the fidelity experiment: accuracy against R² of every setting, and the removal curves of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fidelity_report import AMORTIZED, NETWORKS, OURS, Findings, r2_of

#: R² of points whose names would stand on each other.
_NEAR = 0.003
_LOWEST = -10.0
OUR_COLOUR, THEIR_COLOUR, RIVAL_COLOUR = "#0b6e99", "0.72", "#b3541e"


def plot_settings(findings: Findings, path: Path) -> None:
    """Accuracy lost against R², a point a setting, a panel a network; up and to the right is better.

    A setting that lost more than `_LOWEST` points stands at the bottom, with its loss in its name.
    """
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(NETWORKS), figsize=(10.5, 4.8), layout="constrained")
    for panel, (network, name) in zip(panels, NETWORKS.items(), strict=True):
        upright: list[tuple[float, str]] = []  # of encoders left alone: many points in a row
        lost = 0
        for setting in [setting for of, setting in findings.runs if of == network and setting != "plain"]:
            accuracy = findings.accuracy_difference(network, setting)
            r2 = findings.over_seeds(network, setting, r2_of)
            if accuracy is None or r2 is None or setting == "fastshap":
                continue
            colour, shown = _colour(setting), max(accuracy[0], _LOWEST)
            panel.errorbar(r2[0], shown, accuracy[1], r2[1], "o", color=colour, markersize=5, linewidth=0.8)
            if accuracy == (0.0, 0.0):
                upright.append((r2[0], setting))
                continue
            side: dict[str, Any] = {"xytext": (5, 4), "ha": "left"}
            if accuracy[0] < _LOWEST:
                setting, side = f"{setting} ({accuracy[0]:.0f})", {"xytext": (-5, 4 + 9 * lost), "ha": "right"}
                lost += 1
            panel.annotate(setting, (r2[0], shown), color=colour, textcoords="offset points", fontsize=7, **side)
        for r2, names in _together(sorted(upright)):
            label, colour = ", ".join(names), _colour("recipe" if "recipe" in names else "")
            side = {"xytext": (0, 5), "rotation": 55, "textcoords": "offset points"}
            panel.annotate(label, (r2, 0.0), color=colour, fontsize=7, **side)
        panel.axhline(-0.3, color="0.7", linewidth=0.8, linestyle=":")
        panel.set_xlabel("R² to the Shapley values of its own game")
        panel.set_title(name, loc="left", pad=52)  # above the names that stand upright
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("accuracy minus plain, points")
    _save(figure, path)


def _colour(setting: str) -> str:
    return OUR_COLOUR if setting == "recipe" else "0.35"


def _together(points: list[tuple[float, str]]) -> list[tuple[float, list[str]]]:
    """Points, in order, whose names would stand on each other share a place."""
    places: list[tuple[float, list[str]]] = []
    for r2, name in points:
        if places and r2 - places[-1][0] < _NEAR:
            places[-1][1].append(name)
        else:
            places.append((r2, [name]))
    return places


def plot_curves(findings: Findings, path: Path) -> None:
    """Probability of the predicted class as patches come and go in the model's own game; means of images and seeds."""
    plt = _pyplot()
    figure, panels = plt.subplots(len(NETWORKS), 2, figsize=(9.5, 7.0), layout="constrained", squeeze=False)
    for row, (network, name) in zip(panels, NETWORKS.items(), strict=True):
        for panel, kind in zip(row, ("insertion", "deletion"), strict=True):
            for label, curve, colour, width in _curves(findings, network, f"{kind}_curve"):
                shares = [index / (len(curve) - 1) for index in range(len(curve))]
                panel.plot(shares, curve, color=colour, linewidth=width, label=label, zorder=width)
            panel.set(xlabel=f"share of patches {'present' if kind == 'insertion' else 'removed'}", ylim=(0, 1))
            panel.set_title(f"{name}, {kind}", fontsize=9, loc="left")
            panel.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel("probability of the predicted class")
        if row[0].lines:
            row[0].legend(fontsize=7, frameon=False)
    _save(figure, path)


def _curves(findings: Findings, network: str, curve: str) -> list[tuple[str | None, list[float], str, float]]:
    """(label, curve, colour, width): ours, FastSHAP's, random, and the other methods on the recipe's model, grey."""
    found: dict[str, list[list[float]]] = {}
    for result in findings.methods.get(network, []):
        for row in result["rows"]:
            if row["game"] == "own" and row["model"] == "recipe":
                found.setdefault(row["method"], []).append(row[curve])
    lines = []
    named = {
        OURS: ("ours", OUR_COLOUR, 2.2),
        AMORTIZED: ("FastSHAP", RIVAL_COLOUR, 1.6),
        "random": ("random", "black", 1.2),
    }
    for method, curves in found.items():
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        first_other = next(name for name in found if name not in named) if set(found) - set(named) else None
        label = "the other methods" if method == first_other else None
        lines.append(
            (named[method][0], mean, *named[method][1:]) if method in named else (label, mean, THEIR_COLOUR, 0.8)
        )
    return lines


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
