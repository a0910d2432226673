"""Compiles Triton kernels as their launchers start them, for devices that are not here."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import kernel_cases
import torch
import triton
from resources import Resources, cuobjdump
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

import fastshap_kernels  # noqa: F401 (registers the operators)

ARCHITECTURES = (80, 90, 100)
_POINTERS = {
    torch.float64: "*fp64",
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Recorder:
    """Notes launches in place of making them."""

    def __init__(self) -> None:
        self.launches: list[tuple[JITFunction, tuple[Any, ...], dict[str, Any]]] = []

    def __enter__(self) -> Recorder:
        self._run, launches = JITFunction.run, self.launches

        def note(function: JITFunction, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
            launches.append((function, arguments, named))

        JITFunction.run = note
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self._run


def _source(function: JITFunction, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[ASTSource, dict]:
    """The kernel specialised as Triton does it: by dtype, and for whole numbers that are 1 or divide by 16."""
    names = function.arg_names
    options = {name: value for name, value in named.items() if name not in names}
    values = dict(zip(names, arguments, strict=False)) | {k: v for k, v in named.items() if k in names}
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(function.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[(position,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes), options


def _compile(function: JITFunction, arguments: Any, named: Any, architecture: int) -> tuple[Resources, str]:
    source, options = _source(function, arguments, named)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        usage, code = cuobjdump("-res-usage", file), cuobjdump("-sass", file)
    local = sum(int(size) for size in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    registers = max(int(number) for number in re.findall(r"REG:(\d+)", usage))
    return Resources(registers, int(compiled.metadata.shared), local), code


def _compile_case(file: str, index: int) -> tuple[dict[str, dict[str, Resources]], list[str]]:
    """One case for every architecture: {architecture: {kernel: resources}} and what its code lacks."""
    case = list(kernel_cases.TRITON[file]())[index]
    with Recorder() as recorder:
        case.call(torch.ops.fastshap_triton)
    found: dict[str, dict[str, Resources]] = {}
    problems = []
    launched = {function.__name__ for function, _, _ in recorder.launches}
    problems += [f"{case.name}: launches no {name}" for name in case.instructions if name not in launched]
    for architecture in ARCHITECTURES:
        rows = found.setdefault(f"sm_{architecture}", {})
        for function, arguments, named in recorder.launches:
            resources, code = _compile(function, arguments, named, architecture)
            name = f"{case.name}: {function.__name__}"
            rows[name] = rows.get(name, Resources()).at_most(resources)
            wanted = case.instructions.get(function.__name__)
            if wanted and not re.search(wanted, code):
                problems.append(f"triton sm_{architecture} {name}: no instruction like {wanted}")
    return found, problems


def compile_all(only: str | None) -> Iterator[tuple[dict[str, dict[str, Resources]], list[str]]]:
    """Every case of every file of kernels, or of one."""
    jobs = [
        (file, i)
        for file in kernel_cases.TRITON
        if only in (None, file)
        for i in range(len(list(kernel_cases.TRITON[file]())))
    ]
    # Not forked: torch's threads don't survive that.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile_case, *zip(*jobs, strict=True)) if jobs else ()
