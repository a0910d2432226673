"""accelerate's trackers (TensorBoard, W&B, trackio and others), as a callback."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, get_available_trackers
from accelerate.utils import LoggerType

from fastshap_kernels._checks import check_count, fail

from .callbacks import Callback, Callbacks, RunStart


def checked_trackers(log_with: Any, output: Any) -> list[Any]:
    """What `fit` is given, as accelerate takes it.

    Raises:
        ValueError: for what is no tracker, or writes files where there is no folder.
        ModuleNotFoundError: for a tracker whose package is not installed; accelerate would leave it out.
    """
    found = [] if log_with is None else list(log_with) if isinstance(log_with, list | tuple) else [log_with]
    names = [str(kind) for kind in LoggerType if kind != LoggerType.ALL]
    for tracker in found:
        if isinstance(tracker, GeneralTracker):
            continue
        if not isinstance(tracker, str) or tracker not in names:
            fail("fit", "log_with", f"{', '.join(names)} or a tracker of accelerate's, or a list of them", tracker)
        if tracker not in [str(kind) for kind in get_available_trackers()]:
            raise ModuleNotFoundError(
                f"fit: argument `log_with`: the tracker {tracker!r} needs a package that is not installed. Run: pip "
                f"install {tracker.replace('_', '-')}"
            )
        if tracker == str(LoggerType.TENSORBOARD) and output is None:
            raise ValueError("fit: argument `log_with`: TensorBoard's files need a folder. Pass `output`.")
    return found


class Watched(NamedTuple):
    """What of a run is shown, and to whom."""

    callbacks: Callbacks
    trackers: list[Any]
    interval: int

    @classmethod
    def checked(cls, callbacks: Any, log_with: Any, log_interval: Any, output: Any) -> Watched:
        """What `fit` is given."""
        interval = check_count("fit", "log_interval", log_interval, 1, 2**31 - 1)
        return cls(Callbacks(callbacks), checked_trackers(log_with, output), interval)

    def of(self, accelerator: Accelerator) -> Callbacks:
        """All that watch the run of this accelerator."""
        return Callbacks([*([Tracking(accelerator)] if self.trackers else []), *self.callbacks.all])


class Tracking(Callback):
    """Logs figures of the training as train/…, and the rows of the history as epoch/…, both by the step."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator, self.step = accelerator, 0

    def on_start(self, start: RunStart) -> None:
        project = "fastshap" if start.output is None else start.output.resolve().name
        plain = (bool, int, float, str)
        config = {name: value if isinstance(value, plain) else str(value) for name, value in start.settings.items()}
        self.accelerator.init_trackers(project, config)

    def on_log(self, step: int, figures: Mapping[str, float]) -> None:
        self.step = step
        self._log("train", figures)

    def on_epoch(self, row: Mapping[str, float | None]) -> None:
        self._log("epoch", row)

    def _log(self, group: str, figures: Mapping[str, float | None]) -> None:
        known = {f"{group}/{name}": value for name, value in figures.items() if value is not None}
        self.accelerator.log(known, step=self.step)

    def on_end(self) -> None:
        # Not end_training, which also ends the process group of the caller.
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers = []
