"""How many pictures a core reads is measured as docs/scale.md says."""

import json
import sys

from bench import loader


def test_rows_are_measured_and_written(tmp_path, monkeypatch):
    path = tmp_path / "loader.json"
    monkeypatch.setattr(sys, "argv", ["loader", "--images", "4", "--turns", "1", "--output", str(path)])
    loader.main()
    results = json.loads(path.read_text())
    assert results["processor"]["instruction_sets"]
    rows = {(row["preprocessing"], row["way"]): row for row in results["rows"]}
    assert len(rows) == 6
    for (_, way), row in rows.items():
        assert row["met"] == (row["images_s"] >= loader.LEAST)
        assert (row["pixels_that_differ"] > 0) == (way == "torch")
        assert row["most_levels"] <= 2
