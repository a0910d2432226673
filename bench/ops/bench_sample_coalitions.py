"""sample_coalitions beside the sampler that fits in three lines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.lib.rows import Provider, Row
from fastshap_kernels.testing import Case


def argsort_sampler(case: Case, sizes: dict[str, Any]) -> Provider:
    """A bool mask (n, P)."""
    players, device = sizes["players"], case.device
    count = sizes["batch"] * sizes["coalitions"] // (2 if sizes["paired"] else 1)
    size = torch.arange(1, players, device=device)
    weights = 1.0 / (size * (players - size))

    def forward() -> Tensor:
        drawn = torch.multinomial(weights, count, replacement=True) + 1
        # A random permutation serves as the ranks: one sort, not two.
        present = torch.rand(count, players, device=device).argsort(1) < drawn.unsqueeze(1)
        return torch.stack((present, ~present), 1) if sizes["paired"] else present

    return Provider(forward, [], None)


def row(batch: int, coalitions: int, paired: bool, shape: str, rival: str) -> Row:
    sizes = {"batch": batch, "coalitions": coalitions, "players": 196, "paired": paired}
    return Row("sample_coalitions", shape, sizes, (), {rival: argsort_sampler}, torch.int32)


def gpu_rows(tiny: bool) -> list[Row]:
    batch = 4 if tiny else 8192
    named = {True: "paired", False: "unpaired"}
    return [row(batch, 8, paired, f"{8 * batch} coalitions, P 196, {named[paired]}", "argsort") for paired in named]


@pytest.mark.parametrize(
    "paired", [pytest.param(False, id="unpaired"), pytest.param(True, id="paired", marks=pytest.mark.short)]
)
def test_sample_coalitions(pair, paired):
    complements = "and complements, " if paired else ""
    against = f"PyTorch: multinomial of sizes, argsort of uniform numbers < size, {complements}bool masks"
    op = f"sample_coalitions, {'paired' if paired else 'unpaired'}"
    pair.of_row(row(1024, 4, paired, "4096 coalitions, P 196", against), "forward", op=op)
