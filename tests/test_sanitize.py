"""The sanitizers that tests/sanitize.py runs: each kind of fault in a kernel ends the process."""

import subprocess
import sys
from pathlib import Path

import pytest
import sanitize

CODE = """
import os, sys, torch
torch.ops.load_library(sys.argv[1])
for fault in range(8):
    process = os.fork()
    if not process:
        torch.ops.fastshap_faults.faulty(torch.arange(32.0), fault)
        os._exit(0)
    print(fault, os.waitpid(process, 0)[1] == 0, flush=True)
"""
REPORTS = ("out of bounds", "heap-buffer-overflow", "misaligned address", "shift exponent", "null pointer")


@pytest.mark.slow
def test_planted_faults_are_found(monkeypatch, tmp_path):
    monkeypatch.setattr(sanitize, "OUTPUT", tmp_path)
    library = sanitize.build("faults", Path(__file__).parent / "emulation" / "faults.cu")
    command = [sys.executable, "-c", CODE, str(library)]
    process = subprocess.run(command, env=sanitize.environment(), capture_output=True, text=True, check=True)
    ended_well = dict(line.split() for line in process.stdout.splitlines())
    assert ended_well == {str(fault): str(fault == 0) for fault in range(8)}
    for report in (*REPORTS, "signed integer overflow"):
        assert report in process.stderr
