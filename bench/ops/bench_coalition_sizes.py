import pytest
import torch

import fastshap_kernels as fk

PLAYERS = 196


@pytest.fixture(params=[(32, 4), (1024, 64)], ids=["step", "record"])
def bits(request):
    """The coalitions of a training step, and of a record."""
    return fk.sample_coalitions(*request.param, PLAYERS, seed=0)


def compare_with(compare, bits, plain, against):
    compare(
        "coalition_sizes",
        f"{bits.shape[0] * bits.shape[1]} coalitions, P {PLAYERS}",
        lambda: fk.coalition_sizes(bits, PLAYERS),
        plain,
        against=against,
        bar=1.0,
        rounds=60,
    )


def test_coalition_sizes(compare, bits):
    compare_with(compare, bits, lambda: fk.unpack_bits(bits, PLAYERS).sum(-1), "unpack to bool masks, sum")


def test_coalition_sizes_of_ones(compare, bits):
    ones = torch.ones(bits.shape[0], PLAYERS, 1)
    compare_with(compare, bits, lambda: fk.coalition_sum(ones, bits), "coalition_sum of ready ones")
