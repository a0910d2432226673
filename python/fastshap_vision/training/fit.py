"""Training: one loop for every model and objective.

Devices, precision and processes are accelerate's, optimisers and schedules timm's. What is ours: exact resume, a log
of the objective's terms, and a stop with a clear error when a run is lost.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import Dataset

from fastshap_kernels._checks import check_count, check_flag

from .._runtime.allocator import keep_freed_memory
from ..data.recorded import RecordedCoalitions
from ..images.preprocessing import Preprocessing
from ..models.self_explaining import SelfExplainingClassifier
from .agreement import check_settings
from .callbacks import Callback
from .checkpoint import Checkpoints
from .evaluate import check_data
from .export import BestModel
from .isolation import as_found
from .monitor import check_not_lost, epoch_line
from .run import TrainingRun
from .settings import check_kinds, checked_checkpoints, checked_settings
from .tracking import Watched

_log = logging.getLogger(__name__)


@dataclass
class FitResult:
    """What a training run leaves.

    Args:
        history: one dict an epoch: epoch, lr, the means of the objective's terms (None where there is none),
            eval_loss, eval_accuracy (percent; None without eval_data, or of recorded), eval_value_r2 (of recorded
            eval_data, as value_r2 is of train_data), grad_norm (mean, before clipping), images_per_second,
            coalitions_per_second, data_wait (share of the time), peak_memory_gb, seconds.
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
    layer_decay: float | None = None,
    opt_betas: tuple[float, float] | None = None,
    min_lr: float = 0.0,
    warmup_lr: float = 1e-5,
    smoothing: float = 0.0,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    model_ema_decay: float | None = None,
    seed: int = 0,
    workers: int = 0,
    grad_accum_steps: int | None = None,
    mixed_precision: str | None = None,
    compile: bool | None = None,
    grad_checkpointing: bool = False,
    channels_last: bool = False,
    checkpoint_hist: int = 2,
    sync_bn: bool = False,
    fsdp: bool = False,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    checkpoint_steps: int | None = None,
    keep_best: str | None = None,
    callbacks: Sequence[Callback] = (),
    log_with: Any = None,
    log_interval: int = 100,
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
        epochs: passes over train_data; what is left at the end of each and makes no whole update is left out.
        batch_size: images a step and process.
        opt, lr, weight_decay, sched, warmup_epochs, opt_betas, min_lr, warmup_lr: as in timm (create_optimizer_v2,
            create_scheduler_v2).
        clip_grad: largest norm of the gradient, or None. The encoder of a self-explaining model and its explainer are
            clipped apart.
        layer_decay: factor of the learning rate from each layer of the encoder to the one before, as in timm; the
            explainer learns at the full rate. None for one rate.
        smoothing, mixup, cutmix: as in timm (Mixup): labels become shares of the classes, (B, K), which the objective's
            loss must take, as cross-entropy does; images are mixed in pairs. 0 for none.
        model_ema_decay: of timm's moving average of weights and statistics (ModelEmaV3), which is what is evaluated,
            written and left in `model`. None for none.
        seed: of the data's order, augmentation and dropout, below 2³². Two runs with one seed are equal.
        workers: processes that load data. Random changes of images are the same for any number of them.
        grad_accum_steps: batches of each process whose mean gradient is one update, as that of one batch so many times
            as large. None: what accelerate was set to (`accelerate config`, or its environment variables), else 1.
        mixed_precision: "no", "bf16" or "fp16". None: what accelerate was set to, else "no".
        compile: compiles the objective's step (`objective.compile`): slow first steps, faster later ones. None: what
            accelerate was set to (the dynamo backend inductor, or none), else False.
        grad_checkpointing: as in timm: activations within blocks are computed again instead of kept, where the model
            has `set_grad_checkpointing`. Less memory, more time, the same gradients. Off again after the run.
        channels_last: whether weights and images lie in memory channels last, as convolutions on GPUs take them best.
        checkpoint_hist: how many checkpoints are kept, the newest ones.
        sync_bn: batch norm takes the statistics of all processes' batches (torch.nn.SyncBatchNorm, for GPUs), not those
            of each. The model has its own modules again after the run.
        fsdp: whether weights, gradients and the optimiser's state lie in parts on the processes while they train, by
            PyTorch's FSDP2 (`fully_shard`). docs/scale.md says for which models and arguments.
        output: the run's folder: summary.csv, model.safetensors and checkpoints, written after every epoch. None
            writes nothing. One run at a time writes to a folder.
        resume: None starts anew (and refuses an output folder that holds a run); "auto" goes on from the newest
            checkpoint in `output`, if there is one, and writes the model again if all epochs are done; a path names a
            run's folder or a checkpoint. From an earlier checkpoint in `output` the run goes back: the later ones are
            removed once it has trained and saved the epoch after it.
        checkpoint_steps: updates between two checkpoints within an epoch; None writes one after each epoch alone.
        keep_best: "eval_accuracy", "eval_loss" or, of recorded eval_data, "eval_value_r2": the model of the epoch that
            is best by it is kept in `output`/best. None keeps that of the last epoch alone.
        callbacks: `Callback` objects, told of steps, evaluations and epochs as they come.
        log_with: accelerate's trackers by name ("tensorboard", "wandb", "trackio", …) or as objects, one or a list:
            terms, learning rate, gradient norm, speed, memory and the time to the end. TensorBoard's files lie in
            `output`/logs.
        log_interval: batches between two logs. The loss is read, and checked, as often.
        progress: shows a bar on a terminal and in a notebook.

    Returns:
        the history of the run, its duration and accuracy. The model is left in evaluation mode, on the device that
        accelerate chose. The random generators of Python, numpy and torch, and an `Accelerator` of the caller's, are
        left as they were found.

    Raises:
        ValueError: an argument out of its range, or data that fits neither the batch nor the model. Or processes of one
            run that don't see each other, or a setting of accelerate that is not supported.
        TypeError: the objective's state can't be written.
        CheckpointError: the checkpoint to resume from is missing, damaged, or of another run; or `output` can't be
            written to, which is tried before the first step, or another run writes to it.
        TrainingStopped: SIGTERM or SIGUSR1 came: the update was finished and a checkpoint written. Without `output`
            signals do what they did before.
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
        "layer_decay": layer_decay,
        "opt_betas": opt_betas,
        "min_lr": min_lr,
        "warmup_lr": warmup_lr,
        "smoothing": smoothing,
        "mixup": mixup,
        "cutmix": cutmix,
        "model_ema_decay": model_ema_decay,
        "seed": seed,
        "workers": workers,
        "grad_accum_steps": grad_accum_steps,
        "mixed_precision": mixed_precision,
        "compile": compile,
        "grad_checkpointing": grad_checkpointing,
        "channels_last": channels_last,
        "sync_bn": sync_bn,
        "fsdp": fsdp,
    }
    check_kinds(model, objective, output)
    checkpoint_steps = checked_checkpoints(checkpoint_steps, output)
    flags = {"grad_checkpointing": grad_checkpointing, "channels_last": channels_last, "sync_bn": sync_bn}
    flags |= {"fsdp": fsdp, "progress": progress}
    for name, flag in flags.items():
        check_flag("fit", name, flag)
    kept = check_count("fit", "checkpoint_hist", checkpoint_hist, 1, 2**31 - 1)
    keep_freed_memory()
    if isinstance(model, SelfExplainingClassifier):
        _prepare_file(model, train_data, output)
    settings = checked_settings(given)
    is_recorded = None if eval_data is None else isinstance(eval_data, RecordedCoalitions)
    best = BestModel.checked(keep_best, output, is_recorded)
    watched = Watched.checked(callbacks, log_with, log_interval, output)
    with as_found(model, objective):
        if eval_data is not None:
            check_data(model, eval_data, "fit", "eval_data")
        folder = None if output is None else Path(output)
        run = TrainingRun(model, train_data, objective, settings, watched, folder, checkpoint_steps)
        # What decides when the processes wait for each other: one that never came would leave the others waiting.
        evaluated = None if eval_data is None else len(eval_data)  # type: ignore[arg-type]
        check_settings({"eval_data": evaluated, "checkpoint_steps": checkpoint_steps, "keep_best": keep_best})
        for recorded in (train_data, eval_data):
            if isinstance(recorded, RecordedCoalitions) and isinstance(model, SelfExplainingClassifier):
                recorded.check(model)
        checkpoints = Checkpoints(
            output,
            run.accelerator,
            run.settings,
            model=model,
            optimizer=run.optimizer,
            objective=objective,
            average=run.average,
            shards=run.shards,
            kept=kept,
            best=best,
        )
        with checkpoints.held(), closing(run):
            if isinstance(model, SelfExplainingClassifier):
                model.calibration = None  # of the explainer as it was; resuming may write the model
            history = checkpoints.resume(resume)
            run.optimizer.zero_grad()  # of what the model was trained in before
            within = checkpoints.within
            with run.shown(len(history), within, progress) as bar, run.stop.listening(output is not None):
                for epoch in range(len(history), settings["epochs"]):
                    row = run.train_epoch(epoch, bar, within, partial(checkpoints.save, history))
                    within = None
                    if eval_data is not None:
                        with run.averaged():
                            row |= run.evaluate(eval_data)
                    history.append(row)
                    if run.accelerator.is_main_process:
                        _log.info(epoch_line(row, settings["epochs"]))
                    check_not_lost(history, getattr(model, "num_classes", None))
                    checkpoints.save(history)
                    run.callbacks.on_epoch(row)  # one that raises loses no epoch
                    run.stop_after(epoch)
        if run.average is not None:
            run.average.apply()
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


def _prepare_file(model: SelfExplainingClassifier, train_data: Dataset, output: str | Path | None) -> None:
    """What the saved model says of itself, and whether it can be saved: now, not after the first epoch."""
    known = getattr(train_data, "preprocessing", None)
    if isinstance(known, Preprocessing) and known.input_size == model.game.input_size:
        model.preprocessing = known
    if output is not None:
        model.check_saveable()
