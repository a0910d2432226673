"""What a run leaves on disk: whole, of one run, never code; and the way back from any moment."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_training import (
    CountingObjective,
    NoisyNet,
    _one_thread,  # noqa: F401 (a fixture)
    assert_same_weights,
    interrupt,
    rows_of,
    run_copy,  # noqa: F401
    short_run,  # noqa: F401
    timeless,
    train,
)
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from fastshap_vision.training import checkpoint
from fastshap_vision.training.checkpoint import find_checkpoint, whole_checkpoints
from fastshap_vision.training.state import CheckpointError, decode, encode

OF_ACCELERATE = (
    "optimizer.bin",
    "scheduler.bin",
    "sampler.bin",
    "dl_state_dict.bin",
    "scaler.pt",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "pytorch_model.bin",
)


def rewrite_record(folder, change=lambda record: None):
    """Changes a record and signs it, as one who means harm would."""
    path = folder / "record.json"
    record = json.loads(path.read_text())["record"]
    for name in record["files"]:
        record["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    record = change(record) or record
    digest = hashlib.sha256(json.dumps(record).encode()).hexdigest()
    path.write_text(json.dumps({"digest": digest, "record": record}))


class Marking:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("name", ["model.safetensors", "state.safetensors", "record.json", *OF_ACCELERATE])
def test_no_pickle_is_ever_loaded(run_copy, tmp_path, name, save):  # noqa: F811
    folder, mark = run_copy / "checkpoints" / "epoch_0001", tmp_path / "mark"
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    is_new = not (folder / name).exists()
    save({"state": Marking(mark)}, folder / name)
    if name != "record.json":
        rewrite_record(folder)
    if is_new:  # nobody reads it
        train(run_copy, epochs=1, resume="auto")
        rewrite_record(folder, lambda record: record["files"].update({name: "0" * 64}))
    with pytest.raises(CheckpointError):
        train(run_copy, epochs=1, resume="auto")
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda record: [1],
        lambda record: record.pop("state"),
        lambda record: record.pop("settings"),
        lambda record: record.update(files={}),
        lambda record: record.update(files=None),
        lambda record: record["files"].update({"../../../model.safetensors": "0"}),
        lambda record: record.update(settings=[]),
        lambda record: record.update(history=3),
        lambda record: record.update(history=[[]]),
        lambda record: record["history"][0].pop("seconds"),
        lambda record: record["history"][0].update(seconds="long"),
        lambda record: record.update(state={"dict": 3}),
        lambda record: record.update(state={"tensor": "of no name"}),
        lambda record: record.update(state={"dict": [["optimizer", None]]}),
    ],
)
def test_wrong_types_in_a_record_are_named(run_copy, change):  # noqa: F811
    folder = run_copy / "checkpoints" / "epoch_0001"

    def changed(record):
        found = change(record)
        return found if isinstance(found, list) else record

    rewrite_record(folder, changed)
    with pytest.raises(CheckpointError, match="epoch_0001"):
        train(run_copy, epochs=1, resume="auto")


def test_a_record_that_was_changed_is_damaged(run_copy):  # noqa: F811
    path = run_copy / "checkpoints" / "epoch_0001" / "record.json"
    content = json.loads(path.read_text())
    content["record"]["history"][0]["loss"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"record.json' is damaged.*not what was written.*Delete"):
        train(run_copy, epochs=1, resume="auto")


def outcome(event):
    """An event for the moment between the last checkpoint and the model file."""
    if event == "killed":
        return KeyboardInterrupt, KeyboardInterrupt
    return OSError(28, "No space left on device"), CheckpointError


@pytest.mark.parametrize("event", ["killed", "full disk"])
@pytest.mark.parametrize("moment", ["write_model", "write_summary"])
def test_resuming_finishes_what_was_left(tmp_path, monkeypatch, event, moment):
    raised, seen = outcome(event)
    inner = getattr(checkpoint, moment)

    def stopped(*arguments):
        if (tmp_path / "checkpoints" / "epoch_0004").exists():
            raise raised
        inner(*arguments)

    monkeypatch.setattr(checkpoint, moment, stopped)
    with pytest.raises(seen):
        train(tmp_path)
    monkeypatch.undo()
    objective = CountingObjective()
    model, result = train(tmp_path, objective, resume="auto")
    assert objective.calls == 0
    assert len(result.history) == len(rows_of(tmp_path / "summary.csv")) == 4
    assert_same_weights(model, train()[0])
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(written[name], value) for name, value in model.state_dict().items())


def test_a_finished_run_is_written_to_another_folder(tmp_path):
    train(tmp_path / "first", epochs=1)
    train(tmp_path / "second", epochs=1, resume=tmp_path / "first")
    assert rows_of(tmp_path / "second" / "summary.csv") == rows_of(tmp_path / "first" / "summary.csv")
    assert (tmp_path / "second" / "model.safetensors").exists()


def test_a_run_goes_back_to_an_earlier_checkpoint(tmp_path):
    expected, _ = train(tmp_path)
    earlier = tmp_path / "checkpoints" / "epoch_0003"
    shutil.copytree(earlier, tmp_path / "checkpoints" / "epoch_0005")  # of a run that was longer
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=2, event=interrupt), resume=earlier)
    assert len(rows_of(tmp_path / "summary.csv")) == 3
    model, result = train(tmp_path, resume=earlier)
    assert_same_weights(model, expected)
    assert [row["epoch"] for row in result.history] == [1, 2, 3, 4]
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["epoch_0003", "epoch_0004"]
    assert train(tmp_path, resume="auto")[1].history == result.history


def test_a_folder_holds_one_run(tmp_path):
    for name in ("first", "second"):
        train(tmp_path / name, epochs=1)
    with pytest.raises(CheckpointError, match=r"second' already holds a run, and .*first.* is of another one"):
        train(tmp_path / "second", epochs=1, resume=tmp_path / "first")


def test_two_runs_at_once_are_kept_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS_TO_WAIT", 0.01)

    other = NoisyNet()

    def second():
        with pytest.raises(CheckpointError, match=r"another run writes into .*another `output`"):
            train(tmp_path, model=other, resume="auto")

    model, _ = train(tmp_path, CountingObjective(at=13, event=second))
    assert_same_weights(model, train()[0])
    assert len(train(tmp_path, resume="auto")[1].history) == 4


def test_checkpoints_are_sorted_by_number(tmp_path):
    for epoch in (9998, 9999, 10000):
        (tmp_path / "checkpoints" / f"epoch_{epoch}").mkdir(parents=True)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["epoch_9998", "epoch_9999", "epoch_10000"]
    assert find_checkpoint(tmp_path, "auto").name == "epoch_10000"


def test_what_a_killed_run_left_half_done_is_no_checkpoint(tmp_path):
    train(tmp_path, epochs=2)
    for name in ("epoch_0001.removed", "epoch_0003.partial", "epoch_0004.partial"):
        (tmp_path / "checkpoints" / name).mkdir()
    assert len(whole_checkpoints(tmp_path)) == 2
    train(tmp_path / "copy", epochs=2, resume=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "epoch_0002")
    train(tmp_path, epochs=2, resume="auto")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["epoch_0001", "epoch_0002"]


@pytest.mark.parametrize("place", ["file", "under a file", "system", "full disk"])
def test_an_output_that_cannot_be_written_is_found_before_the_first_step(tmp_path, monkeypatch, place):
    (tmp_path / "file").write_text("of someone else")
    output = {"file": "file", "under a file": "file/run", "system": "/proc/run"}.get(place, "run")
    if place == "full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    objective = CountingObjective()
    words = "must have room for checkpoints of at least" if place == "full disk" else "a folder that can be written to"
    with pytest.raises(CheckpointError, match=rf"`output` must .*{words}.*Pass another folder|{words}.*another disk"):
        train(tmp_path / output, objective)
    assert objective.calls == 0
    assert (tmp_path / "file").read_text() == "of someone else"


@pytest.mark.parametrize("size", [0, 1000])
def test_a_disk_that_fills_up_costs_one_epoch(tmp_path, size):
    """The system refuses to write files past `size` bytes: none at all, or the larger ones of a checkpoint."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(CheckpointError, match=r"can't be written .*epoch_0002 is whole.*resume='auto'"):
            train(
                tmp_path,
                CountingObjective(at=13, event=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))),
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    objective = CountingObjective()
    model, _ = train(tmp_path, objective, resume="auto")
    assert objective.calls == 10
    assert_same_weights(model, train()[0])


def test_an_objective_whose_state_cannot_be_written_is_found_before_the_first_step(tmp_path):
    class Odd(CountingObjective):
        def state_dict(self):
            return {"counter": object()}

    objective = Odd()
    with pytest.raises(TypeError, match=r"`objective`.*but there is a object"):
        train(tmp_path, objective)
    assert objective.calls == 0


def same(value, other):
    if isinstance(value, torch.Tensor):
        return value.dtype == other.dtype and value.stride() == other.stride() and torch.equal(value, other)
    if isinstance(value, dict):
        return value.keys() == other.keys() and all(same(value[name], other[name]) for name in value)
    if isinstance(value, (list, tuple)):
        return type(value) is type(other) and all(same(*pair) for pair in zip(value, other, strict=True))
    return type(value) is type(other) and value == other


def test_a_state_is_read_as_it_was_written(tmp_path):
    state = {
        1: [torch.arange(3), (2, 0.1, None)],
        "a": {"b": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), (1, True): "c"},
        "half": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    tensors = {}
    node = json.loads(json.dumps(encode(state, tensors)))
    save_file(tensors, tmp_path / "state")
    assert same(state, decode(node, load_file(tmp_path / "state")))


def timms_optimizers():
    """One name of each kind whose package is installed; kron compiles its step, which takes long."""
    model, kinds = nn.Linear(2, 2), {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that are not installed
        for opt in list_optimizers(exclude_filters=["bnb*", "fused*", "lbfgs"]):
            kinds.setdefault(type(create_optimizer_v2(model, opt=opt, lr=1e-3)).__name__, opt)
    return [pytest.param(opt, marks=pytest.mark.slow if opt == "kron" else ()) for opt in [*kinds.values(), "cadamw"]]


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("opt", timms_optimizers())
def test_the_states_of_timms_optimizers_can_be_written(tmp_path, opt):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt=opt, lr=1e-3, weight_decay=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 4, 4)).square().sum().backward(create_graph=opt == "adahessian")
        optimizer.step()
    tensors = {}
    node = json.loads(json.dumps(encode(optimizer.state_dict(), tensors)))
    save_file(tensors, tmp_path / "state")
    assert same(optimizer.state_dict(), decode(node, load_file(tmp_path / "state")))


@pytest.fixture(scope="module")
def unbroken():
    return train()


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(st.integers(0, 19), min_size=1, max_size=3), workers=st.sampled_from([0, 0, 0, 1]))
def test_a_run_resumes_from_any_moment(tmp_path_factory, unbroken, steps, workers):
    """However often it was stopped, and at whatever step."""
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        objective = CountingObjective(at=step, event=interrupt)
        try:
            train(folder, objective, workers=workers, resume="auto")
        except KeyboardInterrupt:
            assert objective.calls == step
    model, result = train(folder, workers=workers, resume="auto")
    assert timeless(result.history) == timeless(unbroken[1].history)
    assert_same_weights(model, unbroken[0])


def test_weights_that_are_shared_are_written_once(tmp_path):
    class Tied(NoisyNet):
        def __init__(self):
            super().__init__()
            self.again = self.head

    expected, _ = train(model=Tied())
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), model=Tied())
    assert_same_weights(train(tmp_path, model=Tied(), resume="auto")[0], expected)


def test_runs_in_mixed_precision_resume_to_the_same_bits(tmp_path):
    expected, _ = train(mixed_precision="bf16")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=13, event=interrupt), mixed_precision="bf16")
    assert_same_weights(train(tmp_path, mixed_precision="bf16", resume="auto")[0], expected)


def test_the_scale_of_the_loss_is_kept(tmp_path):
    """fp16's, which accelerate has on a GPU only."""

    def checkpoints(scale):
        model = nn.Linear(2, 2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=5)
        accelerator = SimpleNamespace(scaler=scaler, is_main_process=True, process_index=0, num_processes=1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return checkpoint.Checkpoints(
            tmp_path, accelerator, {}, model=model, optimizer=optimizer, objective=CountingObjective()
        )

    row = {"epoch": 1, "seconds": 0.5, "spread": None, "eval_accuracy": None}
    first, second = checkpoints(7.0), checkpoints(3.0)
    for _ in range(2):
        scaled = first.accelerator.scaler.scale(first.model(torch.ones(1, 2)).sum())
        scaled.backward()
        first.accelerator.scaler.step(first.optimizer)
        first.accelerator.scaler.update()
    first.save([row])
    assert second.resume("auto") == [row]
    state = second.accelerator.scaler.state_dict()
    assert state == first.accelerator.scaler.state_dict()
    assert (state["scale"], state["_growth_tracker"]) == (7.0, 2)
