"""Compiles kernels for tests: python tests/emulation/build.py OUTPUT.so [--sanitize] [SOURCE ...].

Without sources these are the CUDA kernels, for the processor: FASTSHAP_EMULATE_CUDA=OUTPUT.so then makes the package's
`cuda` backend serve CPU tensors with them. --sanitize adds AddressSanitizer and UndefinedBehaviorSanitizer, which
tests/sanitize.py runs.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-Wno-psabi"]
# vptr would look for type information that torch's classes don't export.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-sanitize-recover=all"]
# What the kernels of tests/emulation/fastshap/launch.h keep in static shared memory has red zones too.
SANITIZE += ["-fsanitize-sections=fastshap_shared", "-fno-omit-frame-pointer", "-g1"]


def build(output: Path, sources: list[Path], extra: list[str]) -> None:
    package = Path(torch.__file__).parent
    includes = [ROOT / "tests" / "emulation", ROOT / "csrc" / "include", package / "include"]
    definitions = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    newest_header = max(path.stat().st_mtime for folder in includes[:2] for path in folder.rglob("*.h"))
    objects_folder = output.with_suffix("")
    objects_folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = objects_folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            flags = [*FLAGS, *extra, *definitions, *(f"-I{folder}" for folder in includes)]
            subprocess.run([COMPILER, "-x", "c++", *flags, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources))
    libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-ltorch"]
    subprocess.run([COMPILER, "-shared", *extra, *map(str, objects), *libraries, "-o", str(output)], check=True)


if __name__ == "__main__":
    names = [name for name in sys.argv[2:] if name != "--sanitize"]
    kernels = [Path(name) for name in names] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    build(Path(sys.argv[1]).resolve(), kernels, SANITIZE if "--sanitize" in sys.argv else [])
