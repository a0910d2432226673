"""How a run ends early and goes on later: signals that ask it to, and the checkpoint that it then writes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import Tensor

from .._runtime.signals import SIGNALS


class TrainingStopped(RuntimeError):
    """A run that a signal asked to stop. It has written a checkpoint, and goes on with resume="auto".

    Args:
        message: where it stopped.
        signal_number: of the signal; a program that ends by it returns 128 more.

    Example:
        >>> fv.TrainingStopped("stopped by SIGTERM", signal_number=15).signal_number
        15
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """Whether a signal has asked the run to stop, which all processes then do after the same update."""

    def __init__(self) -> None:
        self.number = 0
        self._said: Tensor | None = None

    @contextmanager
    def listening(self, enabled: bool) -> Iterator[None]:
        """Signals are taken for a request, where they can be: in the main thread, which gets them back."""
        if not enabled or threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._ask) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _ask(self, number: int, frame: object) -> None:
        self.number = number

    def agreed(self, accelerator: Accelerator) -> int:
        """The signal, once every process has heard of it; else 0. All must call it after each update.

        Several processes learn in one update what all knew in the one before, so that no step is waited for.
        """
        if accelerator.num_processes == 1:
            return self.number
        found = 0 if self._said is None else int(self._said)
        self._said = torch.tensor(self.number, device=accelerator.device)
        torch.distributed.all_reduce(self._said, torch.distributed.ReduceOp.MAX)
        return found

    def error(self, number: int, where: str) -> TrainingStopped:
        name = signal.Signals(number).name
        message = f"fit: stopped by {name} {where}; a checkpoint is written. Go on with resume='auto'."
        return TrainingStopped(message, number)
