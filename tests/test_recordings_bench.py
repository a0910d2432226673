"""The benchmark of recordings: every part runs, and its rows are shown."""

import json

import pytest

from bench import recordings
from bench.scale import disk_table, imagenet_table, kept_table


@pytest.fixture
def written(tmp_path, monkeypatch):
    def run(*arguments):
        words = ["recordings", *arguments, "--work", str(tmp_path), "--output", str(tmp_path / "recordings.json")]
        monkeypatch.setattr("sys.argv", words)
        recordings.main()
        return json.loads((tmp_path / "recordings.json").read_text())

    return run


@pytest.mark.slow
def test_what_is_kept_is_compared(written, monkeypatch):
    quick = {"epochs": 1, "batch_size": 64}
    monkeypatch.setattr(recordings.digits, "TRAINING", quick)
    monkeypatch.setattr(recordings, "KEPT", {name: recordings.KEPT[name] for name in ("float32", "float16")})
    monkeypatch.setattr(recordings.fv.recipe, "TRAINING", recordings.fv.recipe.TRAINING | {"epochs": 1})
    monkeypatch.setattr(recordings, "TESTED", 2)
    found = written("--parts", "kept", "--networks", "vit")
    wide, half = found["rows"]
    assert wide["bytes_an_image"] == pytest.approx(64 * (4 + 10 * 4), rel=0.02)
    assert half["bytes_an_image"] == pytest.approx(64 * (4 + 10 * 2), rel=0.02)
    assert half["r2"] == pytest.approx(wide["r2"], abs=0.002)
    assert "| digits, ViT | float16 | " in kept_table(found)


def test_simulated_recordings_are_measured(written, monkeypatch):
    monkeypatch.setattr(recordings, "BATCHES", 2)
    monkeypatch.setattr(recordings, "SECONDS", 2.0)
    found = written("--parts", "memory", "--images", "200")
    recorded, trained = found["rows"]
    assert recorded["files_gb"] == pytest.approx(200 * 64 * (2000 + 4) / 1e9, abs=0.01)
    assert trained["ratio"] > 0
    assert "| recording 200 images" in disk_table(found)
    steps = [{"device": "one", "kind": "cuda", "rows": [], "date": ""}]
    row = {"model": "ViT", "image_size": 224, "mode": "value", "way": "packed", "dtype": "float32"}
    steps[0]["rows"] = [row | {"batch": 4, "coalitions": 8, "ms_p50": 32.0}]
    table = imagenet_table(steps, found)
    assert "1,000 coalitions/s | 22.8 h | 2.8 h | 0.4 h" in table
    assert "not measured" not in table


@pytest.mark.slow
def test_processes_are_compared(written):
    row = written("--parts", "processes", "--turns", "1")["rows"][0]
    assert row["equal_digests"]
    assert row["ratio"] > 0.5
