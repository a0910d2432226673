"""make fuzz: thousands of configurations against float64, and of malformed calls, counted in a results file.

Each backend has worker processes of its own, which write a line for every case. A worker that dies is a crash of the
case it had begun; another one goes on after it.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Share of the configurations that each backend gets: interpreted and emulated kernels take longer.
SHARES = {"cpu": 0.6, "cuda": 0.2, "triton": 0.2}
GOOD = ("accurate", "refused", "served")


def work(kind: str, backend: str, seed: int, first: int, count: int) -> None:
    """Runs cases and prints a line before and after each."""
    import differential
    import malformed

    from fastshap_kernels import _backend

    if _backend.INTERPRETED:
        import triton_interpreter

        triton_interpreter.install()
    for number in range(first, first + count):
        print(json.dumps({"begun": number}), flush=True)
        if kind == "differential":
            name, ended, said = differential.run_one(seed, number, backend)
        elif kind == "vision":
            import vision_calls

            name, ended, _, said = malformed.run_one(seed, number, vision_calls.CALLS)
        else:
            name, ended, _, said = malformed.run_one(seed, number)
        print(json.dumps({"number": number, "name": name, "ended": ended, "said": said[:500]}), flush=True)


def environment(kind: str, backend: str) -> dict[str, str]:
    """The variables with which a process has the backend's kernels on CPU tensors.

    Malformed calls name a backend or leave it to the op: named for all, it would refuse ops that have no such kernels.
    """
    variables = {"OMP_NUM_THREADS": "1"} | ({"FASTSHAP_BACKEND": backend} if kind == "differential" else {})
    folders = [ROOT, ROOT / "python", ROOT / "tests", HERE]
    variables["PYTHONPATH"] = os.pathsep.join(str(folder) for folder in folders)
    if backend == "triton":
        variables["TRITON_INTERPRET"] = "1"
    if backend == "cuda":
        variables["FASTSHAP_EMULATE_CUDA"] = str(ROOT / "build" / "_C_cuda_emulated.so")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSHAP_")}
    return inherited | variables


def run(kind: str, backend: str, seed: int, count: int) -> tuple[Counter, list[dict]]:
    """How the cases ended, by function, and the faults. Configurations that a backend has not are not counted."""
    ends: Counter = Counter()
    faults: list[dict] = []
    number = counted = 0
    while counted < count:
        command = [sys.executable, __file__, "--worker", kind, backend, str(seed), str(number), str(count - counted)]
        process = subprocess.Popen(command, env=environment(kind, backend), stdout=subprocess.PIPE, text=True)
        begun = None
        for line in process.stdout:
            case = json.loads(line)
            if "begun" in case:
                begun = case["begun"]
                continue
            number, begun = case["number"] + 1, None
            counted += case["ended"] != "not served"
            ends[case["name"], case["ended"]] += 1
            if case["ended"] not in (*GOOD, "not served"):
                faults.append(case)
                print(kind, backend, case, flush=True)
        if process.wait() != 0:
            if begun is None:
                raise RuntimeError(f"a worker of {kind} {backend} does not start")
            faults.append({"number": begun, "name": "?", "ended": "crash", "said": f"exit code {process.returncode}"})
            ends["?", "crash"] += 1
            print(kind, backend, faults[-1], flush=True)
            number, counted = begun + 1, counted + 1
    return ends, faults


def processor() -> dict[str, str]:
    """What the figures belong to."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return {
        "vendor": fields.get("vendor_id", platform.machine()),
        "model": fields.get("model name", platform.processor()),
        "instruction sets": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--differential", type=int, default=6000, help="configurations, over all backends")
    parser.add_argument("--malformed", type=int, default=20000, help="malformed calls of the ops")
    parser.add_argument("--vision", type=int, default=0, help="malformed calls of fastshap_vision")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder of the results, default bench/results/fuzz")
    given = parser.parse_args()
    started = time.time()
    tasks = {f"differential {name}": round(share * given.differential) for name, share in SHARES.items()}
    tasks |= {"malformed cpu": given.malformed, "vision cpu": given.vision}
    report: dict = {"processor": processor(), "seed": given.seed, "cases": {}, "faults": []}
    for task, count in tasks.items():
        kind, backend = task.split()
        ends, faults = run(kind, backend, given.seed, count) if count else (Counter(), [])
        totals: Counter = Counter()
        for (_, ended), times in ends.items():
            totals[ended] += times
        report["cases"][task] = dict(sorted(totals.items()))
        report["faults"] += [{"task": task} | fault for fault in faults]
        print(task, dict(totals), f"{time.time() - started:.0f} s", flush=True)
    report["seconds"] = round(time.time() - started)
    folder = given.output or ROOT / "bench" / "results" / "fuzz"
    folder.mkdir(parents=True, exist_ok=True)
    name = "-".join(report["processor"]["model"].lower().replace("(r)", "").split()) or "processor"
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{len(report['faults'])} faults, written to {path}")
    sys.exit(bool(report["faults"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3], *map(int, sys.argv[4:]))
    else:
        main()
