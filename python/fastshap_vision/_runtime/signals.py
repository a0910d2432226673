"""Signals that ask a run to end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from functools import partial

#: What schedulers send before they end a job.
SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def leaving_to_main() -> Callable[[int], None]:
    """The `worker_init_fn` of a loader of this process, whose workers end when it says so and by no other's signal.

    Launchers and schedulers signal whole groups of processes. A worker that ends by such a signal ends the run with it,
    before the update and its checkpoint are done. The main process sends SIGTERM too, and waits, to workers that an
    error's traceback has kept: when Python collects the error, or exits.
    """
    return partial(_leave_to, os.getpid())


def _leave_to(main: int, worker: int) -> None:
    if hasattr(signal, "sigwaitinfo"):  # elsewhere, as on macOS, nothing tells who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Thread(target=_end_with, args=(main,), daemon=True).start()


def _end_with(main: int) -> None:
    while signal.sigwaitinfo(SIGNALS).si_pid != main:
        pass
    os._exit(0)
