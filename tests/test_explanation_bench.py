"""What an explanation costs is measured as docs/results.md says."""

import json
import sys

import pytest

from bench import explanation, tables


def test_a_row_holds_time_and_parameters():
    row = explanation.measure("test_vit", seconds=0.1)
    assert row["time"] > 1
    assert 0 < row["parameters"] < 1
    assert row["width"] == 64
    assert row["met"] == (row["time"] <= explanation.MOST_TIME and row["parameters"] <= explanation.MOST_PARAMETERS)


def test_rows_are_written_beside_those_that_are_there(tmp_path, monkeypatch):
    path = tmp_path / "here.json"
    made = []

    def measured(name, seconds):
        made.append(name)
        return {"network": name, "width": 8, "time": 1.1, "parameters": 0.1}

    monkeypatch.setattr(explanation, "measure", measured)
    for name in ("resnet50", "efficientnet_lite0"):
        monkeypatch.setattr(sys, "argv", ["explanation", "--networks", name, "--output", str(path)])
        explanation.main()
    results = json.loads(path.read_text())
    assert [row["network"] for row in results["rows"]] == made == ["resnet50", "efficientnet_lite0"]
    assert results["processor"]["instruction_sets"]
    assert "`resnet50` | 8 | 1.10× | +10.0%" in tables.explanation_table([results])


def test_unknown_networks_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["explanation", "--networks", "resnet51"])
    with pytest.raises(SystemExit):
        explanation.main()
    assert "invalid choice: 'resnet51'" in capsys.readouterr().err
