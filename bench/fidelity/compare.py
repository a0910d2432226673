"""Every method of explanation beside ours: removal curves, sensitivity-n and the error of the Shapley values.

Two games judge: the model's own removal, and pixels that become the mean colour. A post-hoc method explains the plain
model and the self-explaining one, and each of its figures is the better of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastshap_vision as fv
from bench.fidelity.methods import METHODS
from bench.fidelity.report import AMORTIZED, IN_SURROGATE, OURS, SURROGATE
from bench.fidelity.subject import Subject
from bench.lib.timer import timed
from fastshap_vision import metrics

#: Sizes of the subsets of sensitivity-n, as shares of the players.
SIZES = (0.1, 0.3, 0.5, 0.7, 0.9)
#: Shares of the players removed, of AOPC and LOdds.
NINE_LEVELS = tuple(tenths / 10 for tenths in range(1, 10))
NAMES = {
    OURS: "ours",
    AMORTIZED: "FastSHAP / ViT-Shapley",
    IN_SURROGATE: "FastSHAP / ViT-Shapley, in its surrogate's game",
    SURROGATE: "KernelSHAP, 4096, in the surrogate's game",
}
#: Forward passes an image of those that are none of `METHODS`; an amortised explainer runs two networks.
EVALUATIONS = {OURS: 1, AMORTIZED: 2, IN_SURROGATE: 2, SURROGATE: 4096}
Explain = Callable[[Tensor, Tensor], Tensor]


class Remembered:
    """A game on the same images again and again: it evaluates equal coalitions once.

    The subsets of sensitivity-n are the same for every method, and most of what judging one costs.
    """

    def __init__(self, game: Any) -> None:
        self.game, self.players = game, game.players
        self._values: dict[bytes, Tensor] = {}

    def coalition_values(self, images: Tensor, bits: Tensor) -> Tensor:
        key = bits.cpu().numpy().tobytes()
        if key not in self._values:
            self._values[key] = self.game.coalition_values(images, bits)
        return self._values[key]


def compare_methods(
    network: str,
    models: dict[str, fv.SelfExplainingClassifier],
    explainers: dict[str, fv.baselines.FastSHAPExplainer],
    images: Tensor,
) -> list[dict[str, Any]]:
    """A row for each model, method and game.

    Args:
        network: "vit" or "cnn": which methods there are.
        models: by setting; those that explain themselves are the ones with trained shares or votes ("plain" is not).
        explainers: amortised explainers of the plain model, by setting. They are judged in its game, and in that of
            their own surrogates, where KernelSHAP shows what is there to find.
        images: (B, C, H, W) test images.
    """
    rows: list[dict[str, Any]] = []
    for setting, model in models.items():
        ways: dict[str, Explain] = {}
        twin = next((name for name in dict.fromkeys(row["model"] for row in rows) if _alike(models[name], model)), None)
        if twin:
            rows += [row | {"model": setting} for row in rows if row["model"] == twin and row["method"] != OURS]
        elif model.is_exact_conversion:
            ways |= _post_hoc(network, Subject.of(model))
        if setting == "plain":
            for explainer in explainers.values():
                ways[AMORTIZED] = _by(explainer)
        else:
            ways[OURS] = _by(model)
        rows += _judge(setting, ways, model, images)
    for setting, explainer in explainers.items():
        surrogate = Subject.of(explainer.surrogate)
        ways = {
            IN_SURROGATE: _by(explainer),
            SURROGATE: lambda x, y, surrogate=surrogate: METHODS["kernel_shap_4096"](surrogate, x, y),
        }
        rows += _judge(setting, ways, explainer.surrogate, images)
    return rows


def _by(model: Any) -> Explain:
    return lambda images, target: model.explain(images, target).values


def _alike(first: fv.SelfExplainingClassifier, second: fv.SelfExplainingClassifier) -> bool:
    """Whether two models are one to a post-hoc method: equal weights, one game."""
    ours, theirs = first.backbone.state_dict(), second.backbone.state_dict()
    is_one_game = (type(first.head), first.removal) == (type(second.head), second.removal)
    return is_one_game and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def _post_hoc(network: str, subject: Subject) -> dict[str, Explain]:
    served = {key: method for key, method in METHODS.items() if network in method.families}
    return {key: lambda x, y, method=method: method(subject, x, y) for key, method in served.items()}


def _judge(
    setting: str, ways: dict[str, Explain], model: fv.SelfExplainingClassifier, images: Tensor
) -> list[dict[str, Any]]:
    """A row for each way and game; the class explained is the one that the model predicts."""
    games = {"pixel": Remembered(fv.MaskedImageGame(model, model.grid, "mean"))}
    if model.removal != "pixel":  # else they are one
        games["own"] = Remembered(model)
    with torch.no_grad():
        target = model(images).argmax(1)
    rows = []
    for name, explain in ways.items():
        found, taken = timed(lambda explain=explain: explain(images, target).detach().float(), images.device)
        for game_name, game in games.items():
            figures = scores(game, images, found, target)
            about = {"model": setting, "method": name, "name": NAMES.get(name) or METHODS[name].name, "game": game_name}
            cost = {"evaluations": EVALUATIONS.get(name) or METHODS[name].evaluations(model.players)}
            rows.append(about | cost | {"ms_per_image": taken / len(images) * 1e3} | figures)
    return rows


@torch.no_grad()
def scores(game: Any, images: Tensor, attributions: Tensor, target: Tensor) -> dict[str, Any]:
    """Means over the images, and the standard errors of the two that the bars are about."""
    insertion = metrics.insertion(game, images, attributions, target)
    deletion = metrics.deletion(game, images, attributions, target)
    nine = deletion.curve.at(NINE_LEVELS)
    aopc = nine.aopc()
    sizes = sorted({max(1, min(game.players - 1, round(share * game.players))) for share in SIZES})
    sensitivity = metrics.sensitivity_n(game, images, attributions, target, sizes=sizes, subsets=50)
    difference = insertion - deletion
    return {
        "insertion": insertion.mean,
        "deletion": deletion.mean,
        "difference": difference.mean,
        "difference_standard_error": difference.standard_error,
        "aopc": aopc.mean,
        "aopc_standard_error": aopc.standard_error,
        "log_odds": nine.log_odds().mean,
        "sensitivity_n": sensitivity.score().mean,
        "insertion_curve": _mean_curve(insertion),
        "deletion_curve": _mean_curve(deletion),
    }


def _mean_curve(score: metrics.Score) -> list[float]:
    """Mean probability over the images at every number of patches."""
    return [round(p, 4) for p in score.curve.probability.mean(0).tolist()]
