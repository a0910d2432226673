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
        ["processor", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"],
    ]


def _installed_version(distribution: str) -> str:
    # Read from its metadata: importing timm takes seconds.
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def _backends() -> list[list[str]]:
    rows = [["backend", "on CPU tensors"]]
    for name in _backend.BACKENDS:
        reason = _backend.problem(name, torch.device("cpu"))
        rows.append([name, "available" if reason is None else f"not available: {reason}"])
    rows.append(["cpu built by", _native.build_info() or "nothing that this torch can load"])
    rows.append(["FASTSHAP_BACKEND", os.environ.get("FASTSHAP_BACKEND") or "not set: the best backend for each call"])
    return rows


def _ops() -> list[list[str]]:
    rows = [["op", *_backend.BACKENDS]]
    for name in fastshap_kernels.__all__:
        function = getattr(fastshap_kernels, name)
        if inspect.isfunction(function) and function.__module__.startswith("fastshap_kernels.ops."):
            rows.append([name, "yes", "yes" if _has_cpu_kernel(name) else "-"])
    return rows


def _has_cpu_kernel(op: str) -> bool:
    return hasattr(torch.ops.fastshap, op) and torch._C._dispatch_has_kernel_for_dispatch_key(f"fastshap::{op}", "CPU")


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    print(report())
