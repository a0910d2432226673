"""Finds and loads the compiled libraries, and says what is wrong when it can't."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
_REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps fastshap-kernels"
_NEEDS = {"_C_cpu.so": "a C++20 compiler", "_C_cuda.so": "the CUDA toolkit (nvcc)"}

#: Path of a library that runs the CUDA kernels on the processor, for tests; its `cuda` backend serves CPU tensors.
_EMULATION = os.environ.get("FASTSHAP_EMULATE_CUDA", "")
EMULATED = bool(_EMULATION)


def _load(path: Path) -> str | None:
    """Loads one library; returns None when it is ready, else why it is not."""
    if not path.exists():
        return (
            f"{path.name} was not built. With torch and {_NEEDS.get(path.name, 'its sources')} installed, "
            f"rebuild with: {_REINSTALL}"
        )
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return (
            f"{path.name} can't be loaded by torch {torch.__version__}: {error}. It needs torch 2.11 or newer. "
            f"Rebuild with: {_REINSTALL}"
        )
    return None


def _load_cpu() -> str | None:
    if EMULATED:
        return "this process emulates the CUDA kernels instead (FASTSHAP_EMULATE_CUDA)"
    return _load(_FOLDER / "_C_cpu.so")


def _load_cuda() -> str | None:
    if EMULATED:
        return _load(Path(_EMULATION))
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return _load(_FOLDER / "_C_cuda.so")


def build_info(library: str) -> str:
    """How `_C_cpu.so` or `_C_cuda.so` was built: compiler, torch headers, ABI; empty where it is not loaded."""
    if {"_C_cpu.so": cpu_problem, "_C_cuda.so": cuda_problem}[library] is not None or EMULATED:
        return ""
    function = ctypes.CDLL(str(_FOLDER / library)).fastshap_build_info
    function.restype = ctypes.c_char_p
    return function().decode()


#: Why the compiled CPU library can't be used; None when it is loaded.
cpu_problem: str | None = _load_cpu()
#: The same of the CUDA library; it says nothing about whether there is a device.
cuda_problem: str | None = _load_cuda()
