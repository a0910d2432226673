"""mask_patches beside a product with ready masks, and a copy of as many bytes."""

from __future__ import annotations

from typing import Any

import pytest

import fastshap_kernels as fk
from bench.lib.rows import Provider, Row, beside, in_dtypes
from fastshap_kernels.testing import Case

SIZES: dict[str, Any] = {"coalitions": 8, "grid": (14, 14), "patch": (16, 16)}


def repeated(case: Case, sizes: dict[str, Any]) -> Provider:
    """Without a baseline: absent pixels are 0."""
    present = fk.unpack_bits(case.tensors["bits"], 196).view(-1, 1, 14, 14)
    masks = present.repeat_interleave(16, 2).repeat_interleave(16, 3).float()
    return beside(case, lambda images, **_: images.repeat_interleave(sizes["coalitions"], 0) * masks)


def copied(case: Case, sizes: dict[str, Any]) -> Provider:
    images = case.tensors["images"].repeat_interleave(sizes["coalitions"], 0)
    return Provider(images.clone, [], None)


def gpu_rows(tiny: bool) -> list[Row]:
    batch = 1 if tiny else 64
    found = []
    for name in ("contiguous", "channels_last"):
        sizes = SIZES | {"batch": batch, "channels_last": name == "channels_last"}
        shape = f"B {batch}, M 8, 3x224x224, P 196, {name}"
        found += in_dtypes("mask_patches", shape, sizes, ("images",), compiled=name == "contiguous")
    return found


@pytest.mark.parametrize(
    ("against", "rival"),
    [
        pytest.param(
            "repeat_interleave, multiply by a ready pixel mask", repeated, id="repeated", marks=pytest.mark.short
        ),
        pytest.param("a copy of the same bytes", copied, id="copied"),
    ],
)
def test_mask_patches(pair, against, rival):
    shape = "B 8, M 8, 3x224x224, P 196, float32"
    pair.of_row(Row("mask_patches", shape, SIZES | {"batch": 8}, (), {against: rival}), "forward")
