"""What explaining many images costs is measured as docs/scale.md says."""

import json
import sys

from bench import offline


def test_rows_are_measured_and_written(tmp_path, monkeypatch):
    path = tmp_path / "offline.json"
    small = ["--networks", "test_vit", "--images", "6", "--batch-size", "4", "--turns", "1"]
    monkeypatch.setattr(sys, "argv", ["offline", *small, "--output", str(path)])
    offline.main()
    results = json.loads(path.read_text())
    (row,) = results["rows"]
    assert results["processor"]["instruction_sets"]
    assert (row["network"], row["images"], row["turns"]) == ("test_vit", 6, 1)
    assert row["met"] == (row["ratio"] >= offline.LEAST)
