"""Compiles every source against the headers of the oldest supported torch, whatever torch is here.

Those headers come from PyPI, out of the wheel for macOS: what the stable ABI consists of is the same for every
platform, and it is the smallest wheel (80 MB). Only that part is unpacked, so a source that includes anything else
fails as well.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
_STABLE = tuple(f"torch/include/torch/{part}/" for part in ("headeronly", "csrc/stable", "csrc/inductor/aoti_torch"))


def oldest_torch() -> str:
    """The lower bound in pyproject.toml, such as 2.11.0."""
    bound = re.search(r'"torch>=(\d+\.\d+)"', (ROOT / "pyproject.toml").read_text())
    if bound is None:
        raise RuntimeError('pyproject.toml must hold a dependency like "torch>=2.11"')
    return f"{bound[1]}.0"


def fetch() -> Path:
    """The folder of the headers: build/gate/torch-2.11.0/torch/include, filled by the first call."""
    folder = ROOT / "build" / "gate" / f"torch-{oldest_torch()}"
    if folder.exists():
        return folder / "torch" / "include"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version=3.10", "--platform=macosx_11_0_arm64", f"--dest={temporary}"]
        subprocess.run([*command, f"torch=={oldest_torch()}"], check=True)
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            wheel.extractall(unpacked, [name for name in wheel.namelist() if name.startswith(_STABLE)])
        unpacked.rename(folder)
    return folder / "torch" / "include"


def problems(files: list[Path], headers: Path) -> list[str]:
    """What the compilers say of each source that does not compile."""
    build = runpy.run_path(str(ROOT / "setup.py"), run_name="flags")
    home = build["find_cuda"]()
    if home is None:
        return ["headers: nvcc is not on the PATH and CUDA_HOME is not set"]
    folders = (ROOT / "csrc" / "include", headers, Path(home) / "include")
    flags = ['-DFASTSHAP_ARCHITECTURES=""', *(f"-I{folder}" for folder in folders)]

    def compile_one(source: Path) -> str | None:
        if source.suffix == ".cu":
            # One device: the headers are the same for all.
            command = [str(Path(home) / "bin" / "nvcc"), *build["CUDA_FLAGS"], "-arch=compute_80", "-code=compute_80"]
            command += ["-c", "-o", str(Path(folder) / f"{source.stem}.o")]
        else:
            command = [os.environ.get("CXX", "g++"), *build["CPU_FLAGS"], "-fsyntax-only"]
        command += [*flags, str(source)]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        errors = [line for line in done.stdout.splitlines() if "error" in line]
        return f"headers of torch {oldest_torch()}: {errors[0] if errors else source}" if done.returncode else None

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        return [problem for problem in pool.map(compile_one, files) if problem is not None]


def sources(only: str | None) -> list[Path]:
    """All of them, or those of one stem, such as mask_patches."""
    files = (path for suffix in ("cpp", "cu") for path in (ROOT / "csrc").glob(f"*/*.{suffix}"))
    return sorted(path for path in files if only in (None, path.stem))
