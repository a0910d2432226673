import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional
from torch.utils.data import ChainDataset, DataLoader, Subset, TensorDataset

from fastshap_vision import JointObjective, Objective, SelfExplainingClassifier, TaskObjective, convert, load_dataset
from fastshap_vision.training.evaluate import evaluate
from fastshap_vision.training.fit import fit
from fastshap_vision.training.monitor import TrainingError, check_not_lost
from fastshap_vision.training.state import CheckpointError


class NoisyNet(nn.Module):
    """A classifier that draws random numbers and keeps running statistics while it trains."""

    num_classes = 3

    def __init__(self, hidden=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(16, hidden), nn.BatchNorm1d(hidden, momentum=0.5), nn.Dropout(0.2)
        )
        self.head = nn.Linear(hidden, 3)

    def forward(self, images):
        return self.head(self.layers(images))


class CountingObjective(Objective):
    """Cross-entropy with a counter in its state that moves the loss, and an optional event at one call."""

    def __init__(self, at=None, event=None, spread=lambda progress: 1.0):
        self.counter = 0
        self.calls = 0
        self.at, self.event = at, event
        self.spread = spread
        self.progresses = []

    def state_dict(self):
        return {"counter": self.counter}

    def load_state_dict(self, state):
        self.counter = state["counter"]

    def __call__(self, model, images, labels, *, progress=1.0):
        self.progresses.append(progress)
        if self.calls == self.at:
            self.event()
        self.calls += 1
        self.counter += 1
        task = functional.cross_entropy(model(images), labels)
        return SimpleNamespace(
            loss=task * (1 + 0.01 * self.counter),
            task=task.detach(),
            regression=None,
            value_r2=torch.tensor(0.5),
            spread=torch.tensor(self.spread(progress)),
        )


def blobs(count=40):
    """Noisy copies of one picture a class."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randn(3, 1, 4, 4, generator=generator)
    labels = torch.arange(count) % 3
    return TensorDataset(2 * pictures[labels] + torch.randn(count, 1, 4, 4, generator=generator), labels)


def train(output=None, objective=None, model=None, data=None, **options):
    """Four epochs of five steps."""
    model = NoisyNet() if model is None else model
    objective = CountingObjective() if objective is None else objective
    arguments = {"epochs": 4, "batch_size": 8, "lr": 0.01, "clip_grad": 1.0, "progress": False} | options
    data = blobs() if data is None else data
    return model, fit(model, data, blobs(24), objective=objective, output=output, **arguments)


def interrupt():
    raise KeyboardInterrupt


def timeless(history):
    """Without what depends on the machine."""
    of_machine = {"images_per_second", "coalitions_per_second", "data_wait", "peak_memory_gb", "seconds"}
    return [{name: value for name, value in row.items() if name not in of_machine} for row in history]


def assert_same_weights(model, other):
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, expected), name


def rows_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder of a run of one epoch. Copy it before changing it."""
    folder = tmp_path_factory.mktemp("short") / "run"
    train(folder, epochs=1)
    return folder


@pytest.fixture
def run_copy(short_run, tmp_path):
    return Path(shutil.copytree(short_run, tmp_path / "run"))


def test_fit_learns_and_logs(tmp_path):
    model, result = train(tmp_path / "run", lr=0.05, warmup_epochs=1)
    assert result.accuracy == result.history[-1]["eval_accuracy"] > 80
    assert result.best_accuracy == max(row["eval_accuracy"] for row in result.history)
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert result.history[0]["regression"] is None
    assert result.history[0]["value_r2"] == 0.5
    assert result.seconds == sum(row["seconds"] for row in result.history) > 0
    assert result.checkpoint == tmp_path / "run" / "checkpoints" / "epoch_0004"
    rows = rows_of(tmp_path / "run" / "summary.csv")
    assert [row["epoch"] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in result.history]
    assert rows[0]["regression"] == ""
    weights = load_file(tmp_path / "run" / "model.safetensors")
    for name, value in model.state_dict().items():
        assert torch.equal(weights[name], value), name


@pytest.mark.parametrize("name", ["train_data", "eval_data"])
def test_images_of_another_size_than_the_only_one_are_named(name):
    """Before the first step, in the words of fit and not of timm."""
    size = {"img_size": 8, "patch_size": 4, "in_chans": 1, "embed_dim": 8, "depth": 1, "num_heads": 1}
    model = convert(timm.create_model("vit_tiny_patch16_224", num_classes=2, **size))
    data = {of: [(torch.zeros(1, 8, 8), 0)] * 4 for of in ("train_data", "eval_data")}
    data[name] = [(torch.zeros(1, 4, 4), 0)] * 4
    with pytest.raises(ValueError, match=rf"`{name}` must be of images \(1, 8, 8\).*\(1, 4, 4\).*img_size"):
        fit(model, **data, objective=TaskObjective(), epochs=1, batch_size=4)


def test_fit_follows_the_schedule_of_each_update():
    objective = CountingObjective()
    _, result = train(objective=objective, epochs=2)
    assert objective.progresses == [step / 10 for step in range(10)]
    # timm's cosine from 0.01 to 0 over ten updates; a row holds the rate of its last update.
    expected = [0.005 * (1 + torch.cos(torch.tensor(torch.pi * step / 10)).item()) for step in (4, 9)]
    assert [row["lr"] for row in result.history] == pytest.approx(expected, rel=1e-6)


def test_fit_is_reproducible_and_seed_matters():
    first, result = train(seed=3)
    second, again = train(seed=3)
    other, _ = train(seed=4)
    assert timeless(result.history) == timeless(again.history)
    assert_same_weights(first, second)
    assert not torch.equal(first.layers[1].weight, other.layers[1].weight)


def test_evaluation_leaves_no_trace_in_the_training():
    model = NoisyNet()
    fit(model, blobs(), objective=CountingObjective(), epochs=4, batch_size=8, lr=0.01, clip_grad=1.0, progress=False)
    assert_same_weights(model, train()[0])


@pytest.mark.parametrize("workers", [0, 1])
def test_resumed_run_ends_in_the_same_bits(tmp_path, workers):
    expected, unbroken = train(workers=workers)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), workers=workers)
    assert len(rows_of(tmp_path / "summary.csv")) == 2
    torch.manual_seed(123)
    objective = CountingObjective()
    resumed, result = train(tmp_path, objective, workers=workers, resume="auto")
    assert objective.calls == 10
    assert objective.counter == 20
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)
    assert len(rows_of(tmp_path / "summary.csv")) == 4


@pytest.mark.parametrize(("head", "opt"), [("shares", "adamw"), ("shares", "muon"), ("votes", "adamw")])
def test_resumed_self_explaining_run_ends_in_the_same_bits(tmp_path, head, opt):
    class Interrupted(JointObjective):
        def __call__(self, model, images, labels, *, progress=1.0):
            if progress > 0.6:
                raise KeyboardInterrupt
            return super().__call__(model, images, labels, progress=progress)

    def run(kind=JointObjective, **options):
        torch.manual_seed(0)
        arguments = {"patch_size": 4, "in_chans": 1, "embed_dim": 16, "depth": 1, "num_heads": 2}
        model = SelfExplainingClassifier("vit_tiny_patch16_224", 10, img_size=8, head=head, model_kwargs=arguments)
        objective = kind(coalitions=2, regression_ramp=(0.1, 0.8), masked_task_ramp=(0.1, 0.8))
        data = Subset(load_dataset("digits", "train", augment=True), range(24))
        result = fit(model, data, objective=objective, epochs=4, batch_size=8, opt=opt, progress=False, **options)
        return model, objective, result

    expected, objective, unbroken = run()
    with pytest.raises(KeyboardInterrupt):
        run(Interrupted, output=tmp_path)
    resumed, again, result = run(output=tmp_path, resume="auto")
    assert again.state_dict() == objective.state_dict()
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", {"patch_size": 2, "embed_dim": 16, "depth": 2, "num_heads": 2}),
        ("test_byobnet", {}),  # with batch norms
    ],
)
def test_without_gradient_from_the_regression_the_encoder_trains_as_if_alone(name, arguments):
    """To the last bit: accuracy minus the plain model's is 0 by construction."""

    def run(kind):
        torch.manual_seed(0)
        model = SelfExplainingClassifier(
            name,
            10,
            img_size=8 if arguments else 64,
            intermediates=True,
            model_kwargs={"in_chans": 1, **arguments},
        )
        digits = load_dataset("digits", "train", augment=True)
        data = (
            Subset(digits, range(24)) if arguments else TensorDataset(torch.randn(24, 1, 64, 64), torch.arange(24) % 10)
        )
        trained, objective = model, JointObjective(2, masked_task_weight=0.0)
        if kind == "plain":
            trained, objective = model.backbone, TaskObjective()
        result = fit(trained, data, objective=objective, epochs=3, batch_size=8, lr=0.01, clip_grad=0.1, progress=False)
        return model, result

    (plain, _), (explained, result) = run("plain"), run("self-explaining")
    assert result.history[-1]["regression"] > 0
    assert explained.head.shares.weight.abs().sum() > 0
    assert_same_weights(plain.backbone, explained.backbone)


def test_killed_run_resumes_to_the_same_bits(tmp_path):
    """SIGKILL in the middle of the third epoch; nothing in the process gets to clean up."""
    script = f"""
        import os, signal, sys
        sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
        import torch
        from test_training import CountingObjective, train
        torch.set_num_threads(1)
        train({str(tmp_path)!r}, CountingObjective(at=13, event=lambda: os.kill(os.getpid(), signal.SIGKILL)))
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed, result = train(tmp_path, resume="auto")
    expected, unbroken = train()
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)


def test_a_failed_save_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    rename = os.replace

    def replace(source, target):
        if str(target).endswith("epoch_0003"):
            raise OSError("disk full")
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(CheckpointError, match=r"disk full\. The checkpoint epoch_0002 is whole\..*resume='auto'"):
        train(tmp_path)
    monkeypatch.undo()
    resumed, _ = train(tmp_path, resume="auto")
    assert_same_weights(resumed, train()[0])
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["epoch_0003", "epoch_0004"]


def test_a_finished_run_resumes_to_its_result(tmp_path):
    _, result = train(tmp_path)
    model, again = train(tmp_path, resume="auto")
    assert again.history == result.history
    assert again.checkpoint == result.checkpoint
    assert_same_weights(model, train()[0])


def test_resume_from_a_path(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "first", CountingObjective(at=13, event=interrupt))
    resumed, _ = train(tmp_path / "second", resume=tmp_path / "first")
    from_checkpoint, _ = train(resume=tmp_path / "first" / "checkpoints" / "epoch_0002")
    assert_same_weights(resumed, from_checkpoint)
    with pytest.raises(CheckpointError, match=r"no checkpoint in .*nowhere.*resume=None"):
        train(resume=tmp_path / "nowhere")


def test_a_run_is_not_overwritten(short_run):
    with pytest.raises(CheckpointError, match=r"already holds a run.*resume='auto'"):
        train(short_run, epochs=1)


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors"])
def test_damaged_checkpoint_names_the_file(run_copy, name, damage):
    path = run_copy / "checkpoints" / "epoch_0001" / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "truncated" else content[:-1] + b"\x7f")
    with pytest.raises(CheckpointError, match=rf"{name}' is damaged.*Delete .*epoch_0001"):
        train(run_copy, epochs=1, resume="auto")


def test_damaged_record_names_the_file(run_copy):
    (run_copy / "checkpoints" / "epoch_0001" / "record.json").write_text('{"settings": ')
    with pytest.raises(CheckpointError, match=r"record.json' is damaged.*Delete"):
        train(run_copy, epochs=1, resume="auto")


def test_checkpoint_of_another_run_is_refused(short_run):
    with pytest.raises(CheckpointError, match=r"lr was 0.01 and is 0.02.*same settings"):
        train(short_run, epochs=1, lr=0.02, resume="auto")
    with pytest.raises(CheckpointError, match=r"does not fit this model"):
        train(short_run, epochs=1, model=NoisyNet(hidden=9), resume="auto")
    other = NoisyNet()
    other.layers.extend(nn.Identity() for _ in range(100))
    other.layers.extend(nn.LayerNorm(8) for _ in range(50))
    with pytest.raises(CheckpointError, match=r"does not fit this model.*Missing key.*another folder") as refused:
        train(short_run, epochs=1, model=other, resume="auto")
    assert len(str(refused.value)) < 1000
    record = json.loads((short_run / "checkpoints" / "epoch_0001" / "record.json").read_text())
    assert record["record"]["settings"]["images"] == 40


def test_nan_images_stop_the_run():
    data = blobs()
    data.tensors[0][7] = torch.nan
    with pytest.raises(TrainingError, match=r"images hold NaN or infinity in epoch 1, step [1-5]\."):
        train(data=data)


def test_non_finite_loss_names_epoch_and_step(tmp_path):
    class Exploding(CountingObjective):
        def __call__(self, model, images, labels, *, progress=1.0):
            terms = super().__call__(model, images, labels, progress=progress)
            if self.calls == 8:
                terms.loss = terms.loss * torch.inf
            return terms

    with pytest.raises(TrainingError, match=r"loss is inf in epoch 2, step 3\. Lower lr"):
        train(tmp_path, Exploding())
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch_0001"]
    train(tmp_path, resume="auto")


def test_collapsed_game_stops_the_run(tmp_path):
    def collapse(progress):
        return 2.0 if progress < 0.25 else 0.01

    message = r"collapsed in epoch 2.*0.01, against 2 before{}\. Lower .*regression_weight"
    chance = NoisyNet()
    nn.init.zeros_(chance.head.weight)
    with pytest.raises(TrainingError, match=message.format(", and accuracy is 33.3 %")):
        train(tmp_path, CountingObjective(spread=collapse), model=chance, lr=1e-12)
    # The third such epoch is the fourth; its checkpoint is not written.
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch_0002", "epoch_0003"]
    with pytest.raises(TrainingError, match=message.format("")):
        fit(NoisyNet(), blobs(), objective=CountingObjective(spread=collapse), epochs=4, batch_size=8)


def test_a_game_that_never_came_to_life_stops_the_run():
    with pytest.raises(TrainingError, match="collapsed in epoch 9"):
        fit(NoisyNet(), blobs(), objective=CountingObjective(spread=lambda progress: 1e-4), epochs=12, batch_size=8)


def test_no_game_collapsed_while_the_classifier_works_or_for_an_epoch():
    _, result = train(objective=CountingObjective(spread=lambda progress: 2.0 if progress < 0.25 else 0.01), lr=0.05)
    assert result.accuracy > 80
    model = NoisyNet()
    nn.init.zeros_(model.head.weight)
    dip = CountingObjective(spread=lambda progress: 0.01 if 0.25 <= progress < 0.75 else 2.0)
    _, result = train(objective=dip, model=model, lr=1e-12)
    assert len(result.history) == 4


def test_numbers_may_be_numpys():
    given = {"lr": np.float32(0.01), "epochs": np.int64(1), "batch_size": np.int32(8), "clip_grad": np.float64(1.0)}
    assert_same_weights(train(**given)[0], train(epochs=1, lr=float(np.float32(0.01)))[0])


def test_a_label_that_is_left_out_may_be_given():
    """-100, as cross-entropy leaves it out."""
    data = blobs()
    data.tensors[1][3] = -100
    train(data=data, objective=TaskObjective(), epochs=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_models_of_other_precision(dtype):
    """Evaluated as they are; trained only on images of their own."""
    model, data = NoisyNet().to(dtype), blobs()
    assert evaluate(model, data).accuracy == pytest.approx(evaluate(NoisyNet(), data).accuracy, abs=5)
    with pytest.raises(
        ValueError, match=rf"images of `train_data` are torch\.float32, but .* {dtype}.*model\.float\(\)"
    ):
        train(model=model)
    own = TensorDataset(data.tensors[0].to(dtype), data.tensors[1])
    if dtype != torch.float16:  # whose small numbers vanish in AdamW
        assert fit(model, own, objective=CountingObjective(), epochs=1, batch_size=8).history
    assert train(model=NoisyNet().to(dtype).float(), epochs=1)[1].history


def test_a_model_without_trainable_weights_is_refused():
    with pytest.raises(ValueError, match=r"`model` has no trainable parameter.*requires_grad_\(True\)"):
        train(model=NoisyNet().requires_grad_(False))
    model = NoisyNet().requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"depends on none of the model's trainable parameters.*Unfreeze"):
        train(model=model)
    model.head.requires_grad_(True)
    assert train(model=model, epochs=1)[1].history
    with pytest.raises(ValueError, match="no weights yet"):
        train(model=NoisyNet().to("meta"))


def test_a_frozen_backbone_beside_a_ramp_is_told_what_to_do():
    """At the ramp's start the loss is the task's alone, which trains nothing; the remedy trains the shares."""
    model = SelfExplainingClassifier(
        "vit_tiny_patch16_224",
        3,
        img_size=4,
        model_kwargs={"patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 1},
    )
    model.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match=r"depends on none.*regression_ramp=\(0, 0\)"):
        train(model=model, objective=JointObjective(2))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model=model, objective=JointObjective(2, regression_ramp=(0, 0)), epochs=1)
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "head.shares.weight" in changed
    assert not any(name.startswith("backbone.") for name in changed)


def test_an_objective_without_a_loss_is_refused():
    class Vector(CountingObjective):
        def __call__(self, model, images, labels, *, progress=1.0):
            return SimpleNamespace(loss=functional.cross_entropy(model(images), labels, reduction="none"))

    class Nothing(CountingObjective):
        def __call__(self, model, images, labels, *, progress=1.0):
            return {"loss": functional.cross_entropy(model(images), labels)}

    for kind, found in ((Vector, r"float32 \(8,\)"), (Nothing, "None")):
        with pytest.raises(ValueError, match=rf"`objective` must return terms with a scalar tensor `loss`.*{found}"):
            train(objective=kind())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, r"`epochs` must be a whole number from 1 to .*, but it is 0"),
        ({"batch_size": 2.5}, "`batch_size` must be a whole number"),
        ({"lr": 0.0}, "`lr` must be above 0"),
        ({"lr": float("nan")}, "`lr` must be a finite number"),
        ({"weight_decay": -1}, "`weight_decay` must be a finite number ≥ 0"),
        ({"clip_grad": 0.0}, "`clip_grad` must be above 0"),
        ({"seed": -1}, "`seed` must be a whole number from 0 to 4294967295"),
        ({"seed": 2**32}, "`seed` must be a whole number from 0 to 4294967295"),
        ({"workers": -1}, "`workers` must be a whole number from 0"),
        ({"epochs": True}, "`epochs` must be a whole number"),
        ({"lr": "a"}, r"`lr` must be a finite number ≥ 0, but it is 'a' \(str\)"),
        ({"lr": None}, "`lr` must be a finite number"),
        ({"clip_grad": True}, "`clip_grad` must be a finite number"),
        ({"opt": None}, "`opt` must be a name"),
        ({"mixed_precision": "fp8"}, "`mixed_precision` must be one of 'no', 'bf16', 'fp16'"),
        ({"objective": "shapley"}, r"`objective` must be an objective.*'shapley'.*Use fv\.JointObjective\(\)"),
        ({"objective": JointObjective}, r"`objective` must be an objective.*Use fv\.JointObjective\(\)"),
        ({"objective": lambda model, images, labels: 0}, "`objective` must be .* a subclass of fv.Objective"),
        ({"model": "resnet18"}, r"`model` must be a torch\.nn\.Module.*'resnet18'.*timm\.create_model"),
        ({"output": 5}, "`output` must be the path of a folder"),
        ({"resume": 5}, "`resume` must be None, 'auto', or the path of a run .* but it is 5"),
        ({"data": DataLoader(blobs())}, r"`train_data` must be a dataset, but it is a DataLoader.*loader\.dataset"),
        ({"data": ChainDataset([])}, r"`train_data` must be a dataset with a length .* a ChainDataset"),
        ({"data": 5}, "`train_data` must be a dataset with a length .* a int"),
        (
            {"data": [{"image": torch.zeros(1, 4, 4), "label": 0}] * 8},
            r"`train_data` must be a dataset of \(image, lab.*dict",
        ),
        (
            {"data": [(Image.new("L", (4, 4)), 0)] * 8},
            r"`train_data` must be .* each image a tensor .*Image.*load_dataset",
        ),
        (
            {"data": [(torch.zeros(1, 4, 4, dtype=torch.uint8), 0)] * 8},
            "`train_data` must be .* floating-point .*uint8",
        ),
        ({"data": [(torch.zeros(1, 4, 4), 0), (torch.zeros(1, 5, 5), 0)] * 4}, r"stacked to a batch.*of one size"),
        ({"data": [(torch.zeros(1, 4, 4, dtype=torch.float64), 0)] * 8}, r"float64, but .* weights are torch\.float32"),
        (
            {"data": [(torch.zeros(1, 4, 4), 3)] * 8, "objective": TaskObjective()},
            "the label 3, but the model's 3 classes",
        ),
        ({"data": [(torch.zeros(1, 4, 4), -1)] * 8, "objective": TaskObjective()}, "the label -1, but the model's 3"),
        ({"batch_size": 41}, r"40 images, fewer than one step takes .*Lower batch_size to at most 40"),
        ({"sched": "plateau"}, "`sched`"),
        ({"sched": "nonsense"}, "`sched` must be one of cosine"),
        ({"opt": "adamww"}, r"`opt` = 'adamww'.*Try adamw"),
        ({"compile": True}, "`compile` needs an objective with compile, and CountingObjective has none"),
        ({"grad_checkpointing": True}, "`grad_checkpointing` needs a model .*, and NoisyNet has none"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_gradient_checkpointing_is_the_models_own():
    class Checkpointed(NoisyNet):
        is_checkpointed = False

        def set_grad_checkpointing(self, enable=True):
            self.is_checkpointed = enable

    for wanted in (False, True):
        model, _ = train(model=Checkpointed(), epochs=1, grad_checkpointing=wanted)
        assert model.is_checkpointed is wanted


def test_class_count_mismatch():
    data = blobs()
    data.classes = ["a", "b"]
    with pytest.raises(ValueError, match=r"`train_data` has 2 classes, but the model has 3 .*num_classes=2"):
        train(data=data)
    with pytest.raises(ValueError, match=r"`eval_data` has 2 classes"):
        fit(NoisyNet(), blobs(), data, objective=CountingObjective(), epochs=1, batch_size=8)
    with pytest.raises(ValueError, match=r"`data` has 2 classes"):
        evaluate(NoisyNet(), data)
    with pytest.raises(ValueError, match="empty"):
        evaluate(NoisyNet(), TensorDataset(torch.zeros(0, 1, 4, 4), torch.zeros(0)))


def answers(logits, labels):
    """Accuracy and loss of a model that returns these logits for images that hold their number."""

    class Answering(nn.Module):
        def forward(self, images):
            return logits[images.flatten().long()]

    data = TensorDataset(torch.arange(len(logits)).float().view(-1, 1, 1, 1), labels)
    return evaluate(Answering(), data, batch_size=3)


@pytest.mark.parametrize("shape", [(8, 1), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_a_single_logit_says_yes_by_its_sign(shape, dtype):
    logits = torch.tensor([[2.0], [-1.0], [0.5], [-3.0], [1.0], [4.0], [-0.1], [-2.0]])
    labels = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0]).view(shape).to(dtype)
    found = answers(logits, labels)
    assert found.accuracy == 75
    expected = functional.binary_cross_entropy_with_logits(logits, labels.view(8, 1).float())
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)


def test_each_of_many_labels_counts(generator):
    logits, labels = torch.randn(10, 5, generator=generator), torch.rand(10, 5, generator=generator).round()
    found = answers(logits, labels)
    assert found.accuracy == pytest.approx(100 * ((logits > 0) == labels.bool()).float().mean().item())
    expected = functional.binary_cross_entropy_with_logits(logits, labels)
    assert found.loss == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((8,), 5), "8 labels of the data are impossible for the model's 5 logits"),
        (torch.tensor([-1, 0, 0, 0, 0, 0, 0, 4]), "1 labels of the data are impossible"),
        (torch.full((8, 5), 2.0), "40 labels of the data are impossible"),
        (torch.zeros(8, 1, dtype=torch.int64), r"labels must be class numbers \(B,\), .*int64 \(3, 1\)"),
        (torch.zeros(8), r"labels must be class numbers \(B,\), .*float32 \(3,\)"),
    ],
)
def test_labels_that_do_not_fit_the_logits_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        answers(torch.randn(8, 5), labels)


def test_a_single_logit_is_trained_and_its_game_judged():
    """Two classes are the no and yes of one logit, chance is a half, and no accuracy is above 100 %."""

    class OneLogit(NoisyNet):
        num_classes = 1

        def __init__(self):
            super().__init__()
            self.head = nn.Linear(8, 1)

    data = blobs()
    data = TensorDataset(data.tensors[0], (data.tensors[1] == 1).float().view(-1, 1))
    data.classes = ["no", "yes"]
    objective = TaskObjective(functional.binary_cross_entropy_with_logits)
    result = fit(OneLogit(), data, data, objective=objective, epochs=4, batch_size=8, lr=0.1)
    assert 80 < result.accuracy <= 100
    history = [{"epoch": n, "spread": spread, "eval_accuracy": 98.0} for n, spread in enumerate([1, 1e-9, 1e-9, 1e-9])]
    check_not_lost(history, 1)
    with pytest.raises(TrainingError, match="collapsed"):
        check_not_lost([row | {"eval_accuracy": 52.0} for row in history], 1)


def test_evaluate_refuses_what_it_cannot_take():
    data = blobs()
    for options, message in (
        ({"data": DataLoader(data)}, "`data` must be a dataset, but it is a DataLoader"),
        ({"model": None}, "`model` must be a torch.nn.Module"),
        ({"batch_size": 0}, "`batch_size` must be a whole number from 1"),
        ({"workers": -1}, "`workers` must be a whole number from 0"),
        ({"data": [(torch.zeros(1, 4, 4), None)] * 3}, r"stacked to a batch.*\(image, label\)"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(**{"model": NoisyNet(), "data": data} | options)


def test_evaluate_against_its_definition():
    model, data = NoisyNet(), blobs(50)
    result = evaluate(model, data, batch_size=16)
    assert model.training
    images, labels = data.tensors
    logits = model.eval()(images)
    assert result.accuracy == pytest.approx(100 * (logits.argmax(1) == labels).float().mean().item())
    assert result.loss == pytest.approx(functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_every_run_has_its_own_precision():
    train(epochs=1)
    _, result = train(lr=0.05, mixed_precision="bf16")
    assert result.accuracy > 80


@pytest.fixture
def _no_accelerator():
    """accelerate as in a new process, before the test and after it."""
    states = (GradientState, AcceleratorState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


@pytest.mark.usefixtures("_no_accelerator")
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_a_callers_accelerator_lives_on(mixed_precision):
    """In the middle of its gradient accumulation, and of another precision than the run's."""
    expected, _ = train(mixed_precision=mixed_precision)
    accelerator = Accelerator(gradient_accumulation_steps=4, cpu=True)
    layer = nn.Linear(2, 2)
    layer, optimizer = accelerator.prepare(layer, torch.optim.SGD(layer.parameters(), lr=0.1))
    before = layer.weight.detach().clone()

    def micro_step():
        with accelerator.accumulate(layer):
            accelerator.backward(layer(torch.ones(1, 2)).sum())
            optimizer.step()
            optimizer.zero_grad()

    micro_step()
    model, _ = train(mixed_precision=mixed_precision)
    evaluate(model, blobs())
    assert_same_weights(model, expected)
    assert accelerator.gradient_accumulation_steps == 4
    assert accelerator.mixed_precision == AcceleratorState().mixed_precision == "no"
    assert not accelerator.sync_gradients
    for _ in range(2):
        micro_step()
        assert torch.equal(layer.weight, before)
    micro_step()
    torch.testing.assert_close(layer.weight, before - 0.1)


@pytest.mark.usefixtures("_no_accelerator")
def test_a_run_leaves_no_accelerator_behind():
    train(epochs=1, mixed_precision="bf16")
    assert Accelerator(cpu=True, gradient_accumulation_steps=3).mixed_precision == "no"


def test_random_generators_stay_as_they_were():
    def drawn():
        return random.random(), np.random.rand(), torch.rand(1).item()

    model, data = NoisyNet(), blobs()
    for seed in range(2):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        expected = drawn()
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        fit(model, data, data, objective=CountingObjective(), epochs=1, batch_size=8)
        evaluate(model, data)
        assert drawn() == expected


def test_a_run_that_fails_leaves_everything_as_it_was():
    model = timm.create_model("vit_tiny_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=1)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    data = TensorDataset(torch.full((8, 3, 8, 8), torch.nan), torch.zeros(8).long())
    with pytest.raises(TrainingError):
        fit(model, data, objective=TaskObjective(), epochs=1, batch_size=4, seed=9, grad_checkpointing=True)
    assert torch.equal(torch.rand(1), expected)
    assert not model.grad_checkpointing


def test_gradients_from_before_have_no_part_in_the_run():
    fresh, stale = NoisyNet(), NoisyNet()
    for parameter in stale.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert_same_weights(train(model=fresh)[0], train(model=stale)[0])


def test_a_trained_model_is_in_evaluation_mode():
    assert not any(module.training for module in train()[0].modules())


def test_evaluation_gives_each_module_its_own_mode_back():
    model = NoisyNet().train()
    model.layers[2].eval()
    evaluate(model, blobs())
    assert model.training
    assert not model.layers[2].training


def test_a_run_of_another_objective_is_not_resumed(tmp_path):
    model = SelfExplainingClassifier("resnet10t", 3, img_size=64, model_kwargs={"in_chans": 1})
    images = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(images, torch.arange(8) % 3)
    options = {"epochs": 1, "batch_size": 4, "progress": False, "output": tmp_path}
    ramp = {"regression_ramp": (0.0, 0.25)}
    fit(model, data, objective=JointObjective(2, **ramp), **options)
    assert fit(model, data, objective=JointObjective(2, **ramp), resume="auto", **options).history
    for other, words in (
        (JointObjective(4, **ramp), "objective.coalitions was 2 and is 4"),
        (JointObjective(2), r"objective.regression_ramp was \[0.0, 0.25\] and is \[0.0, 0.5\]"),
        (TaskObjective(), "objective.coalitions was 2 and is None"),
    ):
        with pytest.raises(CheckpointError, match=words):
            fit(model, data, objective=other, resume="auto", **options)
