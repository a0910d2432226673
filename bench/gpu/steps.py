"""Builds, checks and measures everything on this machine's GPU: make gpu, or python -m bench.gpu.steps.

1. The compiled libraries, in place, for this device.
2. tests/gpu, each op and backend in a process of its own, since a kernel that breaks the CUDA context breaks every
   later test of its process; beside them compute-sanitizer's memcheck and racecheck, and a process that compiles what
   step 3 measures, for its caches.
3. python -m bench.gpu, alone on the device.

A step that fails does not stop the next ones; the exit status is 1 then. What came of each is in the results file,
under "checks", and every command's output among the logs.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from bench.gpu.figures import KEY, judge
from bench.gpu.measure import default_path
from bench.lib.machine import ROOT
from bench.lib.results import RESULTS, Results
from fastshap_kernels import testing

#: Seconds that each step may take; measuring takes what is left of the whole, less what it takes to stop.
WHOLE, BUILD, CHECKS, STOP = 525, 170, 190, 25
PROCESSES = 8


class Commands:
    """Runs commands, each with a log of its own."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(parents=True, exist_ok=True)

    def run(self, name: str, command: list[str], until: float, cwd: Path = ROOT, **environment: str) -> dict[str, Any]:
        """The status of a command, and its seconds; it is killed at `until`."""
        started = time.time()
        folders = ROOT, ROOT / "python", ROOT / "tests"
        variables = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, folders))} | environment
        with self.log(name).open("w") as log:
            process = subprocess.Popen(
                command, cwd=cwd, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                code = process.wait(max(until - started, 1))
                status = "passed" if code == 0 else f"failed ({code})"
            except subprocess.TimeoutExpired:
                status = "ran out of time"
            finally:
                stop(process)
        seconds = round(time.time() - started, 1)
        print(f"{name}: {status}, {seconds} s", flush=True)
        return {"status": status, "seconds": seconds}

    def log(self, name: str) -> Path:
        return self.logs / f"{name}.log"


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends what a command left running."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def build(commands: Commands, until: float) -> dict[str, Any]:
    """Compiles in a folder of links without pyproject.toml, which an old setuptools can't read."""
    folder = ROOT / "build" / "gpu"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("setup.py", "csrc", "fastshap_kernels"):
        link = folder / name
        if not link.is_symlink():
            link.symlink_to(ROOT / name)
    environment = {"FASTSHAP_SKIP_CPP": "0", "FASTSHAP_SKIP_CUDA": "0", "FASTSHAP_FORCE_BUILD": "1"}
    if torch.cuda.is_available():
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    return commands.run("build", command, until, folder, **environment)


def test(commands: Commands, until: float) -> dict[str, Any]:
    """The tests by op and backend, then those of whole paths and of large tensors; counts, and what failed."""
    served = [f"{op}-{backend}" for op in testing.OPS for backend in testing.backends(op, "triton", "cuda")]
    vision = "test_vision_step or test_families or test_convolutional_values or test_coalition_stream"
    paths = {"compiles": "compiles", "large": "large", "vision": vision}
    shards = {name: f"[{name} and not large" for name in served} | paths

    def run_shard(shard: tuple[str, str]) -> tuple[str, dict[str, Any]]:
        name, chosen = shard
        report = commands.logs / f"tests-{name}.xml"
        report.unlink(missing_ok=True)
        options = ["-p", "no:cacheprovider", "-W", "default", "--tb=short", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-m", "gpu", "-k", chosen, *options]
        outcome = commands.run(f"tests-{name}", command, until)
        return name, outcome | read_report(report)

    with ThreadPoolExecutor(PROCESSES) as pool:
        # The large ones take longest.
        outcomes = dict(pool.map(run_shard, reversed(shards.items())))
    failed = [name for name, outcome in outcomes.items() if outcome["status"] != "passed"]
    return {
        "status": "failed: " + ", ".join(failed) if failed else "passed",
        **{kind: sum(x.get(kind, 0) for x in outcomes.values()) for kind in ("passed", "failed", "skipped")},
        "failures": [line for outcome in outcomes.values() for line in outcome.get("failures", [])],
        "processes": {name: outcome["status"] for name, outcome in outcomes.items()},
    }


def read_report(path: Path) -> dict[str, Any]:
    """Counts and failures of a JUnit file; nothing where the process died before it wrote one."""
    if not path.exists():
        return {}
    suite = ElementTree.parse(path).getroot()[0]
    failures = []
    for case in suite.iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            first, *_ = problem.get("message", "").splitlines() or [""]
            failures.append(f"{case.get('name')}: {first}"[:300])
    total, skipped = int(suite.get("tests", 0)), int(suite.get("skipped", 0))
    return {
        "passed": total - skipped - len(failures),
        "failed": len(failures),
        "skipped": skipped,
        "failures": failures,
    }


def find_sanitizer() -> str | None:
    """compute-sanitizer on the PATH, or beside nvcc."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    names = ["compute-sanitizer", *(str(folder / "compute-sanitizer") for folder in folders)]
    return next((found for name in names if (found := shutil.which(name))), None)


def sanitize(commands: Commands, tool: str, until: float) -> dict[str, Any]:
    """One of compute-sanitizer's tools over every op and backend; how far it came, and its own summary."""
    program = find_sanitizer()
    if program is None:
        return {"status": "passed over: compute-sanitizer is not installed"}
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "application-only"]
    command = [program, *options, sys.executable, "tests/gpu/sanitize.py"]
    # torch's own pool of memory would hide where a tensor ends.
    outcome = commands.run(tool, command, until, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    lines = commands.log(tool).read_text(errors="replace").splitlines()
    outcome["done"] = [line for line in lines if line.partition(" ")[0] in testing.OPS]
    outcome["summary"] = [line for line in lines if "SUMMARY" in line]
    return outcome


def check(commands: Commands, until: float) -> dict[str, Any]:
    """Everything that may run beside the tests."""
    warm_up = [sys.executable, "-m", "bench.gpu", "--warm-up"]
    with ThreadPoolExecutor(4) as pool:
        running = {
            "tests": pool.submit(test, commands, until),
            "memcheck": pool.submit(sanitize, commands, "memcheck", until),
            "racecheck": pool.submit(sanitize, commands, "racecheck", until),
            "warm_up": pool.submit(commands.run, "warm-up", warm_up, until),
        }
        return {name: future.result() for name, future in running.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results file")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "gpu" / "logs")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("make gpu needs a CUDA device, and this torch sees none")
    started = time.time()
    path = default_path(options.output.resolve(), torch.device("cuda"))
    commands = Commands(options.logs.resolve())

    checks = {"build": build(commands, started + BUILD)}
    checks |= check(commands, time.time() + CHECKS)
    results = Results(path, KEY, judge)
    results.content["checks"] = checks
    results.write()

    end = started + WHOLE
    command = [sys.executable, "-m", "bench.gpu", "--output", str(path), "--until", str(end - STOP)]
    measured = commands.run("bench", command, end)
    print(commands.log("bench").read_text(errors="replace"))
    results = Results(path, KEY, judge)
    results.content["checks"] = checks | {"bench": measured}
    results.write()
    for name, outcome in results.content["checks"].items():
        print(f"{name}: {outcome['status']}", *outcome.get("failures", [])[:20], sep="\n  ")
    print(path)
    sys.exit(any(not outcome["status"].startswith("passed") for outcome in results.content["checks"].values()))


if __name__ == "__main__":
    main()
