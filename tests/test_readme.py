"""The README's code runs as printed, and its tables are those of the results."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

ROOT = Path(__file__).parent.parent


def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # the README's own code
    assert names["explanation"].values.shape == (4, 16)
    assert names["features"].grad.shape == (8, 196, 384)
    assert names["values"].shape == (4, 1000, 10)


def test_tables_match_the_results():
    command = [sys.executable, ROOT / "bench" / "tables.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
