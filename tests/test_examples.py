"""The demo, cut short, does all that it does in full."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("wrong", [("--epochs", "0"), ("--images", "0"), ("--images", "361"), ("--images", "-1")])
def test_wrong_numbers_are_refused_at_once(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["digits.py", "--output", str(tmp_path / "demo"), *wrong])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "examples" / "digits.py"), run_name="__main__")
    assert stopped.value.code == 2
    assert "--epochs must be at least 1, and --images from 1 to 360" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_digits(tmp_path):
    command = [sys.executable, "-W", "error", ROOT / "examples" / "digits.py", "--epochs", "2", "--images", "1"]
    done = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert set(models) == {"vit", "cnn"}
    promised = ("accuracy", "plain_accuracy", "r2_exact", "correlation", "seconds_training", "ms_per_explanation")
    for figures in models.values():
        assert set(promised) | {"device", "versions"} <= set(figures)
        assert figures["efficiency_gap"] <= 1e-5
    assert (tmp_path / "explanations.png").stat().st_size > 10_000
