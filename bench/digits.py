"""Trains a vision transformer and a convolutional network that explain themselves, and checks them against the truth.

On scikit-learn's handwritten digits (8×8 pixels, 16 patches) every one of the 65 536 coalitions of patches can be
evaluated, so each explanation is compared with the exact Shapley values of the model's own game.

    python -m bench.digits --output runs/demo
    python -m bench.digits --models vit --seeds 0 1 2 --heads shares votes --record bench/results/digits_vit.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.fidelity.checks import one_explanation
from bench.lib import machine, networks
from bench.lib.pictures import pyplot, save
from bench.lib.results import read, write
from bench.lib.timer import timed
from bench.tables import digits_table
from fastshap_vision.explanations.page import explanation_page

MODELS: dict[str, dict[str, Any]] = {
    "vit": networks.vit(8, patch_size=2, in_chans=1, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0),
    "cnn": networks.cnn(
        8, in_chans=1, depths=[2], channels=[64], stem_type="deep", stem_chs=64, bottle_ratio=0.5, output_stride=2
    ),
}
#: Of classifier and explanation together, the same for plain models; the explainer of a trained model has the recipe
#: of `fv.recipe`.
TRAINING = {"epochs": 100, "batch_size": 64, "lr": 2e-3, "weight_decay": 0.05, "warmup_epochs": 5, "clip_grad": 1.0}
OBJECTIVE = {"coalitions": 4, "regression_ramp": (0.0, 0.5), "masked_task_weight": 1.0}
#: λ. The votes are the logits, so that their regression moves the game itself: the CNN's collapsed with 1 and with 3.
REGRESSION_WEIGHT = {"vit": {"shares": 3.0, "votes": 3.0}, "cnn": {"shares": 3.0, "votes": 0.3}}
#: Images whose exact values are computed: 65 536 masked forward passes each.
CHECKED = {"vit": 20, "cnn": 10}
#: Images of each model in the picture.
SHOWN = 3


def build(kind: str, head: str, seed: int) -> fv.SelfExplainingClassifier:
    """The model of one kind; equal seeds give equal backbones, whatever the head."""
    torch.manual_seed(seed)
    return fv.SelfExplainingClassifier(num_classes=10, head=head, backbone_gradient=1.0, **MODELS[kind])


def train(kind: str, head: str | None, seed: int, data: Any, test: Any) -> tuple[fv.SelfExplainingClassifier, Any]:
    """Trains one model; without a head, the plain one: the same backbone on the task alone."""
    model = build(kind, head or "shares", seed)
    objective: Any = fv.TaskObjective()
    if head:
        objective = fv.JointObjective(**OBJECTIVE, regression_weight=REGRESSION_WEIGHT[kind][head], seed=seed)
    print(f"training the {'plain' if head is None else head} {kind}, seed {seed}", flush=True)
    result = fv.fit(
        model if head else model.backbone, data, test, objective=objective, seed=seed, progress=False, **TRAINING
    )
    return model.eval(), result


def measure(kind: str, head: str, seed: int, plain: Any, data: Any, test: Any) -> tuple[dict[str, Any], Any, Any]:
    """Trains one self-explaining model and checks it: figures, the model and the exact values."""
    model, result = train(kind, head, seed, data, test)
    images = torch.stack([test[i][0] for i in range(CHECKED[kind])])
    exact, seconds_exact = timed(lambda: fv.exact_values(model, images))
    fidelity = fv.fidelity(model, images, reference=exact)
    figures = {
        "head": head,
        "seed": seed,
        "accuracy": result.accuracy,
        "plain_accuracy": plain.accuracy,
        "r2_exact": fidelity.r2,
        "correlation": fidelity.correlation_predicted,
        "efficiency_gap": fidelity.efficiency_gap,
        "images_checked": len(images),
        "seconds_training": result.seconds,
        "seconds_training_plain": plain.seconds,
        "seconds_exact_values": seconds_exact,
        "ms_per_explanation": one_explanation(model, images),
        "device": machine.device_name(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "timm": timm.__version__, "fastshap_kernels": fk.__version__},
    }
    return figures, model, exact


class Run(NamedTuple):
    """All that one model's process sends back."""

    rows: list[dict[str, Any]]
    explanation: fv.Explanation  # of the first model trained, for the first images
    exact: torch.Tensor  # (B, P, K)


def run_model(kind: str, options: argparse.Namespace) -> Run:
    """Every seed and head of one model, on one core."""
    torch.set_num_threads(1)
    TRAINING["epochs"] = options.epochs
    if options.images:
        CHECKED[kind] = options.images
    data, test = fv.load_dataset("digits", "train"), fv.load_dataset("digits", "test")
    rows: list[dict[str, Any]] = []
    for seed in options.seeds:
        _, plain = train(kind, None, seed, data, test)
        for head in options.heads:
            figures, model, exact = measure(kind, head, seed, plain, data, test)
            rows.append({"model": kind, **figures})
            print(f"    {kind}: {describe(rows[-1])}", flush=True)
            if options.record:
                record(rows[-1], options.record)
            if len(rows) == 1:
                images = torch.stack([test[i][0] for i in range(min(SHOWN, CHECKED[kind]))])
                shown = model.explain(images, target="all"), exact.phi[: len(images)]
    return Run(rows, *shown)


def draw(runs: list[Run], path: Path) -> None:
    """Image, heat maps of the predicted class and the runner-up, exact values beside ours; a row an image."""
    pyplot()
    test = fv.load_dataset("digits", "test")
    made = [run.explanation for run in runs]
    # In both models patches vote, so v(∅) = 0 and their explanations fit on one page.
    page = fv.Explanation(
        values=torch.cat([one.values for one in made]),
        logits=torch.cat([one.logits for one in made]),
        target=None,
        grid=made[0].grid,
        null=made[0].null,
    )
    images = torch.stack([test[i][0] for one in made for i in range(len(one))])
    figure, _ = explanation_page(images, page, torch.cat([run.exact for run in runs]), test.classes)
    save(figure, path)


def describe(row: dict[str, Any]) -> str:
    """One line of figures."""
    return (
        f"accuracy {row['accuracy']:.2f} % (plain {row['plain_accuracy']:.2f} %), R² {row['r2_exact']:.3f}, "
        f"r {row['correlation']:.3f}, {row['ms_per_explanation']:.1f} ms an explanation, "
        f"trained in {row['seconds_training']:.0f} s"
    )


def record(row: dict[str, Any], path: Path) -> None:
    """Puts one run into the file of a model, in the place of an earlier run of its head and seed."""
    kind = row["model"]
    setup = {
        "training": TRAINING,
        "objective": OBJECTIVE,
        "regression_weight": REGRESSION_WEIGHT[kind],
        "model": MODELS[kind],
    }
    setup = json.loads(json.dumps(setup))  # tuples as they are read back
    known = read(path, {"setup": setup, "runs": []})
    # Runs of another recipe don't belong beside this one.
    others = known["runs"] if known["setup"] == setup else []
    runs = [run for run in others if (run["head"], run["seed"]) != (row["head"], row["seed"])] + [row]
    runs.sort(key=lambda run: (run["head"], run["seed"]))
    write(path, {"machine": machine.header(), "setup": setup, "means": means(runs), "runs": runs})


def means(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over the seeds, per head."""
    names = ("accuracy", "plain_accuracy", "r2_exact", "correlation", "seconds_training", "ms_per_explanation")
    heads = sorted({run["head"] for run in runs})
    groups = [[run for run in runs if run["head"] == head] for head in heads]
    return [
        {"model": group[0]["model"], "head": group[0]["head"], "seeds": len(group)}
        | {name: statistics.fmean(run[name] for run in group) for name in names}
        for group in groups
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of report and pictures")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--heads", nargs="+", default=["shares"], choices=["shares", "votes"])
    parser.add_argument("--epochs", type=int, default=TRAINING["epochs"])
    parser.add_argument("--images", type=int, help=f"test images to check (default {CHECKED})")
    parser.add_argument("--record", type=Path, help="write every run and the means over seeds to this file")
    options = parser.parse_args()
    most = len(fv.load_dataset("digits", "test"))
    if options.epochs < 1 or (options.images is not None and not 1 <= options.images <= most):
        parser.error(f"--epochs must be at least 1, and --images from 1 to {most}")
    options.output.mkdir(parents=True, exist_ok=True)

    # A core for each model: networks as small as these gain nothing from two.
    with ProcessPoolExecutor(len(options.models), get_context("spawn")) as pool:
        runs = list(pool.map(run_model, options.models, [options] * len(options.models)))
    draw(runs, options.output / "explanations.png")
    first = {run.rows[0]["model"]: run.rows[0] for run in runs}
    write(options.output / "report.json", {"models": first})
    print(digits_table([{"means": means(run.rows)} for run in runs]))
    print(f"report and pictures: {options.output}")


if __name__ == "__main__":
    main()
