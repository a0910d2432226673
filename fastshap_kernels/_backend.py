"""Which backend serves a call, and why."""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from . import _native
from ._checks import describe

BACKENDS = ("reference", "cpu", "triton", "cuda")

#: Backends that may serve a device without being asked for; an op's own list says which of them comes first.
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}

#: Whether Triton's interpreter runs its kernels on CPU tensors, for tests; Triton reads it when it is imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

_logger = logging.getLogger("fastshap_kernels")
_logged: set[str] = set()


def _known(name: str, source: str) -> str:
    if not isinstance(name, str) or name not in BACKENDS:
        shown = describe(name).removesuffix(" (str)")
        choices = ", ".join(BACKENDS)
        raise ValueError(f"{source} names the backend {shown}, which does not exist. Choose one of {choices}.")
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
        name: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: for a name that is no backend. An op that the backend can't serve raises when it is called:
            an explicit choice never falls back.

    Example:
        >>> with fk.use_backend("reference"):
        ...     bits = fk.sample_coalitions(2, 4, 9, seed=0)
        >>> torch.equal(bits, fk.sample_coalitions(2, 4, 9, seed=0))  # by the best backend: the same bits
        True
    """
    previous, _choice.name = _choice.name, _known(name, "use_backend")
    try:
        yield
    finally:
        _choice.name = previous


def _find_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed. Install it with: pip install triton"
    return None


_triton_problem = _find_triton()


def problem(backend: str, device: torch.device) -> str | None:
    """Why `backend` can't serve tensors on `device`; None when it can."""
    if backend == "reference":
        return None
    served = {"cpu": "CPU", "triton": "CUDA", "cuda": "CUDA"}[backend]
    on_host = (backend == "triton" and INTERPRETED) or (backend == "cuda" and _native.EMULATED)
    if device.type != ("cpu" if on_host else served.lower()):
        return f"it serves {served} tensors, and these are on {device}"
    return {"cpu": _native.cpu_problem, "triton": _triton_problem, "cuda": _native.cuda_problem}[backend]


def select(
    op: str,
    device: torch.device,
    backend: str | None,
    kernels: tuple[str, ...],
    *,
    unsupported: Mapping[str, str] | None = None,
) -> str:
    """The backend that serves this call: the argument, then `use_backend`, then the environment, then the best.

    Args:
        op: name of the op, for messages.
        device: where its tensors are.
        backend: the caller's `backend=` argument.
        kernels: the backends that the op has besides the reference, the best first.
        unsupported: backends that can't serve these arguments (a dtype, say), and why.

    Raises:
        RuntimeError: when an explicitly chosen backend can't serve the call.
    """
    unsupported = unsupported or {}
    chosen = _known(backend, f"{op}: argument `backend`") if backend is not None else _choice.name
    if chosen == "reference":
        return "reference"
    if chosen is not None:
        reason = _reason(chosen, device, kernels, unsupported)
        if reason is None:
            return chosen
        others = [name for name in kernels if _reason(name, device, kernels, unsupported) is None]
        available = ", ".join(["reference", *others])
        raise RuntimeError(f"{op}: the backend {chosen!r} can't serve this call: {reason}. Available: {available}.")
    skipped = {}
    for name in kernels:
        if name in _AUTOMATIC.get(device.type, ()):
            skipped[name] = _reason(name, device, kernels, unsupported)
            if skipped[name] is None:
                break
    served_by = next((name for name, reason in skipped.items() if reason is None), "reference")
    if not torch.compiler.is_compiling():
        for name, reason in skipped.items():
            if reason is not None:
                _log_once(f"{op} runs on {served_by!r}, not on {name!r}: {reason}")
        if kernels and not skipped:
            _log_once(f"{op} runs on 'reference': no other backend serves tensors on {device.type}")
    return served_by


def _reason(name: str, device: torch.device, kernels: tuple[str, ...], unsupported: Mapping[str, str]) -> str | None:
    """Why the backend can't serve the call; None when it can."""
    if name not in kernels:
        return "this op has no such backend"
    return problem(name, device) or unsupported.get(name)


def _log_once(message: str) -> None:
    if message not in _logged:
        _logged.add(message)
        _logger.info(message)
