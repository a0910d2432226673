"""Trains plain and self-explaining models on CIFAR-10 and compares accuracy, fidelity and every explanation method.

    python -m bench.fidelity --data folder/of/archives --budget small

Every trained model is a step of its own with its own results file, and training goes on from its last epoch: a run that
was stopped is started again with the same command. `bench/fidelity/runs.py` says what is trained.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from copy import deepcopy
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor
from torch.utils.data import Dataset, Subset

import fastshap_vision as fv
from bench import tables
from bench.fidelity import archives
from bench.fidelity import runs as fidelity_runs
from bench.fidelity.checks import check_model, converge, first_images, game_key
from bench.fidelity.compare import compare_methods
from bench.fidelity.plot import plot_curves, plot_settings
from bench.fidelity.report import Findings, judge
from bench.fidelity.runs import BUDGETS, SETTINGS, Budget, Run
from bench.lib import machine
from bench.lib.machine import ROOT
from bench.lib.pictures import pyplot, save
from bench.lib.results import RESULTS, read, write
from fastshap_vision.explanations.page import explanation_page

#: The settings whose models every method explains; the first two must be trained.
COMPARED = ("plain", "recipe", "grey-pixels", "fastshap")
#: Precision of recorded coalitions.
RECORDING = "bf16"
#: Images on the page of explanations.
SHOWN = 6

#: What a result keeps of every epoch.
HISTORY = ("task", "masked_task", "value_r2", "spread")


def settings_of(run: Run, budget: Budget) -> dict[str, Any]:
    """All that a run's result depends on, as JSON: a result of other settings is not this run's."""
    setting = SETTINGS[run.setting]
    found = {
        "images": fidelity_runs.images_of(run, budget),
        "epochs": fidelity_runs.epochs_of(run, budget) if setting.kind != "amortized" else None,
        "evaluations": fidelity_runs.evaluations_of(run, budget),
        "training": fidelity_runs.training_of(run, budget),
        "kind": setting.kind,
        "objective": fidelity_runs.objective_of(run),
        "model": budget.networks[run.network] | setting.model,
        "explained": fidelity_runs.explained_of(run, budget),
        "starts_from": setting.starts_from and settings_of(Run(run.network, setting.starts_from, run.seed), budget),
    }
    return json.loads(json.dumps(found))


def result_path(run: Run, options: argparse.Namespace) -> Path:
    return options.output / options.budget / f"{run.name}.json"


def has_result(run: Run, options: argparse.Namespace) -> bool:
    path = result_path(run, options)
    return path.exists() and read(path)["settings"] == settings_of(run, BUDGETS[options.budget])


def prepare_process(options: argparse.Namespace) -> None:
    fv.keep_freed_memory()
    if options.device == "cpu" and options.jobs > 1:
        torch.set_num_threads(1)  # a core for each process


def load_train(run: Run, options: argparse.Namespace) -> Dataset:
    """The training images of a run. What is recorded must be the same image later: it is not augmented."""
    images, setting = BUDGETS[options.budget].images, SETTINGS[run.setting]
    train = archives.load(options.data, "train", augment=setting.kind != "recorded")
    train = Subset(train, range(min(images, len(train))))
    return fv.WithMirrorImages(train) if setting.mirrored else train


def load_test(options: argparse.Namespace) -> Any:
    return archives.load(options.data, "test")


def train_and_check(run: Run, options: argparse.Namespace) -> str:
    """One run, from where it was left; writes its results file."""
    prepare_process(options)
    budget, device = BUDGETS[options.budget], torch.device(options.device)
    setting, explained = SETTINGS[run.setting], fidelity_runs.explained_of(run, budget)
    train, test = load_train(run, options), load_test(options)
    training = train_explainer if setting.kind == "amortized" else train_classifier
    model, fits = training(run, train, len(test.classes), options)
    result = {
        "network": run.network,
        "setting": run.setting,
        "seed": run.seed,
        "about": setting.about,
        **check_model(model, test, explained, budget.evaluations, device, options.runs / "games"),
        "training_evaluations": fidelity_runs.evaluations_of(run, budget),
        "training_seconds": sum(fit.seconds for fit in fits),
        "history": [
            {name: row[name] for name in ("task", "masked_task", "value_r2", "spread")} for row in fits[-1].history
        ],
        "settings": settings_of(run, budget),
        "machine": machine.header(device),
    }
    write(result_path(run, options), result)
    return run.name


def train_classifier(run: Run, train: Any, classes: int, options: argparse.Namespace) -> tuple[Any, list[fv.FitResult]]:
    """A plain or self-explaining model."""
    budget, folder = BUDGETS[options.budget], folder_of(run, options)
    setting = SETTINGS[run.setting]
    model = fidelity_runs.make_model(run, budget, classes).to(options.device)
    if setting.starts_from:
        before = load_classifier(Run(run.network, setting.starts_from, run.seed), options)
        model.backbone.load_state_dict(before.backbone.state_dict())
    if setting.kind == "recorded":
        train = recorded_for(run, model, train, options)
    trained = model.backbone if setting.kind == "task" else model
    epochs = fidelity_runs.epochs_of(run, budget)
    result = fit(trained, train, fidelity_runs.make_objective(run), run, epochs, folder, options)
    model.save_pretrained(folder / "trained")
    return model, [result]


def recorded_for(
    run: Run, model: fv.SelfExplainingClassifier, train: Any, options: argparse.Namespace
) -> fv.RecordedCoalitions:
    """The coalitions of the training images, which all settings that share an encoder record once."""
    coalitions = fidelity_runs.objective_of(run)["coalitions"]
    folder = options.runs / "coalitions" / game_key(model, len(train), coalitions, run.seed)
    settings = {"seed": run.seed, "precision": RECORDING, "dtype": "float32", "progress": False}
    return fv.record_coalitions(model, train, coalitions, output=folder, **settings)


def train_explainer(run: Run, train: Any, classes: int, options: argparse.Namespace) -> tuple[Any, list[fv.FitResult]]:
    """FastSHAP / ViT-Shapley for a plain model: a surrogate that sees masked images, then an explainer network."""
    budget, folder = BUDGETS[options.budget], folder_of(run, options)
    plain = load_classifier(Run(run.network, "plain", run.seed), options)
    epochs = fidelity_runs.explainer_epochs(run, budget)
    surrogate = deepcopy(plain)
    first = fv.baselines.SurrogateObjective(plain.backbone, seed=run.seed)
    fits = [fit(surrogate, train, first, run, epochs, folder / "surrogate", options)]
    explainer = make_explainer(surrogate, plain)
    second = fv.baselines.FastSHAPObjective(fidelity_runs.EXPLAINER_COALITIONS, seed=run.seed)
    fits.append(fit(explainer, train, second, run, epochs, folder / "explainer", options))
    save_model(explainer, str(folder / "explainer.safetensors"))
    return explainer, fits


def make_explainer(
    surrogate: fv.SelfExplainingClassifier, plain: fv.SelfExplainingClassifier
) -> fv.baselines.FastSHAPExplainer:
    """The network that explains begins as the plain model, as the surrogate did, and as in the papers."""
    return fv.baselines.FastSHAPExplainer(surrogate, deepcopy(plain.backbone))


def fit(
    model: Any, train: Any, objective: Any, run: Run, epochs: int, folder: Path, options: argparse.Namespace
) -> fv.FitResult:
    return fv.fit(
        model,
        train,
        objective=objective,
        epochs=epochs,
        seed=run.seed,
        workers=options.workers,
        output=folder,
        resume="auto",
        progress=False,
        **fidelity_runs.training_of(run, BUDGETS[options.budget]),
    )


def compare(network: str, seed: int, options: argparse.Namespace) -> str:
    """Every method of explanation on the models of one network and seed; writes its results file."""
    prepare_process(options)
    budget, device = BUDGETS[options.budget], torch.device(options.device)
    test = load_test(options)
    runs = {run.setting: run for run in compared(network, seed, options)}
    models = {name: load_classifier(run, options) for name, run in runs.items() if name != "fastshap"}
    explainers = {name: load_explainer(run, options) for name, run in runs.items() if name == "fastshap"}
    images = first_images(test, budget.methods_seen, device)
    rows = compare_methods(network, models, explainers, images)
    if seed == budget.seeds[0]:
        page = options.pictures / f"fidelity_{network}.png"
        draw_explanations(models["recipe"], images[:SHOWN], budget.evaluations, test.classes, page)
    about = {"network": network, "seed": seed, "images": len(images)}
    write(
        methods_path(network, seed, options),
        about | {"settings": methods_settings(network, seed, options), "rows": rows},
    )
    return f"methods-{network}-{seed}"


def draw_explanations(
    model: fv.SelfExplainingClassifier, images: Tensor, evaluations: int, classes: list[str], path: Path
) -> None:
    """Our Shapley values beside converged ones, a row an image."""
    pyplot()
    reference = converge(model, images, evaluations)
    figure, _ = explanation_page(images, model.explain(images, target="all"), reference.phi, classes, "converged")
    save(figure, path)


def methods_path(network: str, seed: int, options: argparse.Namespace) -> Path:
    return options.output / options.budget / f"methods-{network}-{seed}.json"


def compared(network: str, seed: int, options: argparse.Namespace) -> list[Run]:
    """The runs whose models are compared: those that have a result."""
    runs = [Run(network, name, seed) for name in COMPARED]
    return [run for run in runs if has_result(run, options)]


def methods_settings(network: str, seed: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The settings of the runs compared."""
    return [settings_of(run, BUDGETS[options.budget]) for run in compared(network, seed, options)]


def folder_of(run: Run, options: argparse.Namespace) -> Path:
    """Checkpoints; other settings have another folder, so that no run goes on from another's."""
    settings = json.dumps(settings_of(run, BUDGETS[options.budget]), sort_keys=True)
    return options.runs / options.budget / f"{run.name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"


def load_classifier(run: Run, options: argparse.Namespace) -> fv.SelfExplainingClassifier:
    folder = folder_of(run, options) / "trained"
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no trained model {str(folder)!r}. Train it first: --settings {run.setting}.")
    return fv.SelfExplainingClassifier.from_pretrained(folder).to(options.device).eval()


def load_explainer(run: Run, options: argparse.Namespace) -> fv.baselines.FastSHAPExplainer:
    plain = load_classifier(Run(run.network, "plain", run.seed), options)
    explainer = make_explainer(deepcopy(plain), plain)
    load_model(explainer, folder_of(run, options) / "explainer.safetensors")
    return explainer.to(options.device).eval()


def waves(runs: list[Run]) -> list[list[Run]]:
    """Seed by seed, what others start from first: the runs of one wave need nothing of each other."""
    found = []
    for seed in dict.fromkeys(run.seed for run in runs):
        of_seed = [run for run in runs if run.seed == seed]
        found.append([run for run in of_seed if not SETTINGS[run.setting].starts_from])
        found.append([run for run in of_seed if SETTINGS[run.setting].starts_from])
    return [wave for wave in found if wave]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of cifar10_train.npz and cifar10_test.npz")
    parser.add_argument("--budget", default="small", choices=list(BUDGETS))
    parser.add_argument("--networks", nargs="+", default=["vit", "cnn"], choices=["vit", "cnn"])
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), help="these in place of the budget's")
    parser.add_argument("--seeds", nargs="+", type=int, help="these in place of the budget's")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side; 1 on a GPU")
    parser.add_argument("--workers", type=int, help="processes that load data; default 8 on a GPU, else none")
    parser.add_argument("--runs", type=Path, default=Path("runs/fidelity"), help="folder of checkpoints")
    parser.add_argument("--pictures", type=Path, default=ROOT / "docs")
    parser.add_argument("--output", type=Path, default=RESULTS / "fidelity")
    options = parser.parse_args()
    if options.device == "cuda":
        options.jobs = 1
    if options.workers is None:
        options.workers = 8 if options.device == "cuda" else 0
    return options


def main() -> None:
    options = arguments()
    budget = BUDGETS[options.budget]
    runs = fidelity_runs.runs_of(budget, options.networks, options.settings, options.seeds)
    failed: list[str] = []
    for wave in waves(runs):
        waiting = [run for run in wave if not has_result(run, options)]
        failed += carry_out([partial(train_and_check, run, options) for run in waiting], options.jobs)
    pairs = dict.fromkeys((run.network, run.seed) for run in runs)
    ready = [pair for pair in pairs if is_comparable(*pair, options)]
    failed += carry_out([partial(compare, *pair, options) for pair in ready], options.jobs)
    findings = Findings(options.output / options.budget)
    judged = tables.targets_table("fidelity", judge(findings))
    print(tables.settings_table(findings), tables.methods_table(findings), judged, sep="\n\n")
    plot_settings(findings, options.pictures / "fidelity_settings.png")
    plot_curves(findings, options.pictures / "fidelity_curves.png")
    sys.exit(bool(failed))


def carry_out(calls: list[Callable[[], str]], jobs: int) -> list[str]:
    """All calls, `jobs` side by side, each in a process of its own; a run that came to nothing stops no other."""
    failed = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else ThreadPoolExecutor(1) as pool:
        for future in as_completed([pool.submit(call) for call in calls]):
            try:
                print(f"{future.result()}: done", flush=True)
            except (fv.TrainingError, FileNotFoundError) as error:
                failed.append(str(error))
                print(error, flush=True)
    return failed


def is_comparable(network: str, seed: int, options: argparse.Namespace) -> bool:
    """Whether there are models to compare, and these were not compared yet."""
    if not all(has_result(Run(network, name, seed), options) for name in COMPARED[:2]):
        return False
    path = methods_path(network, seed, options)
    return not path.exists() or read(path)["settings"] != methods_settings(network, seed, options)
