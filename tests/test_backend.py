"""Which backend serves a call: the argument, then use_backend, then the environment, then the best."""

import logging
import threading
from pathlib import Path

import interpreter
import pytest
import torch
from dispatch import Operators

import fastshap_kernels as fk
from fastshap_kernels import _backend

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda:0"), torch.device("meta")
KERNELS = ("cuda", "triton", "cpu")
VALUES = torch.arange(8.0).unsqueeze(1)


def served_by(backend=None):
    """The backend that serves a call, seen from the op that ran."""
    with Operators() as ran:
        fk.exact_shapley(VALUES, backend=backend)
    return "cpu" if "fastshap::exact_shapley" in ran.names else "reference"


@pytest.fixture
def logged(caplog, monkeypatch):
    """Messages logged from here on, as in a process that has logged nothing yet."""
    monkeypatch.setattr(_backend, "_logged", set())
    caplog.set_level(logging.INFO, logger="fastshap_kernels")
    return caplog


def test_the_best_backend_is_the_default():
    assert served_by() == "cpu"


@pytest.mark.parametrize("outer", ["reference", "cpu"])
@pytest.mark.parametrize("inner", ["reference", "cpu"])
def test_the_argument_wins_over_use_backend_and_the_inner_block_over_the_outer(outer, inner):
    with fk.use_backend(outer):
        assert served_by() == outer
        assert served_by(inner) == inner
        with fk.use_backend(inner):
            assert served_by() == inner
        assert served_by() == outer
    assert served_by() == "cpu"


def test_use_backend_ends_with_an_exception():
    with pytest.raises(KeyError), fk.use_backend("reference"):
        raise KeyError
    assert served_by() == "cpu"


def test_use_backend_concerns_one_thread():
    seen = {}

    def look(name):
        seen[name] = served_by()
        with fk.use_backend("cpu"):
            seen[name + " in a block"] = served_by()

    with fk.use_backend("reference"):
        thread = threading.Thread(target=look, args=("other",))
        thread.start()
        thread.join()
        seen["this"] = served_by()
    assert seen == {"other": "cpu", "other in a block": "cpu", "this": "reference"}


def test_the_environment_comes_after_use_backend_and_before_the_best():
    code = """
import threading
import fastshap_kernels as fk
from test_backend import served_by
seen = [served_by(), served_by("cpu")]
thread = threading.Thread(target=lambda: seen.append(served_by()))
thread.start(); thread.join()
with fk.use_backend("cpu"):
    seen.append(served_by())
print(*seen)
"""
    folders = interpreter.PACKAGE.parent, Path(__file__).parent
    served = interpreter.output(code, *folders, FASTSHAP_BACKEND="reference")
    assert served.split() == ["reference", "cpu", "reference", "cpu"]


def test_an_unknown_name_in_the_environment_stops_the_import():
    process = interpreter.run("import fastshap_kernels", FASTSHAP_BACKEND="gpu")
    assert process.returncode == 1
    message = (
        "ValueError: the environment variable FASTSHAP_BACKEND names the backend 'gpu', which does not exist. "
        "Choose one of reference, cpu, triton, cuda."
    )
    assert process.stderr.strip().endswith(message)


def test_unknown_names_are_refused():
    with pytest.raises(
        ValueError, match=r"use_backend names the backend 'gpu'.*Choose one of reference, cpu, triton, cuda"
    ):
        fk.use_backend("gpu").__enter__()
    with pytest.raises(ValueError, match=r"exact_shapley: argument `backend` names the backend 'CPU'"):
        fk.exact_shapley(VALUES, backend="CPU")


@pytest.mark.parametrize("explicit", ["argument", "use_backend"])
@pytest.mark.parametrize(
    ("arguments", "chosen", "reason", "available"),
    [
        ({"device": META}, "cpu", "it serves CPU tensors, and these are on meta", "reference"),
        ({"device": CUDA}, "cpu", "it serves CPU tensors, and these are on cuda:0", "reference"),
        ({}, "triton", "it serves CUDA tensors, and these are on cpu", "reference, cpu"),
        ({}, "cuda", "it serves CUDA tensors, and these are on cpu", "reference, cpu"),
        ({"unsupported": {"cpu": "no float8"}}, "cpu", "no float8", "reference"),
        ({"kernels": ("triton",)}, "cpu", "this op has no such backend", "reference"),
        ({"kernels": ()}, "triton", "this op has no such backend", "reference"),
    ],
)
def test_an_explicit_choice_never_falls_back(arguments, chosen, reason, available, explicit):
    arguments = {"device": CPU, "backend": None, "kernels": KERNELS} | arguments
    message = f"an_op: the backend '{chosen}' can't serve this call: {reason}. Available: {available}."
    if explicit == "argument":
        with pytest.raises(RuntimeError, match=message):
            _backend.select("an_op", **arguments | {"backend": chosen})
    else:
        with fk.use_backend(chosen), pytest.raises(RuntimeError, match=message):
            _backend.select("an_op", **arguments)


def test_the_best_backend_that_serves_the_device_is_chosen(monkeypatch, logged):
    monkeypatch.setattr(_backend._native, "cuda_problem", None)
    monkeypatch.setattr(_backend, "_triton_problem", None)
    assert _backend.select("an_op", CPU, None, KERNELS) == "cpu"
    assert _backend.select("an_op", CUDA, None, KERNELS) == "cuda"
    assert _backend.select("an_op", CUDA, None, ("triton", "cuda")) == "triton"
    assert logged.messages == []
    assert _backend.select("an_op", CUDA, None, KERNELS, unsupported={"cuda": "no float64"}) == "triton"
    monkeypatch.setattr(_backend._native, "cuda_problem", "not built")
    assert _backend.select("an_op", CUDA, None, KERNELS) == "triton"
    monkeypatch.setattr(_backend, "_triton_problem", "not installed")
    assert _backend.select("an_op", CUDA, None, KERNELS) == "reference"
    assert logged.messages == [
        "an_op runs on 'triton', not on 'cuda': no float64",
        "an_op runs on 'triton', not on 'cuda': not built",
        "an_op runs on 'reference', not on 'cuda': not built",
        "an_op runs on 'reference', not on 'triton': not installed",
    ]


def test_an_op_falls_back_only_by_itself():
    images, bits = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.int32)
    assert fk.mask_patches(images, bits, (2, 2), dtype=torch.float32).dtype == torch.float32
    with pytest.raises(RuntimeError, match="mask_patches: the backend 'cpu' can't serve this call: it converts"):
        fk.mask_patches(images, bits, (2, 2), dtype=torch.float32, backend="cpu")


def test_an_automatic_fallback_is_logged_once_for_each_reason(logged):
    for _ in range(3):
        assert _backend.select("an_op", CPU, None, KERNELS, unsupported={"cpu": "no float8"}) == "reference"
        assert _backend.select("an_op", META, None, KERNELS) == "reference"
    assert logged.messages == [
        "an_op runs on 'reference', not on 'cpu': no float8",
        "an_op runs on 'reference': no other backend serves tensors on meta",
    ]


def test_nothing_is_logged_for_a_choice_or_the_best_or_the_only_backend(logged):
    _backend.select("an_op", CPU, None, KERNELS)
    _backend.select("an_op", CPU, None, ())
    _backend.select("an_op", CPU, "reference", KERNELS, unsupported={"cpu": "no float8"})
    assert logged.messages == []
