"""The peak memory of a step on the processor, in a process that does nothing else.

python -m bench.step.memory '{"step": {"model": ...}, "way": "packed", ...}' prints the MB.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import torch

from bench.lib.machine import ROOT
from bench.lib.memory import peak_on_cpu
from bench.step.sets import Step
from bench.step.ways import make_call, make_setting


def peak_in_process(step: Step, way: str, backend: str) -> float:
    """Peak MB of a way, in a fresh process with the allocator as the system has it."""
    arguments = json.dumps({"step": dataclasses.asdict(step), "way": way, "backend": backend})
    command = [sys.executable, "-m", "bench.step.memory", arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"measuring memory failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return float(done.stdout)


def main() -> None:
    arguments = json.loads(sys.argv[1])
    setting = make_setting(Step(**arguments["step"]), torch.device("cpu"))
    call = make_call(arguments["way"], setting, arguments["backend"])
    print(peak_on_cpu(call, lambda: setting.model.zero_grad(set_to_none=True)))


if __name__ == "__main__":
    main()
