"""bench.gpu on the processor, at small shapes, so that it holds when a device comes."""

import json
import subprocess
import sys

import pytest

from bench import tables
from bench.lib.machine import ROOT


def measure(path, *options):
    command = [sys.executable, "-m", "bench.gpu", "--device", "cpu", "--tiny", "--output", path, *options]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "here.json"
    path.write_text(json.dumps({"checks": {"build": {"status": "passed"}}}))
    process = measure(path, "--only", "packed_attention", "--only", "sample_coalitions")
    return path, process, json.loads(path.read_text())


def test_the_header_says_where_and_how(measured):
    _, _, content = measured
    for name in ("device", "processor", "threads", "torch", "triton", "commit", "date", "method", "ceilings", "bars"):
        assert name in content
    assert content["checks"] == {"build": {"status": "passed"}}


def test_every_provider_has_a_row_in_every_mode(measured):
    _, process, content = measured
    assert process.returncode == 0, process.stderr
    rows = [row for row in content["rows"] if row["op"] == "packed_attention"]
    assert {row["mode"] for row in rows} == {"forward", "backward", "both"}
    assert {row["backend"] for row in rows} == {"cpu", "reference", "varlen_attn", "masked SDPA"}
    for row in rows:
        if row["backend"] == "varlen_attn":  # on GPUs only
            assert "Error" in row["error"]
            continue
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"]
        assert row["tflop_s"] > 0
        assert row["of_ceiling"] > 0
        assert row["backend"] == "masked SDPA" or row["max_error"] < 0.02
    sampled = [row for row in content["rows"] if row["op"] == "sample_coalitions" and row["backend"] == "cpu"]
    assert [row["max_error"] for row in sampled] == [0.0, 0.0]


def test_promises_are_held_against_the_worst_row(measured):
    _, _, content = measured
    ratios = {}
    for row in content["rows"]:
        if row["op"] == "packed_attention" and row["mode"] == "forward" and "ms_p50" in row:
            ratios.setdefault(row["shape"], {})[row["backend"]] = row["ms_p50"]
    worst = min(times["masked SDPA"] / times["cpu"] for times in ratios.values())
    promise = "packed_attention, forward: times as fast as masked SDPA"
    (bar,) = [bar for bar in content["bars"] if bar["what"] == promise]
    assert bar["measured"] == worst
    assert bar["met"] == (worst >= 2.2)


def test_one_op_is_measured_anew_and_no_row_lost(measured):
    path, _, content = measured
    path.write_text(json.dumps(content))
    again = measure(path, "--only", "sample_coalitions")
    assert again.returncode == 0, again.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == len(content["rows"])
    kept = [row for row in rows if row["op"] != "sample_coalitions"]
    assert kept == [row for row in content["rows"] if row["op"] != "sample_coalitions"]


def test_the_readme_has_a_table_of_it(measured):
    _, _, content = measured
    text = tables.gpu_table(content)
    assert "| packed_attention, forward: times as fast as masked SDPA | at least 2.2 |" in text
    assert "masked SDPA" in text
    assert tables.gpu_table(None).startswith("No GPU has run these kernels yet")


def test_what_is_left_out_for_want_of_time_is_said(tmp_path):
    path = tmp_path / "here.json"
    process = measure(path, "--only", "sample_coalitions", "--until", "0")
    assert process.returncode == 1
    content = json.loads(path.read_text())
    assert content["rows"] == []
    assert all(line.endswith("no time was left") for line in content["left_out"])
