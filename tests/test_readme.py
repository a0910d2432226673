"""The README's code runs as printed, and its tables are those of the results."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl

from fastshap_vision.cli import main as cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 5
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # the README's own code
    assert names["explanation"].values.shape == (4, 16)
    assert names["features"].grad.shape == (8, 196, 384)
    assert names["values"].shape == (4, 1000, 10)


def test_tables_match_the_results():
    command = [sys.executable, "-m", "bench.tables", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_commands_are_those_of_the_command_line():
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) if "fastshap train" in block)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    assert [command[1] for command in commands] == ["train", "train-explainer", "explain", "evaluate"]
    for program, *arguments in commands:
        assert program == "fastshap"
        assert cli._parser().parse_args(arguments).name == arguments[0]
