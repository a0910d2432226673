"""The CPU kernels as they are compiled for each instruction set of this processor."""

import re

import interpreter
import pytest
import torch

from fastshap_kernels import _native, testing

OPS = [op for op in testing.OPS if "cpu" in testing.backends(op, "cpu")]


@pytest.fixture
def set_capability():
    before = _native.cpu_capability()
    yield _native.set_cpu_capability
    _native.set_cpu_capability(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", OPS)
def test_every_clone_is_accurate(op, dtype, set_capability):
    case = testing.make(op, 1, dtype, "cpu", **testing.sizes(op, 1))
    for name in _native.cpu_capabilities():
        set_capability(name)
        testing.check_accuracy(case, "cpu")


@pytest.mark.parametrize("op", ["sample_coalitions", "coalition_sizes", "pack_tokens", "mask_patches"])
def test_clones_that_only_choose_and_copy_give_the_same_bits(op, set_capability):
    outputs = []
    for name in _native.cpu_capabilities():
        set_capability(name)
        case = testing.make(op, 0, torch.float32, "cpu", **testing.sizes(op, 0))
        outputs.append(case.call("cpu", **case.tensors))
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.skipif("avx2" not in _native.cpu_capabilities(), reason="this processor has one instruction set")
def test_a_forced_clone_is_the_one_that_runs(set_capability):
    # Only the second multiplies and adds in one rounding, so of many sums some differ in the last digit.
    case = testing.make("packed_attention", 0, torch.float32, "cpu", head_dim=64)
    outputs = []
    for name in ("default", "avx2"):
        set_capability(name)
        outputs.append(case.call("cpu", **case.tensors))
    assert not torch.equal(*outputs)


@pytest.mark.parametrize("name", _native.cpu_capabilities())
def test_the_environment_chooses_and_info_shows_it(name):
    code = "from fastshap_kernels.info import report\nprint(report())"
    report = interpreter.output(code, FASTSHAP_CPU_CAPABILITY=name)
    here = ", ".join(_native.cpu_capabilities())
    assert re.search(rf"^cpu compiled for +{name}, by FASTSHAP_CPU_CAPABILITY; here: {here}$", report, re.MULTILINE)


def test_an_unknown_name_in_the_environment_stops_the_import():
    process = interpreter.run("import fastshap_kernels", FASTSHAP_CPU_CAPABILITY="sse")
    assert process.returncode == 1
    assert process.stderr.strip().endswith(
        "ValueError: the environment variable FASTSHAP_CPU_CAPABILITY must be one of default, avx2, avx512, "
        "avx512_bf16, but it is 'sse'. Leave it out for the best of this processor."
    )


def test_a_capability_that_this_processor_lacks_stops_the_import():
    lacking = [name for name in _native.CPU_CAPABILITIES if name not in _native.cpu_capabilities()]
    if not lacking:
        pytest.skip("this processor has them all")
    process = interpreter.run("import fastshap_kernels", FASTSHAP_CPU_CAPABILITY=lacking[0])
    assert process.returncode == 1
    assert f"FASTSHAP_CPU_CAPABILITY is '{lacking[0]}', but this processor has" in process.stderr
