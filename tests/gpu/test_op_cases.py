"""The table of cases on the processor, so that it holds when a device comes."""

import op_cases
import op_checks
import pytest
import torch
from accuracy import BACKEND

#: Triton's interpreter takes long.
SEEDS = range(3 if BACKEND == "cpu" else 1)
TABLE = [pytest.param(op, id=op) for op in op_cases.MAKERS if BACKEND in op_cases.backends(op, BACKEND)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", TABLE)
def test_accurate(op, dtype, seed):
    sizes = op_cases.sizes(op, seed) if BACKEND == "cpu" else {}
    op_checks.check_accuracy(op_cases.make(op, seed, dtype, "cpu", **sizes), BACKEND)


@pytest.mark.parametrize("op", TABLE)
def test_five_runs_give_the_same_bits(op):
    op_checks.check_repeatable(op_cases.make(op, 0, torch.bfloat16, "cpu"), BACKEND)


def test_every_case_has_sizes_to_choose_from():
    assert set(op_cases.SIZES) == set(op_cases.MAKERS)
