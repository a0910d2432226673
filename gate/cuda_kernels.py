"""Builds the CUDA library for every device, and reads what each kernel in it takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import kernel_cases
from resources import Resources, cuobjdump, usage

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "gate"


def build() -> None:
    """Compiles what has changed."""
    environment = os.environ | {"FASTSHAP_FORCE_BUILD": "1", "FASTSHAP_SKIP_CUDA": "0"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)  # all of them
    command = [sys.executable, "setup.py", "--quiet", "build_ext", f"--build-temp={BUILD}", f"--build-lib={BUILD}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def read(only: str | None) -> tuple[dict[str, dict[str, Resources]], list[str]]:
    """{architecture: {kernel: the most that any of its instantiations takes}}, and what their code lacks."""
    found: dict[str, dict[str, Resources]] = {}
    problems = []
    wanted = dict(kernel_cases.CUDA)
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        if only not in (None, source.stem):
            continue
        object_file = BUILD / "cuda" / source.relative_to(ROOT).with_suffix(".o")
        for architecture, symbol, resources in usage(object_file):
            name = f"{source.stem}: {_kernel_name(symbol)}"
            rows = found.setdefault(architecture, {})
            rows[name] = rows.get(name, Resources()).at_most(resources)
        problems += _missing_instructions(object_file, wanted)
    if only is None:
        problems += [f"cuda: there is no kernel {name}" for name in wanted]
    return found, problems


def _kernel_name(symbol: str) -> str:
    """The template's name in a mangled symbol: names are written as their length and letters."""
    readable = subprocess.run(["c++filt", symbol], capture_output=True, text=True, check=True).stdout
    return re.findall(r"(\w+)(?=[<(])", readable.replace("(anonymous namespace)", ""))[0]


def _missing_instructions(object_file: Path, wanted: dict[str, str]) -> list[str]:
    """Checks the kernels of one file and takes them off the list."""
    code = cuobjdump("-sass", "-arch", "sm_90", object_file)
    functions = re.split(r"\n\s*Function : ", code)[1:]
    problems = []
    for name in list(wanted):
        bodies = [body for body in functions if re.search(rf"\d{name}I", body.split("\n", 1)[0])]
        if not bodies:
            continue
        pattern = wanted.pop(name)
        if not any(re.search(pattern, body) for body in bodies):
            problems.append(f"cuda sm_90 {name}: no instruction like {pattern}")
    return problems


def missing_operators() -> list[str]:
    """Operators of the ops that list `cuda`, for which the library, loaded into a fresh process, has no kernel."""
    code = """
import importlib, pkgutil, sys, torch
import fastshap_kernels
from fastshap_kernels import ops
torch.ops.load_library(sys.argv[1])
for module in pkgutil.iter_modules(ops.__path__):
    kernels = getattr(importlib.import_module(f"fastshap_kernels.ops.{module.name}"), "_KERNELS", ())
    defined = hasattr(torch.ops.fastshap, module.name)
    if "cuda" in kernels and defined:
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastshap::{module.name}", "CUDA"):
            print(module.name)
"""
    library = BUILD / "fastshap_kernels" / "_C_cuda.so"
    process = subprocess.run([sys.executable, "-c", code, str(library)], cwd=ROOT, capture_output=True, text=True)
    if process.returncode:
        return [f"cuda: the library can't be loaded: {process.stderr.strip()}"]
    return [f"cuda: {name} lists this backend, and the library has no kernel for it" for name in process.stdout.split()]
