"""The examples on little data, and the demo cut short: they do all that they do in full."""

import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest

from bench.lib.machine import ROOT
from bench.lib.results import read

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
LINES = 40


def main_of(name):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["main"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_fits_a_screen(path):
    assert len(path.read_text().splitlines()) < LINES


def test_explain_a_trained_model(tmp_path):
    mpl.use("Agg")
    picture = tmp_path / "explanation.png"
    found = main_of("explain_a_trained_model")(epochs=1, images=64, picture=str(picture))
    assert found.efficiency_gap <= 1e-5
    assert picture.stat().st_size > 5_000


def test_train_together():
    assert 0 <= main_of("train_together")(epochs=1, images=64).accuracy <= 100


def test_own_loop():
    tasks = main_of("own_loop")(epochs=12, images=128)
    assert len(tasks) == 24
    assert tasks[-1] < tasks[0]


def test_op_alone():
    assert main_of("op_alone")(batch=8, players=16, steps=300) < 0.1


@pytest.mark.parametrize("wrong", [("--epochs", "0"), ("--images", "0"), ("--images", "361"), ("--images", "-1")])
def test_wrong_numbers_are_refused_at_once(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--output", str(tmp_path / "demo"), *wrong])
    monkeypatch.delitem(sys.modules, "bench.digits", raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("bench.digits", run_name="__main__")
    assert stopped.value.code == 2
    assert "--epochs must be at least 1, and --images from 1 to 360" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_the_demo(tmp_path):
    command = [sys.executable, "-W", "error", "-m", "bench.digits", "--epochs", "2", "--images", "1"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    models = read(Path(tmp_path) / "report.json")["models"]
    assert set(models) == {"vit", "cnn"}
    promised = ("accuracy", "plain_accuracy", "r2_exact", "correlation", "seconds_training", "ms_per_explanation")
    for figures in models.values():
        assert set(promised) | {"device", "versions"} <= set(figures)
        assert figures["efficiency_gap"] <= 1e-5
    assert (tmp_path / "explanations.png").stat().st_size > 10_000
