"""exact_shapley beside one matrix product."""

from __future__ import annotations

from typing import Any

import pytest

from bench.lib.rows import Provider, Row, beside
from fastshap_kernels.reference.exact_shapley import coefficients
from fastshap_kernels.testing import Case


def product(case: Case, sizes: dict[str, Any]) -> Provider:
    """In float64, with the ready (P, 2^P) weights."""
    weights = coefficients(sizes["players"], case.device)
    return beside(case, lambda values: weights @ values.double())


def gpu_rows(tiny: bool) -> list[Row]:
    players, classes = (6, 24) if tiny else (16, 1000)
    sizes = {"batch": 1, "players": players, "classes": classes}
    return [Row("exact_shapley", f"B 1, P {players}, K {classes}", sizes, ("values",), compiled=True)]


@pytest.mark.parametrize(
    ("batch", "players", "classes"),
    [(20, 16, 10), pytest.param(20, 10, 10), pytest.param(20, 12, 10, marks=pytest.mark.short), (4, 12, 1000)],
)
def test_exact_shapley(pair, batch, players, classes):
    sizes = {"batch": batch, "players": players, "classes": classes}
    against = "one float64 matrix product with the ready (P, 2^P) weights"
    shape = f"B {batch}, P {players}, K {classes}, float32"
    pair.of_row(Row("exact_shapley", shape, sizes, (), {against: product}), "forward")
