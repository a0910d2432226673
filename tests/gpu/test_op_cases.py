"""The table of cases on the processor, so that it holds when a device comes."""

import pytest
import torch
from accuracy import BACKEND

import fastshap_kernels as fk
from fastshap_kernels import testing

#: Triton's interpreter takes long.
SEEDS = range(3 if BACKEND == "cpu" else 1)
TABLE = [pytest.param(op, id=op) for op in testing.OPS if BACKEND in testing.backends(op, BACKEND)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", TABLE)
def test_accurate(op, dtype, seed):
    sizes = testing.sizes(op, seed) if BACKEND == "cpu" else {}
    testing.check_accuracy(testing.make(op, seed, dtype, "cpu", **sizes), BACKEND)


@pytest.mark.parametrize("op", TABLE)
def test_five_runs_give_the_same_bits(op):
    testing.check_repeatable(testing.make(op, 0, torch.bfloat16, "cpu"), BACKEND)


def test_every_case_has_sizes_to_choose_from():
    assert set(testing.SIZES) == set(testing.OPS)


def coalition_sum_by_hand(features, bits):
    return torch.einsum("bmp,bpl->bml", fk.unpack_bits(bits, features.shape[1]).to(features.dtype), features)


def test_a_function_of_ones_own_is_held_to_the_same_rule():
    case = testing.make("coalition_sum", 0, torch.float32, "cpu", **testing.sizes("coalition_sum", 0))
    testing.check_accuracy(case, coalition_sum_by_hand)
    testing.check_repeatable(case, coalition_sum_by_hand)
    with pytest.raises(AssertionError):
        testing.check_accuracy(case, lambda features, bits: coalition_sum_by_hand(features.bfloat16(), bits).float())


def test_a_function_of_ones_own_is_given_the_options_too():
    seen = {}

    def pack_tokens(**arguments):
        seen.update(arguments)
        return fk.pack_tokens(**arguments)

    testing.check_accuracy(testing.make("pack_tokens", 0, torch.float32, "cpu", prefix=5), pack_tokens)
    assert set(seen) == {"tokens", "bits", "prefix", "paired"}
    assert seen["prefix"] == 5
