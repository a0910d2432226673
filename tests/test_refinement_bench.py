"""The benchmark of refined explanations: its figures, on a model whose exact values are few."""

import json

import pytest
import timm
import torch

import fastshap_vision as fv
from bench import refinement
from bench.tables import refinement_table


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = fv.convert(timm.create_model("test_vit", num_classes=10, img_size=48)).eval()
    torch.nn.init.normal_(model.head.shares.weight, std=0.05)
    model.calibrate(torch.randn(8, 3, 48, 48))
    return model


def test_more_evaluations_are_better(model):
    rows = refinement.measure(model, torch.randn(4, 3, 48, 48))
    assert [row["evaluations"] for row in rows] == list(refinement.EVALUATIONS)
    assert rows[0]["r2"] < rows[2]["r2"] < rows[-1]["r2"] <= 1
    assert all(0.7 <= row["coverage"] <= 1 for row in rows)
    assert rows[0]["kernel_shap_r2"] is rows[0]["rank_correlation"] is None
    assert rows[-1]["kernel_shap_r2"] > 0.99
    assert rows[-1]["rank_correlation"] > rows[1]["rank_correlation"]


def test_rows_are_written_and_shown(model, tmp_path, monkeypatch):
    path = tmp_path / "refinement.json"
    monkeypatch.setattr(refinement, "explained", lambda kind, seed, epochs: model)
    monkeypatch.setattr(refinement, "EVALUATIONS", (0, 16))
    monkeypatch.setattr(refinement.fv, "load_dataset", lambda *_: [(torch.randn(3, 48, 48), 0) for _ in range(3)])
    monkeypatch.setattr("sys.argv", ["refinement", "--networks", "vit", "--images", "3", "--output", str(path)])
    refinement.main()
    results = json.loads(path.read_text())
    found = [(row["network"], row["evaluations"], row["images"]) for row in results["rows"]]
    assert found == [("vit", 0, 3), ("vit", 16, 3)]
    assert results["processor"]["model"]
    assert "| ViT | 16 |" in refinement_table(results)
