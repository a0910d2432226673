"""What accelerate was set to: what `fit` takes from it, and what it refuses by name."""

import os
import subprocess
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from test_training import CountingObjective, assert_same_weights, blobs, interrupt, timeless, train
from torch import nn

from fastshap_vision import TaskObjective, fit
from fastshap_vision._runtime.processes import COUNTS, REFUSED, processes


@pytest.fixture(autouse=True)
def _untouched(monkeypatch):
    """No launcher, and accelerate as in a new process, before the test and after it."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_") or name in COUNTS]:
        monkeypatch.delenv(name)
    states = (GradientState, AcceleratorState, PartialState)
    for state in states:
        state._reset_state()
    yield
    for state in states:
        state._reset_state()


def linear_run(**options):
    """Three epochs of a model that has no statistics of its batches, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double()
    data = blobs()
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    objective = CountingObjective() if options.pop("counts", False) else TaskObjective()
    fit(model, data, objective=objective, epochs=3, lr=0.05, clip_grad=0.5, progress=False, **options)
    return model


@pytest.mark.parametrize("opt", ["sgd", "adamw"])
@pytest.mark.parametrize(("batch_size", "steps"), [(4, 2), (4, 3), (2, 6)])  # 40 images: 12 leave four over
def test_accumulated_gradients_are_those_of_a_larger_batch(opt, batch_size, steps):
    found = linear_run(batch_size=batch_size, grad_accum_steps=steps, opt=opt)
    expected = linear_run(batch_size=batch_size * steps, opt=opt)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)
    fewer = linear_run(batch_size=batch_size, opt=opt)
    assert not torch.allclose(next(fewer.parameters()), next(expected.parameters()), atol=1e-6)


def test_schedule_and_progress_count_updates():
    objective = CountingObjective()
    _, result = train(objective=objective, batch_size=4, grad_accum_steps=2, epochs=2)
    assert objective.progresses == [update / 10 for update in range(10) for _ in range(2)]
    assert [row["lr"] for row in result.history] == [row["lr"] for row in train(epochs=2)[1].history]


def test_a_resumed_run_that_accumulates_ends_in_the_same_bits(tmp_path):
    options = {"batch_size": 4, "grad_accum_steps": 3}
    expected, unbroken = train(**options)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, CountingObjective(at=22, event=interrupt), **options)
    resumed, result = train(tmp_path, resume="auto", **options)
    assert timeless(result.history) == timeless(unbroken.history)
    assert_same_weights(resumed, expected)


def test_an_update_needs_all_its_batches():
    with pytest.raises(ValueError, match=r"40 images, fewer than one step takes .*grad_accum_steps 6\)\. .* most 6\."):
        train(batch_size=8, grad_accum_steps=6)
    with pytest.raises(ValueError, match="`grad_accum_steps` must be a whole number from 1"):
        train(grad_accum_steps=0)


@pytest.mark.parametrize(
    ("variable", "value", "option"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2", {"grad_accum_steps": 2}),
        ("ACCELERATE_MIXED_PRECISION", "bf16", {"mixed_precision": "bf16"}),
    ],
)
def test_what_accelerate_was_set_to_holds_where_nothing_is_given(monkeypatch, variable, value, option):
    plain, _ = train(epochs=1, grad_accum_steps=1, mixed_precision="no")
    expected, _ = train(epochs=1, **option)
    monkeypatch.setenv(variable, value)
    assert_same_weights(train(epochs=1)[0], expected)
    assert_same_weights(train(epochs=1, grad_accum_steps=1, mixed_precision="no")[0], plain)
    assert not torch.equal(plain.head.weight, expected.head.weight)


def test_accelerates_dynamo_compiles_the_objective(monkeypatch):
    class Compiled(CountingObjective):
        asked = None

        def compile(self, **options):
            self.asked = options

    for backend, compile, expected in (("INDUCTOR", None, True), ("NO", None, False), ("INDUCTOR", False, False)):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        train(objective=(objective := Compiled()), epochs=1, compile=compile)
        assert (objective.asked is not None) is expected


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp8"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "auto"),
        ("ACCELERATE_DYNAMO_BACKEND", "CUDAGRAPHS"),
        ("ACCELERATE_DYNAMO_MODE", "max-autotune"),
        ("ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION", "True"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(monkeypatch, variable, value):
    if "DYNAMO" in variable:
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=f"accelerate's {variable} is '{value}'"):
        train()


@pytest.mark.parametrize("variable", REFUSED)
def test_engines_that_split_a_model_are_refused_by_name(monkeypatch, variable):
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"train by {REFUSED[variable]} .*unset {variable}"):
        train()
    monkeypatch.setenv(variable, "false")
    train(epochs=1)


@pytest.mark.parametrize("variable", COUNTS)
def test_processes_that_do_not_see_each_other_are_refused(monkeypatch, variable, tmp_path):
    """Each would take itself for the only one: here one did, before fastshap_vision was called."""
    PartialState()
    monkeypatch.setenv(variable, "2")
    with pytest.raises(ValueError, match=f"{variable} says that 2 processes were started, but this one sees 1"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv(variable, "1")  # the remedy
    assert processes().num_processes == 1


def test_a_process_group_that_accelerate_does_not_see_is_refused(tmp_path):
    script = """
import torch
from accelerate import PartialState
from fastshap_vision._runtime.processes import processes
torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
processes()
torch.distributed.get_world_size = lambda: 3
try:
    processes()
except ValueError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "torch.distributed has 3 processes, but accelerate sees 1" in ran.stdout


@pytest.mark.parametrize("name", ["eval_data", "checkpoint_steps", "keep_best"])
def test_processes_wait_for_each_other_at_the_same_places(name, monkeypatch):
    """Else one would wait for ever."""
    monkeypatch.setattr("fastshap_vision.training.agreement.of_all", lambda work: [work(), work() | {name: 7}])
    monkeypatch.setattr("fastshap_vision.training.run.check_model", lambda *_: None)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    data = torch.utils.data.TensorDataset(torch.randn(4, 3, 2, 2), torch.arange(4) % 3)
    with pytest.raises(ValueError, match=f"but {name} is None in process 0 and 7 in process 1"):
        fit(model, data, objective=TaskObjective(), epochs=1, batch_size=4, progress=False)
