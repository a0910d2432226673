"""Which backend serves a call, and why."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _native

BACKENDS = ("reference", "cpu")

_logger = logging.getLogger("fastshap_kernels")
_logged: set[str] = set()


def _known(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(
            f"{source} names the backend {name!r}, which does not exist. Choose one of {', '.join(BACKENDS)}."
        )
    return name


def _from_environment() -> str | None:
    name = os.environ.get("FASTSHAP_BACKEND")
    return _known(name, "the environment variable FASTSHAP_BACKEND") if name else None


class _Choice(threading.local):
    """The backend that `use_backend` set in this thread, else the environment's."""

    name: str | None = _from_environment()


_choice = _Choice()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves every op called in this thread inside the block with one backend.

    Args:
        name: "reference" or "cpu".

    Raises:
        ValueError: for a name that is no backend. An op that the backend can't serve raises when it is called:
            an explicit choice never falls back.
    """
    previous, _choice.name = _choice.name, _known(name, "use_backend")
    try:
        yield
    finally:
        _choice.name = previous


def problem(backend: str, device: torch.device) -> str | None:
    """Why `backend` can't serve tensors on `device`; None when it can."""
    if backend == "reference":
        return None
    if device.type != "cpu":
        return f"it serves CPU tensors, and these are on {device}"
    return _native.cpu_problem


def select(
    op: str, device: torch.device, backend: str | None, *, compiled: bool = True, unsupported: str | None = None
) -> str:
    """The backend that serves this call: the argument, then `use_backend`, then the environment, then the best.

    Args:
        op: name of the op, for messages.
        device: where its tensors are.
        backend: the caller's `backend=` argument.
        compiled: whether the op has a `cpu` backend at all.
        unsupported: why the `cpu` backend can't serve these arguments (a dtype, say); None when it can.

    Raises:
        RuntimeError: when an explicitly chosen backend can't serve the call.
    """
    chosen = _known(backend, f"{op}: argument `backend`") if backend is not None else _choice.name
    if chosen == "reference":
        return "reference"
    reason = problem("cpu", device) or unsupported if compiled else "this op has no such backend"
    if reason is None:
        return "cpu"
    if chosen == "cpu":
        raise RuntimeError(f"{op}: the backend 'cpu' can't serve this call: {reason}. Available: reference.")
    if compiled and not torch.compiler.is_compiling():
        _log_once(f"{op} runs on 'reference': {reason}")
    return "reference"


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
