"""What a run tells whoever watches it: callbacks of one's own, and those that ship."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import check_count, fail


class RunStart(NamedTuple):
    """What a callback is told when a run starts, or goes on.

    Args:
        model: what is trained.
        settings: of the run, by name.
        output: the run's folder, or None.
        is_main: whether this process is the one that writes.

    Example:
        >>> fv.RunStart(model, {"epochs": 3}, output=None, is_main=True).settings["epochs"]
        3
    """

    model: nn.Module
    settings: Mapping[str, Any]
    output: Path | None
    is_main: bool


class StepReport(NamedTuple):
    """What a callback is told after each update. Tensors stay on their device: to read one is to wait for it.

    Args:
        epoch, step: of this update, from 1; steps count on from epoch to epoch.
        steps: of the whole run.
        lr: the learning rate.
        terms: of the objective, for the last batch of the update.
        grad_norm: of the gradient, before it was clipped.

    Example:
        >>> report = fv.StepReport(1, 2, steps=8, lr=0.1, terms={"loss": torch.zeros(())}, grad_norm=torch.ones(()))
        >>> report.step / report.steps
        0.25
    """

    epoch: int
    step: int
    steps: int
    lr: float
    terms: Mapping[str, Tensor]
    grad_norm: Tensor


class Callback:
    """Watches a run of `fit`, in every process: override what is needed. It must not change the run.

    Example:
        >>> class Printing(fv.Callback):
        ...     def on_epoch(self, row):
        ...         print("epoch", row["epoch"])
        >>> options = {"objective": fv.TaskObjective(), "batch_size": 4}
        >>> result = fv.fit(model, data, epochs=2, callbacks=[Printing()], **options)
        epoch 1
        epoch 2
    """

    def on_start(self, start: RunStart) -> None:
        """Before the first step."""

    def on_step(self, report: StepReport) -> None:
        """After each update."""

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        """Every `log_interval` batches: means of the terms since the last time, speed, learning rate and the like."""

    def on_evaluate(self, found: Mapping[str, float | None]) -> None:
        """After each evaluation of `eval_data`."""

    def on_epoch(self, row: Mapping[str, float | None]) -> None:
        """After each epoch, with its row of the history."""

    def on_end(self) -> None:
        """After the last step, also where the run ends by an error."""


class Callbacks(Callback):
    """Several as one.

    Raises:
        ValueError: for what is no sequence of callbacks.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        is_list = isinstance(callbacks, Sequence)
        wrong = [found for found in callbacks if not isinstance(found, Callback)] if is_list else [callbacks]
        if wrong:
            remedy = "Let it inherit from fv.Callback, and pass an instance."
            fail("fit", "callbacks", "a list of fv.Callback objects", wrong[0], remedy)
        self.all = list(callbacks)

    def on_start(self, start: RunStart) -> None:
        for callback in self.all:
            callback.on_start(start)

    def on_step(self, report: StepReport) -> None:
        for callback in self.all:
            callback.on_step(report)

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        for callback in self.all:
            callback.on_log(step, figures)

    def on_evaluate(self, found: Mapping[str, float | None]) -> None:
        for callback in self.all:
            callback.on_evaluate(found)

    def on_epoch(self, row: Mapping[str, float | None]) -> None:
        for callback in self.all:
            callback.on_epoch(row)

    def on_end(self) -> None:
        for callback in self.all:
            callback.on_end()


class ProfilerCallback(Callback):
    """Writes what torch.profiler sees of some steps into the run's folder, as profile/*.pt.trace.json.

    Open the file in https://ui.perfetto.dev, or in TensorBoard with its profiler plugin.

    Args:
        wait, warmup, active: updates that are left out, that the profiler warms up in, and that it records.

    Raises:
        ValueError: for counts out of range; on the run's start, where it has no `output`.

    Example:
        >>> profiler = fv.ProfilerCallback(wait=1, warmup=1, active=1)
        >>> options = {"objective": fv.TaskObjective(), "epochs": 4, "batch_size": 4}
        >>> result = fv.fit(model, data, output="run", callbacks=[profiler], **options)
        >>> import pathlib
        >>> len(list(pathlib.Path("run/profile").iterdir()))
        1
    """

    def __init__(self, wait: int = 10, warmup: int = 3, active: int = 5) -> None:
        counts = {"wait": (wait, 0), "warmup": (warmup, 0), "active": (active, 1)}
        found = {name: check_count("ProfilerCallback", name, *given, 2**31 - 1) for name, given in counts.items()}
        self.schedule = torch.profiler.schedule(**found, repeat=1)
        self._profiler: Any = None

    def on_start(self, start: RunStart) -> None:
        if start.output is None:
            raise ValueError("fit: ProfilerCallback writes into the run's folder, but `output` is None. Pass a folder.")
        handler = torch.profiler.tensorboard_trace_handler(str(start.output / "profile"))
        # Of the one cycle all events count; without acc_events, torch before 2.12 warns that others do not.
        options = {"schedule": self.schedule, "on_trace_ready": handler, "record_shapes": True, "acc_events": True}
        self._profiler = torch.profiler.profile(**options)
        self._profiler.start()

    def on_step(self, report: StepReport) -> None:
        self._profiler.step()

    def on_end(self) -> None:
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
