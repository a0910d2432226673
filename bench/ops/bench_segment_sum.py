"""segment_sum beside index_add; on a GPU, layer_norm_segment_sum too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench.lib.rows import Provider, Row, beside, in_dtypes
from fastshap_kernels.testing import Case


def index_add(case: Case, sizes: dict[str, Any]) -> Provider:
    """With ready indices; the prefix rows go to a sum that is dropped."""
    cu_seqlens, count = case.tensors["cu_seqlens"], sizes["batch"] * sizes["coalitions"]
    sequence = torch.arange(count).repeat_interleave(cu_seqlens.diff())
    sequence[cu_seqlens[:-1].long()] = count
    return beside(case, lambda rows, **_: rows.new_zeros(count + 1, rows.shape[1]).index_add(0, sequence, rows)[:count])


def gpu_rows(tiny: bool) -> list[Row]:
    batch, width = (1, 48) if tiny else (64, 768)
    sizes = {"batch": batch, "coalitions": 8, "players": 196, "prefix": 1, "width": width}
    shape = f"ViT-B: B {batch}, M 8, P 196, Q 1, D {width}"
    found = in_dtypes("segment_sum", shape, sizes, ("rows",))
    return found + in_dtypes("layer_norm_segment_sum", shape, sizes, ("rows", "weight", "bias"))


@pytest.mark.short
def test_segment_sum(pair):
    sizes = {"batch": 8, "coalitions": 2, "players": 196, "prefix": 1, "width": 384}
    shape = "16 sequences of 196 players in pairs, Q 1, D 384, float32, forward + backward"
    row = Row("segment_sum", shape, sizes, ("rows",), {"index_add with ready indices": index_add})
    pair.of_row(row)
