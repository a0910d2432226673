import pytest
import torch
from accuracy import random_bits

import fastshap_kernels as fk


def definition(phi, bits, values, null, grand, weights, normalization, reduction):
    """The loss by loops."""
    (batch, players, classes), coalitions = phi.shape, bits.shape[1]
    present = fk.unpack_bits(bits, players)
    losses = torch.zeros(batch, coalitions, classes, dtype=phi.dtype)
    for b in range(batch):
        row = phi[b] + (grand[b] - null[b] - phi[b].sum(0)) / players if normalization == "additive" else phi[b]
        for m in range(coalitions):
            predicted = sum((row[p] for p in range(players) if present[b, m, p]), torch.zeros(classes))
            losses[b, m] = weights[b, m] * (values[b, m] - null[b] - predicted) ** 2
    return {"mean": losses.mean(), "sum": losses.sum(), "none": losses.mean(-1)}[reduction]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalization", ["none", "additive"])
def test_definition(generator, normalization, reduction):
    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    bits = random_bits(2, 3, 33, generator)
    phi, values, null, grand, weights = random(2, 33, 4), random(2, 3, 4), random(2, 4), random(2, 4), random(2, 3)
    switches = {"normalization": normalization, "reduction": reduction}
    loss = fk.shapley_regression_loss(phi, bits, values, null, grand, weights, **switches)
    exact = definition(phi, bits, values, null, grand, weights, **switches)
    assert torch.allclose(loss, exact, rtol=1e-12, atol=1e-12)
