"""shapley_regression_loss beside one product with ready masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import fastshap_kernels as fk
from bench.lib.rows import Provider, Row, beside
from fastshap_kernels.testing import Case


def eager(case: Case, sizes: dict[str, Any]) -> Provider:
    players = sizes["players"]
    masks = fk.unpack_bits(case.tensors["bits"], players).to(case.tensors["phi"].dtype)

    def compute(phi: Tensor, bits: Tensor, values: Tensor, grand: Tensor | None = None) -> Tensor:
        if grand is not None:
            phi = phi + (grand - phi.sum(1)).unsqueeze(1) / players
        return (values.float() - torch.bmm(masks, phi).float()).square().mean()

    return beside(case, compute)


def gpu_rows(tiny: bool) -> list[Row]:
    batch, classes = (2, 24) if tiny else (128, 1000)
    return [
        Row(
            "shapley_regression_loss",
            f"B {batch}, M {coalitions}, P 196, K {classes}",
            {"batch": batch, "coalitions": coalitions, "players": 196, "classes": classes, "reduction": "mean"},
            ("phi",),
            {"eager": eager},
            dtype,
            compiled=coalitions == 32,
        )
        for coalitions in (32, 8, 2)
        for dtype in (torch.bfloat16, torch.float32)
    ]


@pytest.mark.parametrize("normalization", [pytest.param("none", marks=pytest.mark.short), "additive"])
def test_shapley_regression_loss(pair, normalization):
    sizes = {"batch": 32, "coalitions": 8, "players": 196, "classes": 1000, "reduction": "mean"}
    switch = ", additive normalization" if normalization == "additive" else ""
    shape = f"B 32, M 8, P 196, K 1000, float32, forward + backward{switch}"
    rivals = {"einsum with ready float masks": eager}
    row = Row("shapley_regression_loss", shape, sizes | {"normalization": normalization}, ("phi",), rivals)
    pair.of_row(row)
