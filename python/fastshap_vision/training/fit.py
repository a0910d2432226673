"""Training: one loop for every model and objective.

Devices, precision and processes are accelerate's, optimisers and schedules timm's. What is ours: exact resume, a log
of the objective's terms, and a stop with a clear error when a run is lost.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs, set_seed
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from fastshap_kernels._checks import check_flag, describe

from .._runtime.allocator import keep_freed_memory
from ..data.recorded import RecordedCoalitions
from ..images.preprocessing import Preprocessing
from ..models.self_explaining import SelfExplainingClassifier
from .checkpoint import Checkpoints
from .evaluate import Batch, check_data, evaluate
from .isolation import as_found
from .monitor import TERMS, TermReader, check_not_lost, epoch_line
from .settings import check_batch, check_kinds, checked_settings, create_optimizer

_log = logging.getLogger(__name__)

_MOST = 2**31 - 1


@dataclass
class FitResult:
    """What a training run leaves.

    Args:
        history: one dict an epoch: epoch, lr, the means of the objective's terms (None where there is none),
            eval_loss, eval_accuracy (percent; None without eval_data, or of recorded), eval_value_r2 (of recorded
            eval_data, as value_r2 is of train_data), seconds.
        seconds: of all epochs, those before a resume too.
        accuracy, best_accuracy: of the last epoch and of the best, percent; None where no epoch has one.
        checkpoint: the last checkpoint's folder; None without output.
        model: what was trained.
        best_epoch: of `train_explainer`, the epoch that was kept, from 1; 0 where no epoch was better than the
            explanation before training. Else None.

    Example:
        >>> result = fv.fit(model, data, data, objective=fv.TaskObjective(), epochs=2, batch_size=4)
        >>> [row["epoch"] for row in result.history], 0 <= result.best_accuracy <= 100
        ([1, 2], True)
    """

    history: list[dict[str, Any]]
    seconds: float
    accuracy: float | None
    best_accuracy: float | None
    checkpoint: Path | None
    model: Any = field(default=None, repr=False)
    best_epoch: int | None = None


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
        train_data, eval_data: datasets of (image, label), or what `record_coalitions` returned, for which eval_value_r2
            is known. Labels of eval_data are as in `evaluate`. The `preprocessing` of train_data, if it has one for the
            model's input size, becomes the model's.
        objective: an `Objective`, such as `JointObjective`: called with the model, a batch and the share of the
            training that is done, it returns the terms of the loss. What it holds in its `state_dict` is part of a
            checkpoint.
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

    Example:
        >>> objective = fv.JointObjective(coalitions=2)
        >>> result = fv.fit(model, data, objective=objective, epochs=1, batch_size=4, output="run")
        >>> fv.SelfExplainingClassifier.from_pretrained("run").players
        9
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
    check_kinds(model, objective, output)
    for name, flag in {"compile": compile, "grad_checkpointing": grad_checkpointing, "progress": progress}.items():
        check_flag("fit", name, flag)
    keep_freed_memory()
    if isinstance(model, SelfExplainingClassifier):
        _prepare_file(model, train_data, output)
    settings = checked_settings(given)
    with as_found(model, objective):
        if eval_data is not None:
            check_data(model, eval_data, "fit", "eval_data")
        run = _Run(model, train_data, objective, settings)
        for recorded in (train_data, eval_data):
            if isinstance(recorded, RecordedCoalitions) and isinstance(model, SelfExplainingClassifier):
                recorded.check(model)
        checkpoints = Checkpoints(
            output, run.accelerator, run.settings, model=model, optimizer=run.optimizer, objective=objective
        )
        with checkpoints.held():
            history = checkpoints.resume(resume)
            run.optimizer.zero_grad()  # of what the model was trained in before
            if isinstance(model, SelfExplainingClassifier):
                model.calibration = None  # of the explainer as it was
            with run.bar(len(history), progress) as bar:
                for epoch in range(len(history), settings["epochs"]):
                    row = run.train_epoch(epoch, bar)
                    if eval_data is not None:
                        row |= run.evaluate(eval_data)
                    history.append(row)
                    if run.accelerator.is_main_process:
                        _log.info(epoch_line(row, settings["epochs"]))
                    check_not_lost(history, getattr(model, "num_classes", None))
                    checkpoints.save(history)
    model.eval()
    accuracies = [row["eval_accuracy"] for row in history if row["eval_accuracy"] is not None]
    return FitResult(
        history,
        seconds=sum(row["seconds"] for row in history),
        accuracy=accuracies[-1] if accuracies else None,
        best_accuracy=max(accuracies, default=None),
        checkpoint=checkpoints.newest,
        model=model,
    )


class TrainingStep(nn.Module):
    """The objective's terms as one forward pass, so that accelerate's precision and gradient exchange cover it all."""

    def __init__(self, model: nn.Module, objective: Any) -> None:
        super().__init__()
        self.model = model
        # In a tuple, so that an objective that is a module is no part of the model's weights.
        self._objective = (objective,)

    def forward(self, images: Tensor, labels: Tensor, progress: float) -> dict[str, Tensor]:
        terms = self._objective[0](self.model, images, labels, progress=progress)
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
        check_data(model, data, "fit", "train_data", settings["mixed_precision"])
        objective.check(model, data)
        self.accelerator = Accelerator(
            mixed_precision=settings["mixed_precision"],
            dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
            # While the regression's weight is 0 the shares take no part in the loss.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.settings = settings | {"images": len(data), "processes": self.accelerator.num_processes}  # type: ignore[arg-type]
        self.settings |= _identity(data, objective)
        check_batch(self.settings)
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
        optimizer = create_optimizer(model, settings)
        # Workers live for one epoch: they then draw from its seed, whether or not the run was resumed before it.
        loader = DataLoader(
            data,
            settings["batch_size"],
            shuffle=True,
            drop_last=True,
            num_workers=settings["workers"],
            collate_fn=Batch(objective.label_classes(model)),
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
        reader = TermReader(epoch, bar)
        for index, (images, labels) in enumerate(self.loader):
            update = epoch * len(self.loader) + index
            if self.scheduler is not None:
                self.scheduler.step_update(update)
            lr = self.optimizer.param_groups[0]["lr"]
            progress = update / (self.settings["epochs"] * len(self.loader))
            terms = self.step(images, labels, progress)
            if not terms["loss"].requires_grad:
                raise ValueError(
                    "fit: the objective's loss depends on none of the model's trainable parameters. Unfreeze those "
                    "that it trains (requires_grad_); or, to train the layers that explain beside a frozen backbone, "
                    "pass JointObjective(regression_ramp=(0, 0)), whose regression counts from the first step on."
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
            "eval_value_r2": None,
            "seconds": time.perf_counter() - start,
        }

    def evaluate(self, data: Dataset) -> dict[str, float | None]:
        """The columns of the history that an evaluation fills."""
        options = {"batch_size": self.settings["batch_size"], "workers": self.settings["workers"]}
        found: dict[str, float | None] = {}
        if not isinstance(data, RecordedCoalitions):  # whose classifier stays as it is, and whose labels have no part
            accuracy, loss = evaluate(self.model, data, accelerator=self.accelerator, **options)
            found = {"eval_loss": loss, "eval_accuracy": accuracy}
        with self.accelerator.autocast():
            return found | self.objective.evaluate(self.model, data, **options)


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
                "Leave it out, or use JointObjective or TaskObjective."
            )
        # Shapes are those of full batches; a size seen for the first time gets a program of its own.
        objective.compile(dynamic=False)


def _identity(data: Any, objective: Any) -> dict[str, Any]:
    """What makes a run another one, beside the arguments of `fit`: the objective's own, and the coalitions recorded."""
    found = {f"objective.{name}": value for name, value in objective.settings.items()}
    return found | ({"recorded": data.digest} if isinstance(data, RecordedCoalitions) else {})


def _epoch_seed(seed: int, epoch: int, process: int) -> int:
    """Each epoch starts from a seed of its own, so that a resumed run draws what an unbroken one would have drawn."""
    return int(np.random.SeedSequence([seed, epoch, process]).generate_state(1)[0])
