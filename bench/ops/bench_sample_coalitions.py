import torch

import fastshap_kernels as fk

PLAYERS = 196
SIZES = torch.arange(1, PLAYERS)
WEIGHTS = 1.0 / (SIZES * (PLAYERS - SIZES))
SHAPE = f"4096 coalitions, P {PLAYERS}"


def plain(count):
    """The sampler that fits in three lines: a bool mask (n, P)."""
    sizes = torch.multinomial(WEIGHTS, count, replacement=True) + 1
    # A random permutation serves as the ranks: one sort, not two.
    return torch.rand(count, PLAYERS).argsort(1) < sizes.unsqueeze(1)


def plain_paired(count):
    present = plain(count // 2)
    return torch.stack((present, ~present), 1)


def test_sample_coalitions(compare):
    compare(
        "sample_coalitions, unpaired",
        SHAPE,
        lambda: fk.sample_coalitions(1024, 4, PLAYERS, seed=0, paired=False),
        lambda: plain(4096),
        against="PyTorch: multinomial of sizes, argsort of uniform numbers < size, bool masks",
        bar=10.0,
    )


def test_sample_coalitions_paired(compare):
    compare(
        "sample_coalitions, paired",
        SHAPE,
        lambda: fk.sample_coalitions(1024, 4, PLAYERS, seed=0),
        lambda: plain_paired(4096),
        against="PyTorch: multinomial of sizes, argsort of uniform numbers < size, and complements, bool masks",
        bar=10.0,
    )
