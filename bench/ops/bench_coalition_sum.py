"""coalition_sum beside a product with masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fastshap_kernels as fk
from bench.lib.rows import Provider, Row, beside, in_dtypes
from fastshap_kernels.testing import Case


def unpacked(case: Case, sizes: dict[str, Any]) -> Provider:
    return beside(
        case, lambda features, bits: torch.bmm(fk.unpack_bits(bits, sizes["players"]).to(features.dtype), features)
    )


def gpu_rows(tiny: bool) -> list[Row]:
    batch, width = (2, 24) if tiny else (128, 1000)
    found = []
    for coalitions in (32, 8, 2):
        sizes = {"batch": batch, "coalitions": coalitions, "players": 196, "width": width}
        shape = f"B {batch}, M {coalitions}, P 196, L {width}"
        found += in_dtypes("coalition_sum", shape, sizes, ("features",), compiled=coalitions == 32)
    return found


@pytest.mark.short
def test_coalition_sum(pair):
    sizes = {"batch": 32, "coalitions": 4, "players": 196, "width": 384}
    shape = "B 32, M 4, P 196, L 384, float32, forward + backward"
    row = Row("coalition_sum", shape, sizes, ("features",), {"unpack to float masks, bmm": unpacked})
    pair.of_row(row)
