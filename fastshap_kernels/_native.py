"""Finds and loads the compiled libraries, and says what is wrong when it can't."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps fastshap-kernels"


def _load(name: str) -> str | None:
    """Loads one library; returns None when it is ready, else why it is not."""
    path = _FOLDER / name
    if not path.exists():
        return (
            f"{name} was not built: this is a pure-Python install. With torch and a C++20 compiler installed, "
            f"rebuild with: {_REINSTALL}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return (
            f"{name} can't be loaded by torch {torch.__version__}: {error}. It needs torch 2.11 or newer. "
            f"Rebuild with: {_REINSTALL}"
        )
    return None


def build_info() -> str:
    """How the compiled library was built: compiler, torch headers, ABI; empty where it is not loaded."""
    if cpu_problem is not None:
        return ""
    function = ctypes.CDLL(str(_FOLDER / "_C_cpu.so")).fastshap_build_info
    function.restype = ctypes.c_char_p
    return function().decode()


#: Why the compiled CPU library can't be used; None when it is loaded.
cpu_problem: str | None = _load("_C_cpu.so")
