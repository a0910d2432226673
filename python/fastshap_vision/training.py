"""Training: one loop for every model and objective.

Devices, precision and processes are accelerate's, optimisers and schedules timm's. What is ours: exact resume, a log
of the objective's terms, and a stop with a clear error when a run can come to nothing.
"""

from __future__ import annotations

import difflib
import logging
import math
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from timm.models import get_model_input_config
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate
from tqdm import tqdm

from fastshap_kernels._checks import check_count, check_number, describe, fail

from ._checks import check_choice
from .checkpoint import Checkpoints
from .classifier import SelfExplainingClassifier
from .coalition_objective import CoalitionObjective
from .data import Preprocessing
from .objective import TaskObjective
from .played import ExplainerObjective, PlayedGames
from .probe import evaluation_mode

_log = logging.getLogger(__name__)

TERMS = ("loss", "task", "regression", "masked_task", "r2", "spread")

# timm's schedules that follow the updates; "none" keeps the learning rate.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

_MOST = 2**31 - 1
_OF_OBJECTIVES = ("state_dict", "load_state_dict")

# The host reads the terms this often: seldom enough that the device never waits, often enough to stop a lost run.
STEPS_BETWEEN_READS = 100

# A game whose values vary this much less than in the run's best epoch, for so many epochs, is played no more.
COLLAPSED_SPREAD = 0.01
COLLAPSED_EPOCHS = 3
# Values that still differ by under a thousandth of a logit after this many epochs leave nothing to explain.
STILLBORN_SPREAD = 1e-3
STILLBORN_EPOCHS = 10


class TrainingError(RuntimeError):
    """A run that cannot come to a good end: values that are not finite, or a collapsed game."""


class Evaluation(NamedTuple):
    """Accuracy in percent and mean cross-entropy, as `evaluate` defines them."""

    accuracy: float
    loss: float


@dataclass
class FitResult:
    """What a training run leaves.

    Args:
        history: one dict an epoch: epoch, lr, the means of the objective's terms (None where there is none),
            eval_loss, eval_accuracy (percent; None without eval_data), eval_r2 (of eval_data that was played, as r2 is
            of the games trained on), seconds.
        seconds: of all epochs, those before a resume too.
        accuracy, best_accuracy: of the last epoch and of the best, percent; None without eval_data.
        checkpoint: the last checkpoint's folder; None without output.
    """

    history: list[dict[str, Any]]
    seconds: float
    accuracy: float | None
    best_accuracy: float | None
    checkpoint: Path | None


def fit(
    model: nn.Module,
    train_data: Dataset,
    eval_data: Dataset | None = None,
    *,
    objective: Any,
    epochs: int,
    batch_size: int = 128,
    opt: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.05,
    sched: str = "cosine",
    warmup_epochs: float = 0,
    clip_grad: float | None = None,
    seed: int = 0,
    workers: int = 0,
    mixed_precision: str = "no",
    compile: bool = False,
    grad_checkpointing: bool = False,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
) -> FitResult:
    """Trains `model` on the objective; a resumed run ends in the same bits as one that was never stopped.

    Args:
        model: takes images and returns logits (B, K); it is trained in place.
        train_data, eval_data: datasets of (image, label), or what `play` returned; of the latter eval_r2 is known.
            Labels of eval_data are as in `evaluate`. The `preprocessing` of train_data, if it has one for the model's
            input size, becomes the model's.
        objective: called as objective(model, images, labels), it returns the terms of the loss; `.progress`, the
            share of the training that is done, is set before each step. What it holds in its `state_dict` (tensors,
            numbers, words, lists, tuples, dicts) is part of a checkpoint.
        epochs: passes over train_data; the last, incomplete batch of each is left out.
        batch_size: images a step and process.
        opt, lr, weight_decay, sched, warmup_epochs: as in timm (create_optimizer_v2, create_scheduler_v2).
        clip_grad: largest norm of the gradient, or None. The encoder of a self-explaining model and its explainer are
            clipped apart.
        seed: of the data's order, augmentation and dropout, below 2³². Two runs with one seed are equal.
        workers: processes that load data.
        mixed_precision: "no", "bf16" or "fp16".
        compile: compiles the objective's step (`objective.compile`): slow first steps, faster later ones.
        grad_checkpointing: as in timm: activations within blocks are computed again instead of kept, where the model
            has `set_grad_checkpointing`. Less memory, more time, the same gradients. Off again after the run.
        output: the run's folder: summary.csv, model.safetensors and checkpoints, written after every epoch. None
            writes nothing. One run at a time writes to a folder.
        resume: None starts anew (and refuses an output folder that holds a run); "auto" goes on from the newest
            checkpoint in `output`, if there is one, and writes the model again if all epochs are done; a path names a
            run's folder or a checkpoint. From an earlier checkpoint in `output` the run goes back: the later ones are
            removed once it has trained and saved the epoch after it.
        progress: shows a bar on a terminal.

    Returns:
        the history of the run, its duration and accuracy. The model is left in evaluation mode, on the device that
        accelerate chose. The random generators of Python, numpy and torch, and an `Accelerator` of the caller's, are
        left as they were found.

    Raises:
        ValueError: an argument out of its range, or data that fits neither the batch nor the model.
        TypeError: the objective's state can't be written.
        CheckpointError: the checkpoint to resume from is missing, damaged, or of another run; or `output` can't be
            written to, which is tried before the first step, or another run writes to it.
        TrainingError: images or loss are not finite, or the game collapsed. The last checkpoint stays whole.
    """
    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "opt": opt,
        "lr": lr,
        "weight_decay": weight_decay,
        "sched": sched,
        "warmup_epochs": warmup_epochs,
        "clip_grad": clip_grad,
        "seed": seed,
        "workers": workers,
        "mixed_precision": mixed_precision,
        "compile": compile,
        "grad_checkpointing": grad_checkpointing,
    }
    _check_kinds(model, objective, output)
    if isinstance(model, SelfExplainingClassifier):
        _prepare_file(model, train_data, output)
    settings = _checked_settings(given)
    with _as_found(model, objective):
        if eval_data is not None:
            _check_data(model, eval_data, "fit", "eval_data")
        run = _Run(model, train_data, objective, settings)
        for games in (train_data, eval_data):
            if isinstance(games, PlayedGames) and isinstance(model, SelfExplainingClassifier):
                games.check(model)
        checkpoints = Checkpoints(
            output, run.accelerator, run.settings, model=model, optimizer=run.optimizer, objective=objective
        )
        with checkpoints.held():
            history = checkpoints.resume(resume)
            run.optimizer.zero_grad()  # of what the model was trained in before
            with run.bar(len(history), progress) as bar:
                for epoch in range(len(history), settings["epochs"]):
                    row = run.train_epoch(epoch, bar)
                    if eval_data is not None:
                        row |= run.evaluate(eval_data)
                    history.append(row)
                    if run.accelerator.is_main_process:
                        _log.info(_line(row, settings["epochs"]))
                    _check_game(history, getattr(model, "num_classes", None))
                    checkpoints.save(history)
    model.eval()
    accuracies = [row["eval_accuracy"] for row in history if row["eval_accuracy"] is not None]
    return FitResult(
        history,
        seconds=sum(row["seconds"] for row in history),
        accuracy=accuracies[-1] if accuracies else None,
        best_accuracy=max(accuracies, default=None),
        checkpoint=checkpoints.newest,
    )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    data: Dataset,
    batch_size: int = 256,
    *,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Accuracy (percent) and mean cross-entropy of `model` on `data`.

    Labels are class numbers, (B,). Where they have the shape of the logits, (B, K), each is a yes or no of its own, 1
    or 0: the accuracy is the share of all B·K labels that the sign of their logit says, and the cross-entropy is
    binary, its mean over all of them. The same for a single logit (K = 1), with labels (B,) or (B, 1).

    Args:
        model: takes images and returns logits (B, K); in eval mode for the while.
        data: a dataset of (image, label), or what `play` returned.
        batch_size: images a step (and process).
        workers: processes that load data.
        accelerator: spreads the work over its processes, in its precision; without one the model's device is used.

    Raises:
        ValueError: an argument out of its range, labels of another shape, or labels that are none of the K classes.
    """
    if not isinstance(model, nn.Module):
        fail("evaluate", "model", "a torch.nn.Module", model)
    check_count("evaluate", "batch_size", batch_size, 1, _MOST)
    check_count("evaluate", "workers", workers, 0, _MOST)
    _check_data(model, data, "evaluate", "data")
    data = data.data if isinstance(data, PlayedGames) else data
    # A generator of its own: the loader draws a seed for its workers, and the process's generator stays as it was.
    loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_Batch(), generator=torch.Generator())
    if accelerator is not None:
        loader = accelerator.prepare_data_loader(loader)
    like = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    counts, total = torch.zeros(3, dtype=torch.int64, device=like.device), torch.zeros((), device=like.device)
    with evaluation_mode(model):
        for images, labels in loader:
            with accelerator.autocast() if accelerator is not None else nullcontext():
                logits = model(images.to(like.device, like.dtype)).float()
            labels = labels.to(like.device)
            if accelerator is not None:
                logits, labels = accelerator.gather_for_metrics((logits, labels))
            loss, *found = _scores(logits, labels)
            total += loss
            counts += torch.stack(found)
    correct, impossible, count = counts.tolist()
    if impossible:
        raise ValueError(
            f"evaluate: {impossible} labels of the data are impossible for the model's {logits.shape[1]} logits. They "
            f"must be class numbers from 0 to {logits.shape[1] - 1}, or 1 and 0 for each logit. Build the model with "
            "as many classes as there are labels."
        )
    return Evaluation(accuracy=100 * correct / count, loss=float(total) / count)


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a batch: the sum of the cross-entropies; how many labels are right, impossible, and there in all."""
    of_one = logits.ndim == 2 and logits.shape[1] == 1 and labels.shape == logits.shape[:1]
    if logits.ndim == 2 and (labels.shape == logits.shape or of_one):
        wanted = labels.view_as(logits).float()
        impossible = (wanted < 0) | (wanted > 1)
        right = (logits > 0) == (wanted > 0.5)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    elif logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        impossible = (labels < 0) | (labels >= logits.shape[1])
        right = logits.argmax(dim=1) == labels
        loss = functional.cross_entropy(logits, labels.long().masked_fill(impossible, 0), reduction="sum")
    else:
        raise ValueError(
            "evaluate: labels must be class numbers (B,), or a yes or no (1 or 0) for each logit (B, K), but they are "
            f"{describe(labels)} for logits {tuple(logits.shape)}. Let the dataset return such labels."
        )
    return loss, right.sum(), impossible.sum(), torch.tensor(right.numel(), device=logits.device)


@contextmanager
def _as_found(model: nn.Module, objective: Any) -> Iterator[None]:
    """What a run changes beyond its arguments becomes what it was.

    accelerate keeps precision and gradient accumulation for the whole process: a run has its own, and the caller's
    come back after it. So do the random generators, whether blocks checkpoint their activations, and whether the
    objective's step is compiled.
    """
    states = (GradientState, AcceleratorState, PartialState)
    contents = [dict(state._shared_state) for state in states]
    for state in states[:2]:
        state._shared_state.clear()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    name = "grad_checkpointing"
    checkpointing = [(module, getattr(module, name)) for module in model.modules() if hasattr(module, name)]
    parts = [objective, *getattr(objective, "__dict__", {}).values()]  # an objective may hold another one
    compiled = [(part, part._compiled) for part in parts if isinstance(part, TaskObjective | CoalitionObjective)]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        for module, enabled in checkpointing:
            setattr(module, name, enabled)
        for part, step in compiled:
            part._compiled = step
        random.setstate(of_python)
        np.random.set_state(of_numpy)
        for state, content in zip(states, contents, strict=True):
            state._shared_state.clear()
            state._shared_state.update(content)


class _Batch:
    """Stacks items to a batch, or says what is wrong with them.

    Args:
        classes: of labels that are class numbers. They are checked here, on the CPU: on a GPU the loss would end the
            process's use of it. −100, which cross-entropy leaves out, may stand among them. None checks nothing.
    """

    def __init__(self, classes: int | None = None) -> None:
        self.classes = classes

    def __call__(self, items: list[Any]) -> Any:
        try:
            images, labels = default_collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The data's items can't be stacked to a batch: {error}. Let the dataset return (image, label), all "
                "images of one size, as fv.load_dataset does."
            ) from error
        if self.classes is not None and isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1:
            impossible = labels[((labels < 0) | (labels >= self.classes)) & (labels != -100)]
            if len(impossible):
                raise ValueError(
                    f"fit: `train_data` has the label {int(impossible[0])}, but the model's {self.classes} classes "
                    f"count from 0 to {self.classes - 1}. Build the model with as many classes as there are labels."
                )
        return images, labels


class TrainingStep(nn.Module):
    """The objective's terms as one forward pass, so that accelerate's precision and gradient exchange cover it all."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that an objective that is a module is no part of the model's weights.
        self._objective = (objective,)

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        terms = self._objective[0](self.model, images, labels)
        loss = getattr(terms, "loss", None)
        if not isinstance(loss, Tensor) or loss.ndim:
            raise ValueError(
                "fit: the `objective` must return terms with a scalar tensor `loss`, as ObjectiveTerms(loss), but its "
                f"loss is {describe(loss)}."
            )
        return {name: getattr(terms, name) for name in TERMS if getattr(terms, name, None) is not None}


class _Run:
    """One training run: what accelerate prepared, and the pass over an epoch."""

    def __init__(self, model: nn.Module, data: Dataset, objective: Any, settings: dict[str, Any]) -> None:
        _check_data(model, data, "fit", "train_data", settings["mixed_precision"])
        if isinstance(data, PlayedGames) and isinstance(objective, (TaskObjective, CoalitionObjective)):
            raise ValueError(
                f"fit: {type(objective).__name__} learns from labelled images, but train_data are games that were "
                "played. Pass the images, or use ExplainerObjective."
            )
        self.accelerator = Accelerator(
            mixed_precision=settings["mixed_precision"],
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            # While the regression's weight is 0 the shares take no part in the loss.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.settings = settings | {"images": len(data), "processes": self.accelerator.num_processes}  # type: ignore[arg-type]
        self.settings |= _identity(data, objective)
        _check_batch(self.settings)
        self.model = model
        self.objective = objective
        backbone = model.backbone if isinstance(model, SelfExplainingClassifier) else model
        self.encoder = list(backbone.parameters())
        of_encoder = {id(parameter) for parameter in self.encoder}
        self.explainer = [parameter for parameter in model.parameters() if id(parameter) not in of_encoder]
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise ValueError(
                "fit: argument `model` has no trainable parameter: all are frozen (requires_grad is False). Unfreeze "
                "some with requires_grad_(True)."
            )
        _prepare_step(model, objective, settings)
        set_seed(settings["seed"])  # the seedable sampler takes this seed
        optimizer = _create_optimizer(model, settings)
        # Workers live for one epoch: they then draw from its seed, whether or not the run was resumed before it.
        counted = getattr(objective, "task_loss", None) is functional.cross_entropy
        loader = DataLoader(
            data,
            settings["batch_size"],
            shuffle=True,
            drop_last=True,
            num_workers=settings["workers"],
            collate_fn=_Batch(getattr(model, "num_classes", None) if counted else None),
        )
        self.step, self.optimizer, self.loader = self.accelerator.prepare(
            TrainingStep(model, objective), optimizer, loader
        )
        # The schedule holds no state: step_update says which update it is.
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=settings["sched"],
            num_epochs=settings["epochs"],
            warmup_epochs=settings["warmup_epochs"],
            step_on_epochs=False,
            updates_per_epoch=len(self.loader),
        )

    def bar(self, epochs_done: int, progress: bool) -> tqdm:
        """A bar over the updates of the whole run; none where there is no terminal."""
        steps = len(self.loader)
        hidden = None if progress and self.accelerator.is_main_process else True
        return tqdm(total=self.settings["epochs"] * steps, initial=epochs_done * steps, disable=hidden, unit="step")

    def train_epoch(self, epoch: int, bar: tqdm) -> dict[str, Any]:
        """One pass over the data; returns its row of the history."""
        start = time.perf_counter()
        set_seed(_epoch_seed(self.settings["seed"], epoch, self.accelerator.process_index))
        self.loader.set_epoch(epoch)
        self.step.train()
        reader = _TermReader(epoch, bar)
        for index, (images, labels) in enumerate(self.loader):
            update = epoch * len(self.loader) + index
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            lr = self.optimizer.param_groups[0]["lr"]
            self.objective.progress = update / (self.settings["epochs"] * len(self.loader))
            terms = self.step(images, labels)
            if not terms["loss"].requires_grad:
                raise ValueError(
                    "fit: the objective's loss depends on none of the model's trainable parameters. Unfreeze those "
                    "that it trains (requires_grad_); or, to train the layers that explain beside a frozen backbone, "
                    "pass ShapleyObjective(regression_ramp=(0, 0)), whose regression counts from the first step on."
                )
            self.accelerator.backward(terms["loss"])
            if self.settings["clip_grad"] is not None:
                # Apart: no explainer changes how the encoder is trained.
                self.accelerator.clip_grad_norm_(self.encoder, self.settings["clip_grad"])
                nn.utils.clip_grad_norm_(self.explainer, self.settings["clip_grad"])
            self.optimizer.step()
            self.optimizer.zero_grad()
            reader.add(images, terms)
        return {
            "epoch": epoch + 1,
            "lr": lr,
            **reader.means(self.accelerator),
            "eval_loss": None,
            "eval_accuracy": None,
            "eval_r2": None,
            "seconds": time.perf_counter() - start,
        }

    def evaluate(self, data: Dataset) -> dict[str, float | None]:
        """The columns of the history that an evaluation fills."""
        accuracy, loss = evaluate(
            self.model,
            data,
            self.settings["batch_size"],
            workers=self.settings["workers"],
            accelerator=self.accelerator,
        )
        found = self._r2(data) if isinstance(data, PlayedGames) else None
        return {"eval_loss": loss, "eval_accuracy": accuracy, "eval_r2": found}

    @torch.no_grad()
    def _r2(self, games: PlayedGames) -> float | None:
        """The objective's r2 on games that were held out."""
        if not isinstance(self.objective, ExplainerObjective):
            return None
        model: Any = self.model
        device, found = self.accelerator.device, []
        with evaluation_mode(model), self.accelerator.autocast():
            for images, played in DataLoader(games, self.settings["batch_size"], num_workers=self.settings["workers"]):
                terms: Any = self.objective(model, images.to(device), [part.to(device) for part in played])
                found.append(terms.r2.expand(len(images)))
        mean = float(torch.cat(found).nanmean())
        return None if math.isnan(mean) else mean


class _TermReader:
    """Collects the terms on the device and reads them now and then, so that no step waits for the one before it."""

    def __init__(self, epoch: int, bar: tqdm) -> None:
        self.epoch = epoch
        self.bar = bar
        self.waiting: list[Tensor] = []
        self.read: list[Tensor] = []

    def add(self, images: Tensor, terms: dict[str, Tensor]) -> None:
        loss = terms["loss"].detach().float()
        absent = torch.full_like(loss, math.nan)
        values = [terms[name].detach().float() if name in terms else absent for name in TERMS]
        self.waiting.append(torch.stack([images.isfinite().all().float(), *values]))
        if len(self.waiting) == STEPS_BETWEEN_READS:
            self._read()
        self.bar.update()

    def means(self, accelerator: Accelerator) -> dict[str, float | None]:
        """The mean of each term over the epoch and the processes, None for a term the objective has not."""
        if self.waiting:
            self._read()
        means = torch.cat(self.read).nanmean(dim=0)[1:].to(accelerator.device)
        values = accelerator.reduce(means, reduction="mean").tolist()
        return {name: None if math.isnan(value) else value for name, value in zip(TERMS, values, strict=True)}

    def _read(self) -> None:
        rows = torch.stack(self.waiting).cpu()
        steps_before = sum(len(block) for block in self.read)
        self.waiting.clear()
        self.read.append(rows)
        self.bar.set_description(f"epoch {self.epoch + 1}, loss {rows[-1, 1]:.3g}")
        bad = (rows[:, 0] == 0) | ~rows[:, 1].isfinite()
        if not bad.any():
            return
        first = int(bad.nonzero()[0])
        where = f"in epoch {self.epoch + 1}, step {steps_before + first + 1}"
        if rows[first, 0] == 0:
            raise TrainingError(
                f"fit: the images hold NaN or infinity {where}. Check the data and its normalisation. "
                "The last checkpoint is whole."
            )
        raise TrainingError(
            f"fit: the loss is {rows[first, 1].item()} {where}. Lower lr or the objective's regression_weight, or pass "
            "clip_grad=1.0. The last checkpoint is whole."
        )


def _prepare_file(model: SelfExplainingClassifier, train_data: Dataset, output: str | Path | None) -> None:
    """What the saved model says of itself, and whether it can be saved: now, not after the first epoch."""
    known = getattr(train_data, "preprocessing", None)
    if isinstance(known, Preprocessing) and known.input_size == model.game.input_size:
        model.preprocessing = known
    if output is not None:
        model.check_saveable()


def _prepare_step(model: Any, objective: Any, settings: dict[str, Any]) -> None:
    """What changes how a step is computed, and not what it computes."""
    if settings["grad_checkpointing"]:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ValueError(
                "fit: argument `grad_checkpointing` needs a model with set_grad_checkpointing, and "
                f"{type(model).__name__} has none. Leave it out, or train a timm model that has."
            )
        model.set_grad_checkpointing(True)
    if settings["compile"]:
        if not hasattr(objective, "compile"):
            raise ValueError(
                f"fit: argument `compile` needs an objective with compile, and {type(objective).__name__} has none. "
                "Leave it out, or use ShapleyObjective or TaskObjective."
            )
        # Shapes are those of full batches; a size seen for the first time gets a program of its own.
        objective.compile(dynamic=False)


def _identity(data: Any, objective: Any) -> dict[str, Any]:
    """What makes a run another one, beside the arguments of `fit`: the objective's own, and the games played."""
    own = objective.settings if isinstance(objective, CoalitionObjective) else {}
    found = {f"objective.{name}": value for name, value in own.items()}
    return found | ({"games": data.digest} if isinstance(data, PlayedGames) else {})


def _create_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    opt = settings["opt"]
    try:
        get_optimizer_info(opt.lower().split("_")[-1])
    except ValueError as error:
        close = difflib.get_close_matches(opt, list_optimizers(), 3) or ["adamw", "sgd"]
        raise ValueError(f"fit: timm has no optimizer `opt` = {opt!r} ({error}). Try {', '.join(close)}.") from error
    try:
        return create_optimizer_v2(model, opt=opt, lr=settings["lr"], weight_decay=settings["weight_decay"])
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"fit: timm can't make the optimizer `opt` = {opt!r} for this model, lr and weight_decay: {error}. Try "
            "opt='adamw'."
        ) from error


def _line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in a log."""
    shown = {"loss": ".4f", "r2": ".3f", "eval_r2": ".3f", "eval_loss": ".4f", "eval_accuracy": ".2f", "seconds": ".1f"}
    values = [f"{name} {row[name]:{form}}" for name, form in shown.items() if row[name] is not None]
    return f"epoch {row['epoch']}/{epochs}: {', '.join(values)}"


def _epoch_seed(seed: int, epoch: int, process: int) -> int:
    """Each epoch starts from a seed of its own, so that a resumed run draws what an unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, epoch, process]).generate_state(1)[0])


def _check_game(history: list[dict[str, Any]], num_classes: int | None) -> None:
    """Stops a run whose coalitions have all come to the same value, and whose accuracy (if known) is chance."""
    spreads = [row["spread"] for row in history if row["spread"] is not None]
    chance = 0.0 if num_classes is None else 100 / max(num_classes, 2)  # a single logit says yes or no
    lately = history[-COLLAPSED_EPOCHS:]
    # A game that never came to life has no larger spread behind it.
    smallest = max(COLLAPSED_SPREAD * max(spreads, default=0.0), STILLBORN_SPREAD * (len(spreads) > STILLBORN_EPOCHS))
    if len(spreads) <= COLLAPSED_EPOCHS or any(
        row["spread"] is None
        or row["spread"] >= smallest
        or (row["eval_accuracy"] is not None and chance > 0 and row["eval_accuracy"] > chance + (100 - chance) / 10)
        for row in lately
    ):
        return
    accuracy = history[-1]["eval_accuracy"]
    raise TrainingError(
        f"fit: the game collapsed in epoch {lately[0]['epoch']}: the values of the coalitions spread over "
        f"{spreads[-1]:.3g}, against {max(spreads):.3g} before"
        + ("" if accuracy is None else f", and accuracy is {accuracy:.1f} %")
        + ". Lower the objective's regression_weight. The last checkpoint is whole."
    )


def _check_kinds(model: object, objective: object, output: object) -> None:
    """The arguments that are no numbers or words."""
    if not isinstance(model, nn.Module):
        fail("fit", "model", "a torch.nn.Module that returns logits", model, "Use timm.create_model or fv.convert.")
    if isinstance(objective, type) or not all(
        callable(part) for part in (objective, *(getattr(objective, name, None) for name in _OF_OBJECTIVES))
    ):
        fail(
            "fit",
            "objective",
            "an objective: called as objective(model, images, labels), with state_dict and load_state_dict",
            objective,
            "Use fv.ShapleyObjective() or fv.TaskObjective().",
        )
    if output is not None and not isinstance(output, (str, os.PathLike)):
        fail("fit", "output", "the path of a folder, or None", output)


def _checked_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as plain numbers and words; numpy's become Python's."""
    settings = dict(given)
    bounds = {"epochs": (1, _MOST), "batch_size": (1, _MOST), "workers": (0, _MOST), "seed": (0, 2**32 - 1)}
    for name, (low, high) in bounds.items():
        settings[name] = check_count("fit", name, settings[name], low, high)
    for name in ("lr", "weight_decay", "warmup_epochs", "clip_grad"):
        if settings[name] is None and name == "clip_grad":
            continue
        settings[name] = check_number("fit", name, settings[name], 0)
        if settings[name] == 0 and name in ("lr", "clip_grad"):
            fail("fit", name, "above 0", settings[name])
    for name in ("opt", "sched", "mixed_precision"):
        if not isinstance(settings[name], str):
            fail("fit", name, "a name", settings[name])
    check_choice("mixed_precision", settings["mixed_precision"], ("no", "bf16", "fp16"))
    if settings["sched"] not in SCHEDULES:
        raise ValueError(
            f"fit: argument `sched` must be one of {', '.join(SCHEDULES)}, but it is {settings['sched']!r}."
        )
    return settings


def _check_batch(settings: dict[str, Any]) -> None:
    """A step needs a full batch in each process."""
    batch, processes, images = settings["batch_size"], settings["processes"], settings["images"]
    if images < batch * processes:
        most = images // processes
        remedy = f"Lower batch_size to at most {most}." if most else "Pass more images, or use fewer processes."
        raise ValueError(
            f"fit: train_data has {images} images, fewer than one step takes (batch_size {batch}, {processes} "
            f"process{'es' if processes > 1 else ''}). {remedy}"
        )


def _check_data(model: nn.Module, data: Any, function: str, argument: str, mixed_precision: str = "") -> None:
    """A dataset of (image, label), with as many classes as the model."""
    if isinstance(data, DataLoader):
        raise ValueError(
            f"{function}: argument `{argument}` must be a dataset, but it is a DataLoader. Pass its dataset "
            "(loader.dataset) and `batch_size`."
        )
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Tensor)
    ):
        raise ValueError(
            f"{function}: argument `{argument}` must be a dataset with a length whose items can be indexed, but it is "
            f"a {type(data).__name__}. Wrap it in a torch.utils.data.Dataset."
        )
    if len(data) == 0:
        raise ValueError(f"{function}: argument `{argument}` must hold images, but it is empty.")
    classes, outputs = getattr(data, "classes", None), getattr(model, "num_classes", None)
    # Two classes may also be the no and yes of a single logit.
    if classes is not None and outputs is not None and len(classes) not in (outputs, 2 * (outputs == 1)):
        raise ValueError(
            f"{function}: `{argument}` has {len(classes)} classes, but the model has {outputs} outputs. "
            f"Build the model with num_classes={len(classes)}."
        )
    _check_item(model, data[0], function, argument, mixed_precision)


def _check_item(model: nn.Module, item: Any, function: str, argument: str, mixed_precision: str) -> None:
    """One item of a dataset, which stands for all."""
    remedy = "Let the dataset turn pictures into normalised tensors, as fv.load_dataset does."
    expected = "a dataset of (image, label), each image a tensor of floating-point numbers"
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        fail(function, argument, expected, type(item), remedy)
    image = torch.as_tensor(item[0]) if isinstance(item[0], np.ndarray) else item[0]
    if not isinstance(image, Tensor) or not image.is_floating_point():
        fail(function, argument, expected, image if isinstance(image, Tensor) else type(image), remedy)
    if isinstance(model, SelfExplainingClassifier) and get_model_input_config(model.backbone)["fixed_input_size"]:
        size = model.game.input_size
        if tuple(image.shape) != size:
            remedy = "Let the dataset resize them, or create the model with another img_size or in_chans."
            fail(function, argument, f"of images {size}, the only size that the model takes", image, remedy)
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), image)
    if weights.is_meta:
        raise ValueError(f"{function}: argument `model` has no weights yet (device meta). Create it on a real device.")
    if mixed_precision == "no" and weights.dtype != image.dtype:
        raise ValueError(
            f"{function}: the images of `{argument}` are {image.dtype}, but the model's weights are {weights.dtype}. "
            "Make both float32 (model.float(), image.float()); mixed_precision='bf16' is for speed."
        )
