"""Pictures of the fidelity experiment: R² and accuracy of every setting, and the removal curves of every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bench.fidelity.report import AMORTIZED, NETWORKS, OURS, Findings, r2_of
from bench.lib.pictures import pyplot, save

OUR_COLOUR, THEIR_COLOUR, RIVAL_COLOUR = "#0b6e99", "0.72", "#b3541e"
#: Of each network's points: shape, colour, and how far above the middle of the row.
POINTS = {"vit": ("o", OUR_COLOUR, 0.15), "cnn": ("D", RIVAL_COLOUR, -0.15)}


def plot_settings(findings: Findings, path: Path) -> None:
    """R² and accuracy minus plain, a row a setting, the highest R² first; whiskers are deviations over the seeds."""
    plt = pyplot()
    found: dict[str, dict[str, tuple[Any, Any]]] = {}
    for network, setting in findings.runs:
        accuracy = findings.accuracy_difference(network, setting)
        r2 = findings.over_seeds(network, setting, r2_of)
        if accuracy and r2 and setting != "fastshap" and not setting.startswith("plain"):
            found.setdefault(setting, {})[network] = (r2, accuracy)
    settings = sorted(found, key=lambda setting: sum(r2[0] for r2, _ in found[setting].values()) / len(found[setting]))
    figure, panels = plt.subplots(
        1, 2, figsize=(9.0, 1.4 + 0.21 * len(settings)), layout="constrained", sharey=True, squeeze=False
    )
    for network, name in NETWORKS.items():
        shape, colour, above = POINTS[network]
        seen = [
            (row + above, found[setting][network]) for row, setting in enumerate(settings) if network in found[setting]
        ]
        for panel, at in zip(panels[0], (0, 1), strict=True):
            means, deviations = ([values[at][part] for _, values in seen] for part in (0, 1))
            rows = [row for row, _ in seen]
            panel.errorbar(means, rows, None, deviations, shape, color=colour, markersize=5, label=name)
    panels[0, 0].set_yticks(range(len(settings)), settings)
    for label in panels[0, 0].get_yticklabels():
        label.set_fontweight("bold" if label.get_text() == "recipe" else "normal")
    panels[0, 0].set_xlabel("R² to the Shapley values of its own game")
    panels[0, 1].set_xlabel("accuracy minus plain, points")
    panels[0, 1].set_xscale("symlog", linthresh=1.0)
    panels[0, 1].margins(x=0.08)
    ticks = (-30, -10, -3, -1, 0, 1, 3, 10)
    panels[0, 1].set_xticks(ticks, [f"{tick:+d}" if tick else "0" for tick in ticks])
    panels[0, 1].minorticks_off()
    for panel in panels[0]:
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    if settings:
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper left", ncols=2, frameon=False)
    save(figure, path)


def plot_curves(findings: Findings, path: Path) -> None:
    """Probability of the predicted class as patches come and go in the model's own game; means of images and seeds."""
    plt = pyplot()
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
    save(figure, path)


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
