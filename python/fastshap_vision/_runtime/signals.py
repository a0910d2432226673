"""The signals by which a run is asked to end, which are its own matter and not that of its workers."""

from __future__ import annotations

import signal

#: What schedulers send before they end a job.
SIGNALS = (signal.SIGTERM, *((signal.SIGUSR1,) if hasattr(signal, "SIGUSR1") else ()))


def leave_to_main(worker: int = 0) -> None:
    """For worker processes that load data: launchers and schedulers signal whole groups of processes.

    A worker that ends by such a signal ends the run with it, before the update and its checkpoint are done. Workers end
    where their loader does, or within seconds after the main process.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
