"""One training run: what accelerate prepared, and the pass over an epoch."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    gather_object,
    set_seed,
)
from timm.layers import convert_sync_batchnorm
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from .._runtime.processes import processes, together
from .._runtime.progress import progress_bar
from ..data.identity import identity_of
from ..data.recorded import RecordedCoalitions
from ..models.self_explaining import SelfExplainingClassifier
from .agreement import check_model, check_settings, share_buffers
from .averaging import Average
from .batch_norm import batch_norms, counted_once
from .callbacks import RunStart, StepReport
from .evaluate import Batch, check_data, evaluate
from .loader import training_loader
from .monitor import TermReader, joined_states
from .settings import check_batch, create_optimizer
from .sharding import Shards, check_shardable, whole
from .soft_labels import soft_labels
from .speed import Speed
from .state import Within
from .step import TrainingStep, freeze_others, prepare_step
from .stopping import StopRequest
from .tracking import Watched


class TrainingRun:
    """One training run: what accelerate prepared, and the pass over an epoch."""

    def __init__(
        self,
        model: nn.Module,
        data: Dataset,
        objective: Any,
        settings: dict[str, Any],
        watched: Watched,
        output: Path | None,
        checkpoint_steps: int | None = None,
    ) -> None:
        check_data(model, data, "fit", "train_data", settings["mixed_precision"])
        objective.check(model, data)
        processes()  # joins them
        self.accelerator = Accelerator(
            mixed_precision=settings["mixed_precision"],
            # What accelerate was set to is in the settings already, as far as they leave it to that.
            dynamo_backend="no",
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            dataloader_config=DataLoaderConfiguration(non_blocking=True),
            # While the regression's weight is 0 the shares take no part in the loss. Where all parameters do, it keeps
            # the buckets of gradients: others after the first step would be summed in another order, and a resumed run
            # of more than two processes would end in other bits.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
            log_with=watched.trackers or None,
            project_config=ProjectConfiguration(logging_dir=None if output is None else str(output / "logs")),
        )
        self.stop, self.checkpoint_steps = StopRequest(), checkpoint_steps
        self.callbacks, self.log_interval, self.output = watched.of(self.accelerator), watched.interval, output
        self.settings = settings | {"images": len(data), "processes": self.accelerator.num_processes}  # type: ignore[arg-type]
        self.settings |= _identity(model, data, objective)
        check_batch(self.settings)
        check_settings(self.settings)
        check_model(model, "before the first step", "Build it with the same seed and weights in each.")
        self.accumulated = settings["grad_accum_steps"]
        # Of an epoch. A batch of all processes, accumulated, is one batch: what makes no whole one is left out.
        global_batch = settings["batch_size"] * self.accelerator.num_processes * self.accumulated
        self.updates = self.settings["images"] // global_batch
        self.total = settings["epochs"] * self.updates
        is_recorded = isinstance(data, RecordedCoalitions)
        self.coalitions = len(data[0][1]["bits"]) if is_recorded else objective.settings.get("coalitions", 0)
        self.model = model
        self.objective = objective
        if settings["fsdp"]:
            check_shardable(model, objective, settings, self.accelerator.num_processes)
        step = TrainingStep(copy.deepcopy(model) if settings["fsdp"] else model, objective)
        freeze_others(step.model, objective)
        if not any(parameter.requires_grad for parameter in step.model.parameters()):
            raise ValueError(
                "fit: argument `model` has no trainable parameter: all are frozen (requires_grad is False). Unfreeze "
                "some with requires_grad_(True)."
            )
        prepare_step(step.model, objective, settings)
        if settings["sync_bn"]:
            self._synchronise_batch_norms()
        self.counted_once = partial(counted_once, batch_norms(model)) if settings["grad_checkpointing"] else nullcontext
        self.shards = Shards(model, step, self.accelerator) if settings["fsdp"] else None
        backbone: Any = step.model.backbone if isinstance(model, SelfExplainingClassifier) else step.model
        self.encoder = list(backbone.parameters())
        of_encoder = {id(parameter) for parameter in self.encoder}
        self.explainer = [parameter for parameter in step.model.parameters() if id(parameter) not in of_encoder]
        set_seed(settings["seed"])
        optimizer = create_optimizer(step.model, settings)
        self.soft_labels = soft = soft_labels(model, data[0], settings)
        classes = objective.label_classes(model)
        loader = training_loader(
            data,
            settings["batch_size"],
            self.updates * self.accumulated * self.accelerator.num_processes,
            seed=settings["seed"],
            workers=settings["workers"],
            pinned=self.accelerator.device.type == "cuda",
            collate=Batch(classes) if soft is None else Batch(soft.classes, all_count=True),
        )
        self.rows: Any = loader.sampler
        self.batches = 0  # of this process and epoch, done
        if self.shards is None:
            self.step, self.optimizer, self.loader = self.accelerator.prepare(step, optimizer, loader)
        else:
            self.step = step
            self.optimizer, self.loader = self.accelerator.prepare(optimizer, loader)
        # The schedule holds no state: step_update says which update it is.
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer,
            sched=settings["sched"],
            num_epochs=settings["epochs"],
            warmup_epochs=settings["warmup_epochs"],
            min_lr=settings["min_lr"],
            warmup_lr=settings["warmup_lr"],
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )

        decay = settings["model_ema_decay"]
        self.average = None if decay is None else Average(model, decay)

    def averaged(self) -> AbstractContextManager[None]:
        """The model holds the average of its weights for the while, where there is one."""
        return nullcontext() if self.average is None else self.average.in_place()

    def _synchronise_batch_norms(self) -> None:
        """Their statistics become those of the batches of all processes, until `as_found` puts the own ones back."""
        if self.accelerator.device.type == "cpu":
            raise ValueError(
                "fit: argument `sync_bn` needs GPUs, as torch.nn.SyncBatchNorm does, but the run is on "
                "the CPU. Leave it out: the statistics are then those of process 0."
            )
        convert_sync_batchnorm(self.model.to(self.accelerator.device))

    def close(self) -> None:
        """Ends the worker processes, now and not when Python finds the loader unused."""
        if self.settings["workers"]:
            self.loader = None
            self.accelerator.free_memory()

    @contextmanager
    def shown(self, epochs_done: int, within: Within | None, progress: bool) -> Iterator[tqdm]:
        """The callbacks' run begins and ends; a bar over its batches, where there is a terminal or a notebook."""
        steps, is_main = self.updates * self.accumulated, self.accelerator.is_main_process
        shows = None if progress and is_main else False
        try:
            self.callbacks.on_start(RunStart(self.model, self.settings, self.output, is_main))
            done = epochs_done * steps + (0 if within is None else within.updates * self.accumulated)
            with progress_bar(shows, total=self.settings["epochs"] * steps, initial=done, unit="step") as bar:
                yield bar
        finally:
            self.callbacks.on_end()

    def train_epoch(
        self, epoch: int, bar: tqdm, within: Within | None, save: Callable[[Within], None]
    ) -> dict[str, Any]:
        """One pass over the data, or what is left of it; returns its row of the history.

        Args:
            epoch: from 0.
            bar: counts the batches.
            within: where the pass goes on.
            save: writes a checkpoint within the epoch.

        Raises:
            TrainingStopped: a signal came.
        """
        speed = Speed(self.accelerator.device, self.accelerator.num_processes, self.coalitions)
        reader = TermReader(epoch, self.log_interval, partial(self._log, epoch, speed, bar))
        if self.shards is not None:
            self.shards.release()
        self.step.train()
        self.loader.set_epoch(epoch)
        self.rows.set_epoch(epoch)  # accelerate 1.0 does so for one process alone
        self._start_at(within, reader)
        seconds_before = 0.0 if within is None else within.seconds
        for images, labels in speed.waiting(self.loader):
            self._train_batch(epoch, images, labels, reader)
            bar.update()
            if self.batches % self.accumulated:
                continue
            updates = self.batches // self.accumulated
            stop = self.stop.agreed(self.accelerator)
            is_due = self.checkpoint_steps and (epoch * self.updates + updates) % self.checkpoint_steps == 0
            if updates < self.updates and (stop or is_due):
                if self.shards is not None:
                    self.shards.gather()
                save(Within(updates, seconds_before + speed.seconds, gather_object([reader.state()])))
            if updates < self.updates and stop:
                raise self.stop.error(stop, f"in epoch {epoch + 1} after {updates} of {self.updates} updates")
        if self.shards is not None:
            self.shards.bring()
        share_buffers(self.model.buffers())
        if self.average is not None:
            share_buffers(self.average.module.buffers())
        check_model(self.model, f"after epoch {epoch + 1}", "Let the objective change no weight by itself.")
        return {
            "epoch": epoch + 1,
            "lr": self.lr,
            **reader.means(),
            "eval_loss": None,
            "eval_accuracy": None,
            "eval_value_r2": None,
            **speed.figures(),
            "seconds": seconds_before + speed.seconds,
        }

    def stop_after(self, epoch: int) -> None:
        """Ends the run between two epochs, where a signal came in the last update or since."""
        stop = self.stop.agreed(self.accelerator)
        if stop and epoch + 1 < self.settings["epochs"]:
            raise self.stop.error(stop, f"after epoch {epoch + 1}")

    def _start_at(self, within: Within | None, reader: TermReader) -> None:
        """The loader leaves out what was trained on before, and the reader knows what it has read of it."""
        updates = 0 if within is None else within.updates
        self.batches = updates * self.accumulated
        self.rows.start = self.batches * self.settings["batch_size"] * self.accelerator.num_processes
        if within is not None:
            # Those of processes that are no more go to others: their sum is what counts.
            mine = within.sums[self.accelerator.process_index :: self.accelerator.num_processes]
            if mine:
                reader.restore(joined_states(mine))

    def _train_batch(self, epoch: int, images: Tensor, labels: Any, reader: TermReader) -> None:
        """One batch of this process, and where it completes one, an update.

        Its dropout and whatever else it draws follow from its place alone, so that a resumed run draws the same.
        """
        _seed(self.accelerator.device, self.settings["seed"], epoch, self.batches, self.accelerator.process_index)
        update = epoch * self.updates + self.batches // self.accumulated
        if self.scheduler is not None:
            self.scheduler.step_update(update)
        images, labels = self._prepared(images, labels)
        self.batches += 1
        is_complete = self.batches % self.accumulated == 0
        # Gradients are exchanged once an update.
        with nullcontext() if is_complete else self.accelerator.no_sync(self.step):
            terms = self.step(images, labels, update / self.total)
            self._backward(terms["loss"])
        terms = {name: term.detach() for name, term in terms.items()}
        grad_norm = self._update() if is_complete else None
        if is_complete and self.average is not None:
            self.average.update(update + 1)
        reader.add(images, terms, grad_norm)
        if grad_norm is not None:
            self.callbacks.on_step(StepReport(epoch + 1, update + 1, self.total, self.lr, terms, grad_norm))

    @property
    def lr(self) -> float:
        group = self.optimizer.param_groups[0]
        return group["lr"] / group.get("lr_scale", 1.0)  # of a layer, where these differ

    def _log(self, epoch: int, speed: Speed, bar: tqdm, means: dict[str, float | None]) -> None:
        """Tells those who watch; the device has just been waited for."""
        an_epoch = self.updates * self.accumulated
        batches = epoch * an_epoch + self.batches
        left = self.settings["epochs"] * an_epoch - batches
        figures = {"epoch": batches / an_epoch, "lr": self.lr} | means | speed.lap()
        images_left = left * self.settings["batch_size"] * self.accelerator.num_processes
        figures["seconds_left"] = images_left / figures["images_per_second"]
        bar.set_description(f"epoch {epoch + 1}, loss {means['loss']:.3g}")
        known = {name: value for name, value in figures.items() if value is not None}
        self.callbacks.on_log(batches // self.accumulated, known)

    def _prepared(self, images: Tensor, labels: Any) -> tuple[Tensor, Any]:
        """A batch as the objective is to see it."""
        if self.soft_labels is not None:
            images, labels = self.soft_labels(images, labels)
        if self.settings["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, labels

    def _backward(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise ValueError(
                "fit: the objective's loss depends on none of the model's trainable parameters. Unfreeze those "
                "that it trains (requires_grad_); or, to train the layers that explain beside a frozen backbone, "
                "pass JointObjective(regression_ramp=(0, 0)), whose regression counts from the first step on."
            )
        with self.counted_once():
            self.accelerator.backward(loss / self.accumulated)

    def _update(self) -> Tensor:
        """One step of the optimiser, by the gradient that has been gathered; returns its norm before clipping."""
        self.accelerator.unscale_gradients()
        most = self.settings["clip_grad"]
        # Apart: no explainer changes how the encoder is trained.
        norms = []
        for parameters in (self.encoder, self.explainer):
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            norms.append(whole(nn.utils.get_total_norm(gradients)))
            if most is not None:
                nn.utils.clip_grads_with_norm_(parameters, most, norms[-1])
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.stack([norm.to(self.accelerator.device) for norm in norms]).norm()

    def evaluate(self, data: Dataset) -> dict[str, float | None]:
        """The columns of the history that an evaluation fills."""
        options = {"batch_size": self.settings["batch_size"], "workers": self.settings["workers"]}
        found: dict[str, float | None] = {}
        if not isinstance(data, RecordedCoalitions):  # whose classifier stays as it is, and whose labels have no part
            accuracy, loss = evaluate(self.model, data, accelerator=self.accelerator, **options)
            found = {"eval_loss": loss, "eval_accuracy": accuracy}
        with self.accelerator.autocast(), together():
            found |= self.objective.evaluate(self.model, data, **options)
        self.callbacks.on_evaluate(found)
        return found


def _identity(model: Any, data: Any, objective: Any) -> dict[str, Any]:
    """What makes a run another one, beside the arguments of `fit`: data, model, objective and recorded coalitions."""
    images = data.data if isinstance(data, RecordedCoalitions) else data
    found = {f"data.{name}": value for name, value in identity_of(images).items()}
    found |= {f"model.{name}": value for name, value in getattr(model, "trained_as", {}).items()}
    found |= {f"objective.{name}": value for name, value in objective.settings.items()}
    return found | ({"recorded": data.digest} if isinstance(data, RecordedCoalitions) else {})


def _seed(device: torch.device, *numbers: int) -> None:
    """Seeds Python's, numpy's and torch's generators."""
    of_python, of_numpy, of_torch = np.random.SeedSequence(numbers).generate_state(3).tolist()
    random.seed(of_python)
    np.random.seed(of_numpy)
    if device.type == "cpu":
        torch.default_generator.manual_seed(of_torch)  # the other devices' alone take a millisecond
    else:
        torch.manual_seed(of_torch)
