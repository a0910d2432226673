"""pack_tokens beside indexing with a mask."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor
from torch.nn.functional import pad

import fastshap_kernels as fk
from bench.lib.rows import Provider, Row, beside, in_dtypes
from fastshap_kernels.testing import Case


def indexed(case: Case, sizes: dict[str, Any]) -> Provider:
    """The repeated tokens, by a ready boolean mask; with the lengths, that ours gives too."""
    kept = pad(fk.unpack_bits(case.tensors["bits"], sizes["players"]), (sizes["prefix"], 0), value=True)

    def compute(tokens: Tensor, bits: Tensor) -> Tensor:
        kept.sum(2).flatten().cumsum(0)
        return tokens.unsqueeze(1).expand(-1, sizes["coalitions"], -1, -1)[kept]

    return beside(case, compute)


def gpu_rows(tiny: bool) -> list[Row]:
    batch, width = (1, 48) if tiny else (64, 768)
    sizes = {"batch": batch, "coalitions": 8, "players": 196, "prefix": 1, "width": width}
    shape = f"ViT-B: B {batch}, M 8, P 196, Q 1, D {width}"
    return in_dtypes("pack_tokens", shape, sizes, ("tokens",))


@pytest.mark.parametrize("width", [pytest.param(384, marks=pytest.mark.short), 1152])
def test_pack_tokens(pair, width):
    sizes = {"batch": 4, "coalitions": 4, "players": 196, "prefix": 1, "width": width}
    shape = f"B 4, M 4, P 196, Q 1, D {width}, float32, forward + backward"
    rivals = {"indexing the repeated tokens with a ready boolean mask": indexed}
    pair.of_row(Row("pack_tokens", shape, sizes, ("tokens",), rivals))
