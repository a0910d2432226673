import pytest
import torch

import fastshap_kernels as fk
from fastshap_kernels.reference.exact_shapley import coefficients


@pytest.mark.parametrize(("batch", "players", "classes"), [(20, 16, 10), (20, 10, 10), (20, 12, 10), (4, 12, 1000)])
def test_exact_shapley(compare, batch, players, classes):
    values = torch.randn(batch, 2**players, classes, generator=torch.Generator().manual_seed(0))
    weights = coefficients(players, values.device)
    compare(
        "exact_shapley",
        f"B {batch}, P {players}, K {classes}, float32",
        lambda: fk.exact_shapley(values),
        lambda: weights @ values.double(),
        against="one float64 matrix product with the ready (P, 2^P) weights",
        bar=1.0,
    )
