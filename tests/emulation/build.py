"""Compiles the CUDA kernels for the processor: python tests/emulation/build.py OUTPUT.so [SOURCE.cu ...].

FASTSHAP_EMULATE_CUDA=OUTPUT.so then makes the package's `cuda` backend serve CPU tensors with them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
FLAGS = ["-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas"]


def build(output: Path, sources: list[Path]) -> None:
    package = Path(torch.__file__).parent
    includes = [ROOT / "tests" / "emulation", ROOT / "csrc" / "include", package / "include"]
    definitions = ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    compiler = os.environ.get("CXX", "g++")
    newest_header = max(path.stat().st_mtime for folder in includes[:2] for path in folder.rglob("*.h"))
    objects_folder = output.parent / "emulation"
    objects_folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        target = objects_folder / f"{source.stem}.o"
        if not target.exists() or target.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            command = [compiler, "-x", "c++", *FLAGS, *definitions, *(f"-I{folder}" for folder in includes)]
            subprocess.run([*command, "-c", str(source), "-o", str(target)], check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, sources))
    libraries = [f"-L{package / 'lib'}", "-ltorch_cpu", "-ltorch"]
    subprocess.run([compiler, "-shared", *map(str, objects), *libraries, "-o", str(output)], check=True)


if __name__ == "__main__":
    kernels = [Path(name) for name in sys.argv[2:]] or sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
    build(Path(sys.argv[1]).resolve(), kernels)
