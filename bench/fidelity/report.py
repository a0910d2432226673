"""What the fidelity experiment found: means over the seeds, the promises beside their figures, tables and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench.lib import targets
from bench.lib.results import Row, read

NETWORKS = {"vit": "ViT", "cnn": "CNN"}
OURS, AMORTIZED = "ours", "amortized"
#: In the game of FastSHAP's surrogate, which no other method explains: FastSHAP itself, and KernelSHAP with 4096.
IN_SURROGATE, SURROGATE = "amortized_surrogate", "kernel_shap_surrogate"
#: Methods that read gradients or attention, and remove nothing.
GRADIENT_OR_ATTENTION = (
    "gradient_input",
    "integrated_gradients",
    "smoothgrad",
    "smoothgrad_input",
    "grad_cam",
    "attention_rollout",
    "chefer",
)
NOT_POST_HOC = (OURS, AMORTIZED, IN_SURROGATE, SURROGATE)
#: In tables, what everything else is set beside.
FIRST = ("plain", "recipe")


class Findings:
    """All results of one budget: `runs` by network and setting, `methods` by network.

    Of methods, `names` and, by network, `evaluations`: forward passes an image.
    """

    def __init__(self, folder: Path) -> None:
        found = [read(path) for path in sorted(folder.glob("*.json"))]
        self.runs: dict[tuple[str, str], list[Row]] = {}
        self.methods: dict[str, list[Row]] = {}
        self.names: dict[str, str] = {}
        self.evaluations: dict[tuple[str, str], int] = {}
        for result in found:
            if "setting" in result:
                self.runs.setdefault((result["network"], result["setting"]), []).append(result)
            else:
                self.methods.setdefault(result["network"], []).append(result)
                self.names |= {row["method"]: row["name"] for row in result["rows"]}
                costs = {(result["network"], row["method"]): row["evaluations"] for row in result["rows"]}
                self.evaluations |= costs
        for (network, setting), runs in self.runs.items():
            if any(run.get("settings") != runs[0].get("settings") for run in runs):
                raise ValueError(
                    f"{folder}: the seeds of {network}-{setting} were trained with different settings. Delete the "
                    "results of the old ones."
                )

    def in_order(self) -> list[tuple[str, str]]:
        """(network, setting) of the runs: plain and the recipe first, then from best to worst R²."""

        def place(key: tuple[str, str]) -> tuple[int, int, float]:
            network, setting = key
            r2 = self.over_seeds(network, setting, r2_of)
            rank = FIRST.index(setting) if setting in FIRST else len(FIRST)
            return list(NETWORKS).index(network), rank, -r2[0] if r2 else 0.0

        return sorted(self.runs, key=place)

    def over_seeds(
        self, network: str, setting: str, figure: Callable[[Row], float | None]
    ) -> tuple[float, float] | None:
        """(mean, standard deviation) over the seeds, 0 for one; None where nothing is measured."""
        return spread([figure(run) for run in self.runs.get((network, setting), [])])

    def accuracy_difference(self, network: str, setting: str) -> tuple[float, float] | None:
        """Accuracy minus the plain model's of the same seed, in points."""
        plain = {run["seed"]: run["accuracy"] for run in self.runs.get((network, "plain"), [])}
        runs = self.runs.get((network, setting), [])
        return spread([run["accuracy"] - plain[run["seed"]] for run in runs if run["seed"] in plain])

    def of_methods(self, network: str, game: str, figure: str) -> dict[tuple[str, str], tuple[float, float]]:
        """(mean, standard deviation) over the seeds of a figure, by model and method."""
        found: dict[tuple[str, str], list[float | None]] = {}
        for result in self.methods.get(network, []):
            for row in result["rows"]:
                if row["game"] == game:
                    found.setdefault((row["model"], row["method"]), []).append(row[figure])
        return {key: both for key, values in found.items() if (both := spread(values))}


def r2_of(run: Row) -> float:
    return run["fidelity"]["r2"]


def spread(values: list[float | None]) -> tuple[float, float] | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else 0.0


def best_of_models(found: dict[tuple[str, str], tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Each method's figure on the model on which it is largest."""
    best: dict[str, tuple[float, float]] = {}
    for (_, method), both in found.items():
        if method not in best or both[0] > best[method][0]:
            best[method] = both
    return best


def over_best(
    found: dict[tuple[str, str], tuple[float, float]], ours: float | None, rivals: Callable[[tuple[str, str]], bool]
) -> float | None:
    """Our figure over that of the best of the rivals, each a model and method."""
    best = max((mean for key, (mean, _) in found.items() if rivals(key)), default=0.0)
    return ours / best if ours is not None and best > 0 else None


def equal_evaluations(run: Row) -> float | None:
    """KernelSHAP's evaluations of an image that leave the same error as the model's own values.

    Its error falls as 1 / evaluations: carried on from the measured point that is nearest.
    """
    ours = run["fidelity"]["mean_squared_error"]
    points = [(row["evaluations"], row["mean_squared_error"]) for row in run["kernel_shap"]]
    if not points or not ours:
        return None
    evaluations, error = min(points, key=lambda point: abs(math.log(point[1] / ours)))
    return evaluations * error / ours


def time_ratio(run: Row) -> float | None:
    """Time of KernelSHAP with 2048 evaluations over that of our explanations, taken in turn."""
    return run["time"]["kernel_shap_ms_per_image"] / run["time"]["ms_per_image"] if "time" in run else None


def judge(findings: Findings) -> list[Row]:
    """Every target beside its figure."""
    found: dict[str, float | None] = {}
    for network, name in NETWORKS.items():
        found |= {f"{name}: {what}": figure for what, figure in _figures(findings, network)}
    return targets.judge("fidelity", found)


def _figures(findings: Findings, network: str) -> Iterator[tuple[str, float | None]]:
    def over_seeds(figure: Callable[[Row], float | None], setting: str = "recipe") -> float | None:
        return _mean(findings.over_seeds(network, setting, figure))

    yield "accuracy minus plain, points", _mean(findings.accuracy_difference(network, "recipe"))
    yield "R², all classes", over_seeds(r2_of)
    yield "correlation, predicted class", over_seeds(lambda run: run["fidelity"]["correlation_predicted"])
    yield "as accurate as KernelSHAP with evaluations", over_seeds(equal_evaluations)
    yield "times as fast as KernelSHAP, 2048", over_seeds(time_ratio)
    for game, removal in (("own", "own removal"), ("pixel", "grey pixels")):
        for figure, name in (("difference", "insertion − deletion"), ("aopc", "AOPC")):
            of_game = findings.of_methods(network, game, figure)
            ours = _mean(best_of_models(of_game).get(OURS))
            for words, is_rival in _RIVALS.items():
                yield f"{name}, {removal}: over the best {words} method's", over_best(of_game, ours, is_rival)
    yield (
        "R² minus FastSHAP's, each of the game that it learned",
        _minus(over_seeds(r2_of), over_seeds(r2_of, "fastshap")),
    )
    of_game = findings.of_methods(network, "own", "difference")
    ours, theirs = _mean(of_game.get(("recipe", OURS))), _mean(of_game.get(("plain", AMORTIZED)))
    yield "insertion − deletion minus FastSHAP's, in the classifier's game", _minus(ours, theirs)


_RIVALS: dict[str, Callable[[tuple[str, str]], bool]] = {
    "post-hoc": lambda key: key[1] not in NOT_POST_HOC,
    "gradient or attention": lambda key: key[1] in GRADIENT_OR_ATTENTION,
}


def _mean(both: tuple[float, float] | None) -> float | None:
    return None if both is None else both[0]


def _minus(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours - theirs
