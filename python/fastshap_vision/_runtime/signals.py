"""The signals by which a run is asked to end, which are its own matter and not that of its workers."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import time
from collections.abc import Callable
from functools import cache

#: What schedulers send before they end a job.
SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))
#: How long other processes have, after SIGTERM, before they are killed at the exit.
_SECONDS = 2.0


def leaving_to_main() -> Callable[[int], None]:
    """The `worker_init_fn` of loaders whose workers leave the signals of a run to its main process.

    Launchers and schedulers signal whole groups of processes. A worker that ends by such a signal ends the run with it,
    before the update and its checkpoint are done. Workers end where their loader does, where the main process exits,
    or within seconds after it was killed.
    """
    _end_workers_at_exit()
    return _leave_to_main


def _leave_to_main(worker: int) -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@cache
def _end_workers_at_exit() -> None:
    """Before multiprocessing does, which sends SIGTERM to daemons and would wait for those that ignore it, for ever.

    Loaders are left at the exit where an error was: its traceback keeps them.
    """
    atexit.register(_end_daemons)


def _end_daemons() -> None:
    daemons = [process for process in multiprocessing.active_children() if process.daemon]
    for process in daemons:
        process.terminate()
    until = time.monotonic() + _SECONDS
    for process in daemons:
        process.join(max(0.0, until - time.monotonic()))
        process.kill()
