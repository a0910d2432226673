"""The model of the best epoch is kept beside that of the last."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import TensorDataset

import fastshap_vision as fv
from fastshap_vision.cli.main import main
from fastshap_vision.training.export import BestModel
from fastshap_vision.training.run import TrainingRun


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(8, 12, generator=generator), torch.arange(8) % 3)


def train(folder, monkeypatch, metric, values, resume=None, **options):
    """A run whose evaluations find these values."""
    found = iter(values)
    monkeypatch.setattr(TrainingRun, "evaluate", lambda *_: {metric: next(found)})
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 3))
    given = {"epochs": 4, "batch_size": 4, "progress": False, "checkpoint_hist": 9, "keep_best": metric} | options
    return fv.fit(model, data(), data(), objective=fv.TaskObjective(), output=folder, resume=resume, **given)


def best_of(folder):
    return json.loads((folder / "best" / "epoch.json").read_text())


def assert_model_of_epoch(folder, epoch):
    kept = load_file(folder / "best" / "model.safetensors")
    expected = load_file(folder / "checkpoints" / f"epoch_{epoch:04d}" / "model.safetensors")
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(
    ("metric", "values", "epoch"),
    [
        ("eval_accuracy", [50.0, 70.0, 70.0, 60.0], 2),
        ("eval_loss", [3.0, 2.0, 1.0, 1.5], 3),
        ("eval_accuracy", [50.0, 51.0, 52.0, 53.0], 4),
    ],
)
def test_the_best_epochs_model_is_kept(tmp_path, monkeypatch, metric, values, epoch):
    train(tmp_path, monkeypatch, metric, values)
    assert best_of(tmp_path) == {"epoch": epoch, metric: values[epoch - 1]}
    assert_model_of_epoch(tmp_path, epoch)
    last = load_file(tmp_path / "model.safetensors")
    kept = load_file(tmp_path / "best" / "model.safetensors")
    assert all(torch.equal(last[name], kept[name]) for name in last) == (epoch == 4)


def test_a_best_model_of_another_run_or_metric_is_replaced(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, "eval_accuracy", [90.0], epochs=1)
    shutil.rmtree(tmp_path / "checkpoints")
    train(tmp_path, monkeypatch, "eval_accuracy", [50.0, 40.0], epochs=2)
    assert best_of(tmp_path) == {"epoch": 1, "eval_accuracy": 50.0}
    assert_model_of_epoch(tmp_path, 1)
    row = {"epoch": 3, "eval_accuracy": 10.0, "eval_loss": 2.0}
    BestModel(tmp_path, "eval_loss").write(torch.nn.Linear(1, 1), [row])
    assert best_of(tmp_path) == {"epoch": 3, "eval_loss": 2.0}


def test_a_resumed_run_remembers_the_best(tmp_path, monkeypatch):
    with pytest.raises(fv.TrainingError):  # the evaluations are at their end
        train_and_stop(tmp_path, monkeypatch, [70.0, 60.0])
    train(tmp_path, monkeypatch, "eval_accuracy", [65.0, 68.0], resume="auto")
    assert best_of(tmp_path) == {"epoch": 1, "eval_accuracy": 70.0}
    assert_model_of_epoch(tmp_path, 1)


def train_and_stop(folder, monkeypatch, values):
    def stopping():
        yield from values
        raise fv.TrainingError("enough")

    train(folder, monkeypatch, "eval_accuracy", stopping())


def test_a_run_that_goes_back_forgets_what_came_later(tmp_path, monkeypatch):
    train(tmp_path, monkeypatch, "eval_accuracy", [50.0, 60.0, 90.0, 80.0])
    back = tmp_path / "checkpoints" / "epoch_0002"
    train(tmp_path, monkeypatch, "eval_accuracy", [55.0, 58.0], resume=back)
    assert best_of(tmp_path) == {"epoch": 2, "eval_accuracy": 60.0}
    assert_model_of_epoch(tmp_path, 2)


def test_wrong_arguments(tmp_path):
    model, options = torch.nn.Linear(12, 3), {"objective": fv.TaskObjective(), "epochs": 1, "batch_size": 4}
    with pytest.raises(ValueError, match="argument `keep_best` needs a folder to write to"):
        fv.fit(model, data(), data(), keep_best="eval_loss", **options)
    with pytest.raises(ValueError, match="argument `keep_best` needs data to evaluate on"):
        fv.fit(model, data(), keep_best="eval_loss", output=tmp_path, **options)
    for metric in ("eval_value_r2", "accuracy"):
        with pytest.raises(ValueError, match="Argument `keep_best` must be one of 'eval_accuracy', 'eval_loss', None"):
            fv.fit(model, data(), data(), keep_best=metric, output=tmp_path, **options)


def test_what_a_long_run_shows_has_flags(tmp_path):
    pytest.importorskip("tensorboard")
    flags = ["--keep-best", "eval_loss", "--checkpoint-steps", "9", "--log-with", "tensorboard"]
    small = ["--batch-size", "128", "--coalitions", "2", "--model-kwargs", "depth=1", "embed_dim=16", "num_heads=2"]
    assert main(["train", "--output", str(tmp_path / "run"), "--epochs", "1", *flags, *small]) == 0
    assert best_of(tmp_path / "run")["epoch"] == 1
    assert (tmp_path / "run" / "checkpoints" / "epoch_0000_step_00000009").is_dir()
    assert list((tmp_path / "run" / "logs" / "run").glob("events.out.tfevents.*"))
