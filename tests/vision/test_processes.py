"""Two processes that train together, by gloo: they hold the same model, stop together and go on together."""

import json
import signal

import pytest
import torch
from several_processes import ended, evaluated, start, trained
from test_training import train
from torch import nn

from fastshap_vision import CheckpointError, SelfExplainingClassifier, TaskObjective
from fastshap_vision.training.checkpoint import whole_checkpoints

#: What the pair does, one after the other.
CALLS = {
    f"{kind} {objective}": ("trained", {"kind": kind, "objective": objective})
    for kind in ("vit", "cnn")
    for objective in ("joint", "explainer")
}


#: Steps without a division by the gradient's own size, which would make rounding large.
AGAINST_ONE = {name: {**arguments, "opt": "sgd", "lr": 0.05} for name, (_, arguments) in CALLS.items()}
#: Batch norm normalises by each process's own batch where the encoder trains.
del AGAINST_ONE["cnn joint"]
#: Weights in shards, by FSDP2.
SHARDED = {
    **{name: AGAINST_ONE[f"vit {name}"] for name in ("joint", "explainer")},
    "task": {"objective": "task", "opt": "sgd", "lr": 0.05, "epochs": 1},
    "eva": {"kind": "eva", "objective": "joint", "opt": "sgd", "lr": 0.05, "epochs": 1},
    "options": {
        **{"objective": "joint", "opt": "sgd", "lr": 0.05, "epochs": 1, "grad_accum_steps": 2},
        **{"grad_checkpointing": True, "layer_decay": 0.75},
    },
    "bf16": {"objective": "joint", "opt": "sgd", "lr": 0.05, "epochs": 1, "mixed_precision": "bf16"},
}
BATCHES = {"options": 2}
#: Steps by Adam, whose state counts; a norm for clipping, summed in another order, would make its rounding large.
STEPS = {"objective": "joint", "clip_grad": None}
#: Whether a run that was stopped within an epoch was in shards, and whether it then is.
BEFORE_AND_AFTER = (True, True), (True, False), (False, True)
TRAFFIC = {"objective": "explainer"}, {"objective": "joint"}, {"objective": "task", "grad_accum_steps": 2}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What each of the two found of each call: {call: (of process 0, of process 1)}."""
    folder = tmp_path_factory.mktemp("pair")
    calls = CALLS | {
        "other seeds": ("refused", {"seeds": True}),
        "errors": ("errors_of_others", {}),
        "other arguments": ("called_otherwise", {}),
        "evaluated": ("evaluated", {}),
        **{f"against one: {name}": ("trained", arguments) for name, arguments in AGAINST_ONE.items()},
        **{f"traffic: {options['objective']}": ("exchanged", options) for options in TRAFFIC},
        "disks": ("disks_of_nodes", {"folder": str(folder / "disks")}),
        **{
            f"{name} resumed": ("stopped_and_resumed", {"folder": str(folder / name), **arguments})
            for name, (_, arguments) in CALLS.items()
        },
    }
    # They end the process group; PyTorch keeps one that had shards, and with it what a next one of the same port reads.
    calls["commands"] = ("command_line", {"folder": str(folder / "digits")})
    for name, arguments in SHARDED.items():
        sharded = arguments | {
            "batch_size": BATCHES.get(name, 4),
            "fsdp": True,
            "output": str(folder / f"{name} sharded"),
        }
        calls[f"sharded: {name}"] = ("trained", sharded)
    calls["whole: bf16"] = ("trained", SHARDED["bf16"])
    calls["held in shards"] = ("held_in_shards", {})
    calls["steps"] = ("trained", STEPS)
    for before, after in BEFORE_AND_AFTER:
        options = {"fsdp": before, "then": {"fsdp": after}, "folder": str(folder / f"steps {before} {after}")}
        calls[f"steps: {before}, then {after}"] = ("stopped_and_resumed", STEPS | {"checkpoint_steps": 1} | options)
    found = ended(folder, start(folder, 2, list(calls.values())))
    return dict(zip(calls, zip(*found, strict=True), strict=True)) | {"folder": folder}


def assert_same(one, other):
    assert one["history"] == other["history"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


def assert_close(two, one):
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            two["weights"][name], weight, atol=1e-5, rtol=0, msg=lambda text, name=name: name + text
        )
    for row, other in zip(one["history"], two["history"], strict=True):
        # But for eval_value_r2, of batches of eight and of four.
        known = {name: value for name, value in row.items() if value is not None and name != "eval_value_r2"}
        found = {name: value for name, value in other.items() if value is not None and name != "eval_value_r2"}
        assert found == pytest.approx(known, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("call", CALLS)
def test_both_hold_the_same_model(pair, call):
    """Parameters, buffers and history, to the bit."""
    assert_same(*pair[call])


@pytest.mark.parametrize("call", CALLS)
def test_a_stopped_run_goes_on_to_the_same_bits(pair, call):
    for unbroken, resumed in zip(pair[call], pair[f"{call} resumed"], strict=True):
        assert_same(unbroken, resumed)


@pytest.mark.parametrize("call", AGAINST_ONE)
def test_two_processes_train_as_one_with_the_same_batch(pair, call):
    """Coalitions, schedule and the regression's unit, too, are those of one batch of eight, not of two of four."""
    assert_close(pair[f"against one: {call}"][0], trained(batch_size=8, **AGAINST_ONE[call]))


@pytest.mark.parametrize("name", SHARDED)
def test_a_model_in_shards_trains_as_a_whole_one(pair, name):
    """Weights, history with its evaluations, explanations; both processes and what was saved hold the same model."""
    one, other = pair[f"sharded: {name}"]
    assert_same(one, other)
    whole = [pair[call][0] for call in (f"against one: vit {name}", f"whole: {name}") if call in pair]
    if name != "bf16":  # whose sums over eight images are others than those over four
        whole.append(trained(batch_size=2 * BATCHES.get(name, 4), **SHARDED[name]))
    for expected in whole:
        assert_close(one, expected)
        torch.testing.assert_close(one["explained"], expected["explained"], atol=1e-5, rtol=1e-5)
    saved = SelfExplainingClassifier.from_pretrained(pair["folder"] / f"{name} sharded").state_dict()
    assert all(torch.equal(saved[key], weight) for key, weight in one["weights"].items())


def test_a_process_holds_half_of_a_model_in_shards(pair):
    for found in pair["held in shards"]:
        assert found["packs"]
        assert found["another hook is seen"]
        assert 0.45 < found["blocks"] / found["whole blocks"] < 0.55
        assert 0.45 < found["weights"] / found["whole"] < 0.55
        assert found["weights"] == found["gradients"] == found["averages"]


@pytest.mark.parametrize(("before", "after"), BEFORE_AND_AFTER)
def test_a_run_goes_on_in_shards_or_whole(pair, before, after):
    for found in pair[f"steps: {before}, then {after}"]:
        assert_close(found, pair["steps"][0])


def test_an_evaluation_by_two_is_that_of_one(pair):
    one = evaluated()
    assert all(value == value for values in one.values() for value in values[:3])
    for found in pair["evaluated"]:
        for count, values in one.items():
            assert found[count] == pytest.approx(values, abs=1e-6, nan_ok=True)


def test_only_gradients_of_what_is_trained_are_exchanged(pair):
    """The frozen encoder's were, five times as many."""
    explainer, joint, task = (pair[f"traffic: {options['objective']}"][0] for options in TRAFFIC)
    assert explainer["bytes"] == explainer["head"] > 0
    assert joint["bytes"] == joint["head"] + joint["backbone"]
    assert task["bytes"] == task["backbone"]  # an update of two steps exchanges once


def test_models_that_differ_are_refused_by_both(pair):
    for found in pair["other seeds"]:
        assert found["error"].startswith("TrainingError: fit: all processes must hold the same model before the first")
        assert "tensors differ between processes 0 and 1, backbone.cls_token among them" in found["error"]


def test_both_hear_of_an_error_of_one(pair):
    """One that could not be pickled ended the process that sent it, and the other waited for ever."""
    assert pair["errors"] == (2 * ["RuntimeError: Unknown: 7: the archive is locked"],) * 2


def test_calls_that_differ_are_refused_by_both(pair):
    for rank, found in enumerate(pair["other arguments"]):
        assert "ValueError: fit: all processes must be called with the same arguments" in found["error"]
        assert f"lr is {(0.01, 0.02)[rank]} in process {rank} and {(0.02, 0.01)[rank]} in process" in found["error"]


def test_all_go_on_from_the_checkpoint_of_process_0_or_none_does(pair):
    for found in pair["disks"]:
        assert found["begun"] is None
        expected = "CheckpointError: fit: process 1 of 2 has {} 'run/checkpoints/epoch_0001', from which process 0"
        assert found["nothing there"].startswith(expected.format("no checkpoint"))
        assert found["another there"].startswith(expected.format("another checkpoint in"))
        assert_same(found["the same there"], pair["vit joint"][0])


def test_commands_print_once(pair):
    """And `evaluate` by two gives what it gives by one."""
    (trained_by_0, evaluated_by_0), others = pair["commands"]
    assert others == ["", ""]
    assert trained_by_0.startswith("accuracy ")
    by_two = json.loads(evaluated_by_0)
    assert by_two["test_images"] == 360
    assert f"accuracy {by_two['accuracy']:.2f} %" in trained_by_0


@pytest.mark.slow
def test_four_processes_of_which_one_is_killed(tmp_path):
    """They train as one, hold the same model, and go on to the same bits."""
    known = {name: arguments | {"batch_size": 2} for name, (_, arguments) in CALLS.items()}
    against = {name: arguments | {"batch_size": 2} for name, arguments in AGAINST_ONE.items()}
    calls = [("trained", arguments) for arguments in (*known.values(), *against.values())]
    unbroken = ended(tmp_path / "unbroken", start(tmp_path / "unbroken", 4, calls))
    for name, arguments in known.items():
        arguments["output"] = str(tmp_path / name)
        folder = tmp_path / f"{name} killed"
        started = start(folder, 4, [("trained", arguments | {"kill_at": 0.7})])
        assert started[3].wait(600) == -signal.SIGKILL, (folder / "log3").read_text()
        for process in started:  # as torchrun does
            process.kill()
            process.wait()
        assert [path.name for path in whole_checkpoints(tmp_path / name)] == ["epoch_0001"]
    again = [("trained", arguments | {"resume": "auto"}) for arguments in known.values()]
    resumed = ended(tmp_path / "resumed", start(tmp_path / "resumed", 4, again))
    for row in range(len(known)):
        for rank in range(4):
            assert_same(unbroken[rank][row], unbroken[0][row])
            assert_same(resumed[rank][row], unbroken[rank][row])
    for row, arguments in enumerate(AGAINST_ONE.values(), len(known)):
        assert_close(unbroken[0][row], trained(batch_size=8, **arguments))


class Interrupted(TaskObjective):
    def __call__(self, model, images, labels, *, progress=1.0):
        if progress > 0.6:
            raise KeyboardInterrupt
        return super().__call__(model, images, labels)


def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3))


def test_another_split_of_the_batch_goes_on(tmp_path):
    """Of one process: 8 images a step, then twice 4, loaded by another number of workers."""
    expected, unbroken = train(objective=TaskObjective(), model=linear(), batch_size=8)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Interrupted(), model=linear(), batch_size=8)
    options = {"objective": TaskObjective(), "batch_size": 4, "resume": "auto"}
    with pytest.raises(CheckpointError, match="batch_size × processes × grad_accum_steps was 8 and is 12"):
        train(tmp_path, model=linear(), grad_accum_steps=3, **options)
    resumed, result = train(tmp_path, model=linear(), grad_accum_steps=2, workers=1, **options)
    for one, other in zip(resumed.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert result.history[-1]["loss"] == pytest.approx(unbroken.history[-1]["loss"], abs=1e-5)
