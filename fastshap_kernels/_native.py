"""Finds and loads the compiled libraries, and says what is wrong when it can't."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

_FOLDER = Path(__file__).parent
# Without --no-cache-dir pip would take the wheel that it built the first time.
_REINSTALL = "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps fastshap-kernels"
_NEEDS = {"_C_cpu.so": "ninja and a C++20 compiler", "_C_cuda.so": "ninja and the CUDA toolkit (nvcc)"}

#: What the CPU kernels are compiled for, each with all of those before it.
CPU_CAPABILITIES = ("default", "avx2", "avx512", "avx512_bf16")

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
    return _text(library, "fastshap_build_info")


def _text(library: str, function: str) -> str:
    """What a function of a library that is loaded returns."""
    call = ctypes.CDLL(str(_FOLDER / library))[function]
    call.restype = ctypes.c_char_p
    return call().decode()


def cpu_capability() -> str:
    """For which of CPU_CAPABILITIES the kernels in use were compiled; empty where the library is not loaded."""
    return "" if cpu_problem is not None else _text("_C_cpu.so", "fastshap_cpu_capability")


def cpu_capabilities() -> tuple[str, ...]:
    """Those of CPU_CAPABILITIES that this processor has; none where the library is not loaded."""
    if cpu_problem is not None:
        return ()
    best = _text("_C_cpu.so", "fastshap_best_cpu_capability")
    return CPU_CAPABILITIES[: CPU_CAPABILITIES.index(best) + 1]


def set_cpu_capability(name: str) -> None:
    """Runs the CPU kernels as they were compiled for an older processor, in this whole process.

    Raises:
        ValueError: for a name that is not among CPU_CAPABILITIES.
        RuntimeError: for one that this processor lacks, or where the library is not loaded.
    """
    if name not in CPU_CAPABILITIES:
        raise ValueError(
            f"the environment variable FASTSHAP_CPU_CAPABILITY must be one of {', '.join(CPU_CAPABILITIES)}, but it is "
            f"{name!r}. Leave it out for the best of this processor."
        )
    if cpu_problem is None:
        choose = ctypes.CDLL(str(_FOLDER / "_C_cpu.so")).fastshap_set_cpu_capability
        choose.restype = ctypes.c_bool
        if choose(name.encode()):
            return
    here = cpu_problem or f"this processor has {', '.join(cpu_capabilities())} only"
    raise RuntimeError(
        f"the environment variable FASTSHAP_CPU_CAPABILITY is {name!r}, but {here}. Leave it out for the best of this "
        "processor."
    )


#: Why the compiled CPU library can't be used; None when it is loaded.
cpu_problem: str | None = _load_cpu()
#: The same of the CUDA library; it says nothing about whether there is a device.
cuda_problem: str | None = _load_cuda()

if os.environ.get("FASTSHAP_CPU_CAPABILITY"):
    set_cpu_capability(os.environ["FASTSHAP_CPU_CAPABILITY"])
