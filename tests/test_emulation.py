"""The emulation of CUDA kernels: what is wrong on a device must be wrong here."""

import subprocess
import sys
from pathlib import Path

import interpreter
import pytest
import torch

EMULATION = Path(__file__).parent / "emulation"


@pytest.fixture(scope="module")
def ops(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulation") / "reverse.so"
    command = [sys.executable, EMULATION / "build.py", library, EMULATION / "reverse.cu"]
    subprocess.run(list(map(str, command)), check=True)
    torch.ops.load_library(str(library))
    return torch.ops.fastshap_emulation


@pytest.fixture(params=["rising", "falling"])
def order(request, monkeypatch):
    monkeypatch.setenv("FASTSHAP_EMULATE_ORDER", request.param)
    return request.param


VALUES = torch.arange(64.0)


def test_threads_meet_at_barriers(ops, order):
    assert torch.equal(ops.reverse(VALUES, 0), VALUES.flip(0))


def test_a_missing_barrier_shows(ops, order):
    ops.reverse(VALUES, 1)  # leaves its values in shared memory
    assert not torch.equal(ops.reverse(VALUES + 1, 1), VALUES.flip(0) + 1)


def test_a_barrier_that_some_threads_never_reach_is_an_error(ops, order):
    with pytest.raises(RuntimeError, match="reverse: a barrier or warp exchange that some threads never reach"):
        ops.reverse(VALUES, 2)


def test_warp_exchanges(ops, order):
    values = torch.arange(64.0) - 40
    sums, positive = ops.sum_warps(values)
    assert torch.equal(sums, values.view(2, 32).sum(1).repeat_interleave(32))
    assert torch.equal(positive, (values > 0).view(2, 32).sum(1).repeat_interleave(32).float())


def test_a_library_that_is_not_there_is_named(tmp_path):
    code = "import fastshap_kernels as fk, torch; fk.exact_shapley(torch.zeros(2, 1), backend='cuda')"
    process = interpreter.run(code, FASTSHAP_EMULATE_CUDA=str(tmp_path / "none.so"))
    assert "exact_shapley: the backend 'cuda' can't serve this call: none.so was not built" in process.stderr
