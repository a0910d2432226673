"""What is installed, which backends can be used and why not: `python -m fastshap_kernels.info`."""

from __future__ import annotations

import inspect
import os
import platform
from importlib import metadata

import torch

import fastshap_kernels

from . import _backend, _native


def report() -> str:
    """Describes this installation: versions, processor, backends, and which op has which backend.

    Returns:
        Plain text, one fact a line, columns aligned.
    """
    return "\n\n".join([_table(_versions()), _table(_backends()), _table(_ops())])


def _versions() -> list[list[str]]:
    return [
        ["fastshap_kernels", fastshap_kernels.__version__],
        ["python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"],
        ["torch", torch.__version__],
        ["timm", _installed_version("timm")],
        ["triton", _installed_version("triton")],
        ["CUDA device", torch.cuda.get_device_name() if torch.cuda.is_available() else "none"],
        ["processor", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"],
    ]


def _installed_version(distribution: str) -> str:
    # Read from its metadata: importing timm or Triton takes seconds.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backends() -> list[list[str]]:
    rows = [["backend", "here"]]
    for name, place in (("reference", "cpu"), ("cpu", "cpu"), ("triton", "cuda"), ("cuda", "cuda")):
        reason = _backend.problem(name, torch.device(place))
        if reason is None and place == "cuda" and not torch.cuda.is_available():
            reason = "torch sees no CUDA device"
        rows.append([name, "available" if reason is None else f"not available: {reason}"])
    for name in ("cpu", "cuda"):
        rows.append([f"{name} built by", _native.build_info(f"_C_{name}.so") or "nothing that this torch can load"])
    rows.append(["cpu compiled for", _capability()])
    rows.append(["FASTSHAP_BACKEND", os.environ.get("FASTSHAP_BACKEND") or "not set: the best backend for each call"])
    return rows


def _capability() -> str:
    if not _native.cpu_capabilities():
        return "nothing that this process can run"
    forced = os.environ.get("FASTSHAP_CPU_CAPABILITY")
    origin = "by FASTSHAP_CPU_CAPABILITY" if forced else "the best of this processor"
    return f"{_native.cpu_capability()}, {origin}; here: {', '.join(_native.cpu_capabilities())}"


def _ops() -> list[list[str]]:
    rows = [["op", *_backend.BACKENDS]]
    for name in fastshap_kernels.__all__:
        function = getattr(fastshap_kernels, name)
        if inspect.isfunction(function) and function.__module__.startswith("fastshap_kernels.ops."):
            kernels = getattr(inspect.getmodule(function), "_KERNELS", ())
            rows.append([name, "yes", *("yes" if backend in kernels else "-" for backend in _backend.BACKENDS[1:])])
    return rows


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(report())
