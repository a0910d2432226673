"""The ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer: python tests/sanitize.py [pytest's arguments].

The C++ kernels, and the CUDA ones on the processor, are built with both; pytest then runs as ever, in a process that
loads the sanitizers first. The first fault ends that process with a report of where it is.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "build" / "sanitized"
BUILD = ROOT / "tests" / "emulation" / "build.py"
#: Without what compiles, and what counts on the time that a call takes; kernel_shap has no kernels.
TESTS = ["tests/ops", "-m", "not slow and not gpu", "-k", "not compile and not fullgraph", "--capture=sys"]
TESTS += ["--ignore=tests/ops/test_kernel_shap.py"]


def preload() -> str:
    """The libraries that a process of Python must load first, for LD_PRELOAD.

    libstdc++ is among them because the sanitizer looks for its exceptions when it starts.
    """
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output([compiler, f"-print-file-name={name}"], text=True).strip() for name in names]
    return " ".join(found)


def environment() -> dict[str, str]:
    """Python never gives all of its memory back, and PyTorch frees what it did not allocate with the same function."""
    options = "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0"
    return os.environ | {
        "LD_PRELOAD": preload(),
        "ASAN_OPTIONS": options,
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "1",
    }


def build(name: str, *sources: Path) -> Path:
    """A library with the sanitizers in it."""
    library = OUTPUT / f"{name}.so"
    command = [sys.executable, BUILD, library, "--sanitize", *sources]
    subprocess.run([str(part) for part in command], check=True)
    return library


def copy_of_the_package(library: Path) -> Path:
    """A folder with the package, in which `library` is the compiled one."""
    folder = OUTPUT / "package" / "fastshap_kernels"
    folder.mkdir(parents=True, exist_ok=True)
    for source in (ROOT / "fastshap_kernels").iterdir():
        link = folder / source.name
        link.unlink(missing_ok=True)
        if source.suffix not in (".so", "") or source.is_dir():
            link.symlink_to(source)
    (folder / "_C_cpu.so").symlink_to(library)
    return folder.parent


def run(arguments: list[str], variables: dict[str, str], *folders: Path) -> int:
    """pytest's exit code. `python -m pytest` would take the package of the working directory."""
    pytest = [sys.executable, "-c", "import sys, pytest; sys.path.pop(0); sys.exit(pytest.main())"]
    paths = os.pathsep.join(str(folder) for folder in (*folders, ROOT, ROOT / "python"))
    process = subprocess.run([*pytest, *arguments], cwd=ROOT, env=environment() | variables | {"PYTHONPATH": paths})
    return process.returncode


def main() -> None:
    given = sys.argv[1:]
    sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    package = copy_of_the_package(build("cpu", *sources))
    cuda = {"FASTSHAP_BACKEND": "cuda", "FASTSHAP_EMULATE_CUDA": str(build("cuda"))}
    # packed_attention has no CUDA kernels. A core each.
    with ThreadPoolExecutor(2) as pool:
        emulated = pool.submit(run, given or [*TESTS, "--ignore=tests/ops/test_packed_attention.py"], cuda)
        compiled = pool.submit(run, given or TESTS, {}, package)
    sys.exit(emulated.result() or compiled.result())


if __name__ == "__main__":
    main()
