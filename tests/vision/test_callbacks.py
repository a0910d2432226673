"""What a run tells those who watch it."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.tracking import GeneralTracker
from test_training import assert_same_weights, timeless
from torch.utils.data import TensorDataset

import fastshap_vision as fv
from fastshap_vision._runtime import progress
from fastshap_vision.training import tracking

BATCH, IMAGES, EPOCHS = 4, 14, 2
SPEEDS = {"images_per_second", "coalitions_per_second", "data_wait", "peak_memory_gb"}


def classifier():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))


def data():
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(IMAGES, 3, 2, 2, generator=generator), torch.arange(IMAGES) % 3)


def fit(model=None, **options):
    given = {"objective": fv.TaskObjective(), "epochs": EPOCHS, "batch_size": BATCH, "progress": False}
    return fv.fit(model or classifier(), data(), data(), **(given | options))


class Recorder(fv.Callback):
    def __init__(self):
        self.heard = []

    def on_start(self, start):
        self.heard.append(("start", start.settings["epochs"], start.output, start.is_main))

    def on_step(self, report):
        self.heard.append(("step", report))

    def on_log(self, step, figures):
        self.heard.append(("log", step, dict(figures)))

    def on_evaluate(self, found):
        self.heard.append(("evaluate", dict(found)))

    def on_epoch(self, row):
        self.heard.append(("epoch", dict(row)))

    def on_end(self):
        self.heard.append(("end",))

    def of(self, kind):
        return [rest for name, *rest in self.heard if name == kind]


def test_callbacks_hear_everything_in_order():
    recorder = Recorder()
    result = fit(callbacks=[recorder], log_interval=2)
    kinds = [kind for kind, *_ in recorder.heard]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert recorder.of("start") == [[EPOCHS, None, True]]
    assert [row for (row,) in recorder.of("epoch")] == result.history
    assert [found["eval_accuracy"] for (found,) in recorder.of("evaluate")] == [
        row["eval_accuracy"] for row in result.history
    ]
    reports = [report for (report,) in recorder.of("step")]
    assert [(report.epoch, report.step, report.steps) for report in reports] == [
        *((1, step, 6) for step in (1, 2, 3)),
        *((2, step, 6) for step in (4, 5, 6)),
    ]
    losses = [float(report.terms["loss"]) for report in reports]
    assert sum(losses[:3]) / 3 == pytest.approx(result.history[0]["loss"])
    norms = [float(report.grad_norm) for report in reports]
    assert sum(norms[3:]) / 3 == pytest.approx(result.history[1]["grad_norm"])
    assert [step for step, _ in recorder.of("log")] == [2, 3, 5, 6]
    for _, figures in recorder.of("log"):
        assert {"epoch", "loss", "task", "lr", "grad_norm", "seconds_left"} | SPEEDS - {"coalitions_per_second"} == set(
            figures
        )
    assert recorder.of("log")[0][1]["loss"] == pytest.approx(sum(losses[:2]) / 2)
    assert recorder.of("log")[-1][1]["epoch"] == EPOCHS
    assert recorder.of("log")[-1][1]["seconds_left"] == 0


def test_watching_changes_nothing(tmp_path):
    plain, watched = classifier(), classifier()
    first = fit(plain, clip_grad=1.0)
    second = fit(watched, clip_grad=1.0, callbacks=[Recorder()], log_interval=1)
    assert_same_weights(plain, watched)
    assert timeless(first.history) == timeless(second.history)


@pytest.mark.parametrize("clip_grad", [None, 0.1])
def test_the_gradients_norm_is_that_before_clipping(clip_grad):
    recorder = Recorder()
    model = classifier()
    torch.manual_seed(0)
    fit(model, callbacks=[recorder], epochs=1, batch_size=IMAGES, clip_grad=clip_grad)
    (report,) = (report for (report,) in recorder.of("step"))
    anew = classifier()
    images, labels = data().tensors
    torch.nn.functional.cross_entropy(anew(images), labels).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in anew.parameters()]).norm()
    torch.testing.assert_close(report.grad_norm, expected)


def test_a_run_that_fails_ends_its_callbacks():
    recorder = Recorder()
    broken = TensorDataset(torch.full((8, 3, 2, 2), torch.inf), torch.zeros(8, dtype=torch.int64))
    with pytest.raises(fv.TrainingError, match="in epoch 1, step 1"):
        fv.fit(classifier(), broken, objective=fv.TaskObjective(), epochs=1, batch_size=4, callbacks=[recorder])
    assert [kind for kind, *_ in recorder.heard][-1] == "end"


def test_a_callback_that_fails_after_an_epoch_loses_none(tmp_path):
    class Failing(fv.Callback):
        def on_epoch(self, row):
            raise OSError("the tracker's server is gone")

    with pytest.raises(OSError, match="server is gone"):
        fit(output=tmp_path, callbacks=[Failing()])
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["epoch_0001"]


def test_coalitions_a_second_and_the_summary(tmp_path):
    torch.manual_seed(0)
    arguments = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = fv.SelfExplainingClassifier("vit_tiny_patch16_224", 10, img_size=8, model_kwargs=arguments)
    digits = torch.utils.data.Subset(fv.load_dataset("digits", "train"), range(16))
    options = {"epochs": 1, "batch_size": 8, "progress": False}
    row = fv.fit(model, digits, objective=fv.JointObjective(4), output=tmp_path, **options).history[0]
    assert row["coalitions_per_second"] == pytest.approx(4 * row["images_per_second"])
    assert 0 < row["data_wait"] < 1
    assert 0.05 < row["peak_memory_gb"] < 100
    header = (tmp_path / "summary.csv").read_text().splitlines()[0].split(",")
    assert SPEEDS | {"grad_norm"} < set(header)
    recorded = fv.record_coalitions(model, digits, 6, progress=False)
    row = fv.fit(model, recorded, objective=fv.ExplainerObjective(), **options).history[0]
    assert row["coalitions_per_second"] == pytest.approx(6 * row["images_per_second"])


class MemoryTracker(GeneralTracker):
    name, requires_logging_directory = "memory", False

    def __init__(self):
        super().__init__()
        self.config, self.logged, self.finished = None, [], 0

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step, **_):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_accelerates_trackers_are_logged_to():
    tracker = MemoryTracker()
    result = fit(log_with=tracker, log_interval=2)
    assert tracker.config["batch_size"] == BATCH
    assert tracker.config["clip_grad"] == "None"  # which not every tracker takes
    assert tracker.finished == 1
    epochs = [values for _, values in tracker.logged if "epoch/loss" in values]
    assert [values["epoch/eval_accuracy"] for values in epochs] == [row["eval_accuracy"] for row in result.history]
    assert "epoch/eval_value_r2" not in epochs[0]
    assert [step for step, values in tracker.logged if "train/loss" in values] == [2, 3, 5, 6]


def test_tensorboard_writes_into_the_runs_folder(tmp_path):
    pytest.importorskip("tensorboard")
    fit(log_with=["tensorboard"], output=tmp_path / "run")
    assert list((tmp_path / "run" / "logs" / "run").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"log_with": "tensorbored"},
            ValueError,
            "`log_with` must be .*tensorboard, .* but it is 'tensorbored'",
        ),
        ({"log_with": ["wandb"]}, ModuleNotFoundError, "the tracker 'wandb' needs a package .* pip install wandb"),
        ({"log_with": "tensorboard"}, ValueError, "TensorBoard's files need a folder. Pass `output`"),
        ({"callbacks": [print]}, ValueError, "argument `callbacks` must be a list of fv.Callback objects"),
        ({"callbacks": fv.Callback()}, ValueError, "argument `callbacks` must be a list of fv.Callback objects"),
        ({"log_interval": 0}, ValueError, "argument `log_interval` must be"),
        ({"callbacks": [fv.ProfilerCallback()]}, ValueError, "ProfilerCallback writes into the run's folder"),
    ],
)
def test_wrong_arguments(options, error, message, monkeypatch):
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(error, match=message):
        fit(**options)


def test_the_profiler_writes_a_trace_of_some_steps(tmp_path):
    fit(callbacks=[fv.ProfilerCallback(wait=1, warmup=1, active=2)], output=tmp_path)
    (trace,) = (tmp_path / "profile").glob("*.pt.trace.json")
    names = [event.get("name", "") for event in json.loads(trace.read_text())["traceEvents"]]
    assert sum(name.startswith("ProfilerStep#") for name in names) >= 2
    assert "aten::addmm" in names


def test_bars_show_in_notebooks(monkeypatch):
    """Whose output is no terminal."""
    assert progress.progress_bar(None, total=3).disable
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: None)
    with progress.progress_bar(None, total=3) as bar:
        assert not bar.disable
    assert progress.progress_bar(False, total=3).disable
    made = []
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setitem(sys.modules, "tqdm.notebook", SimpleNamespace(tqdm=lambda **options: made.append(options)))
    progress.progress_bar(None, total=3)
    assert made == [{"disable": False, "total": 3}]
