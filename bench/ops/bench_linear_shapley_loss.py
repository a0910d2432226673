"""linear_shapley_loss beside the head's Shapley values made, in time and in memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastshap_kernels as fk
from bench.lib.memory import LiveMemory
from bench.lib.rows import Provider, Row, beside
from fastshap_kernels.testing import Case

AGAINST = "Shapley values made by linear, einsum with ready float masks"


def eager(case: Case, sizes: dict[str, Any]) -> Provider:
    masks = fk.unpack_bits(case.tensors["bits"], sizes["players"]).to(case.tensors["values"].dtype)

    def compute(features: Tensor, weight: Tensor, bias: Tensor, bits: Tensor, values: Tensor) -> Tensor:
        phi = linear(features, weight, bias)
        return (values.float() - torch.bmm(masks, phi).float()).square().mean()

    return beside(case, compute)


def row(rival: str, batch: int, coalitions: int, width: int, classes: int, **options: Any) -> Row:
    shape = f"B {batch}, M {coalitions}, P 196, L {width}, K {classes}" + options.pop("words", "")
    sizes = {"batch": batch, "coalitions": coalitions, "players": 196, "width": width, "classes": classes}
    leaves = "features", "weight", "bias"
    return Row("linear_shapley_loss", shape, sizes | {"reduction": "mean"}, leaves, {rival: eager}, **options)


def gpu_rows(tiny: bool) -> list[Row]:
    batch, classes = (2, 48) if tiny else (128, 21841)
    return [row("eager", batch, 8, 768, classes, dtype=torch.bfloat16, compiled=True)]


CPU_ROW = row(AGAINST, 32, 4, 384, 1000, words=", float32, forward + backward")


def peak_mb(provider: Provider, case: Case) -> float:
    """Bytes of tensors alive after any operator, at the peak, beyond inputs and returned gradients."""
    call, _ = provider.calls("both")
    with LiveMemory([*provider.leaves, *case.tensors.values()]) as memory:
        returned = call()
    return memory.peak(without=returned) / 1e6


@pytest.mark.short
def test_linear_shapley_loss(pair):
    case = CPU_ROW.case("cpu")
    ours, plain = (peak_mb(CPU_ROW.providers(case)[name](), case) for name in ("cpu", AGAINST))
    assert plain / ours >= 10
    pair.of_row(CPU_ROW, rounds=9, ours_mb=ours, plain_mb=plain, memory_ratio=plain / ours)
