import pytest
import torch
from accuracy import random_bits

import fastshap_kernels as fk


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("normalization", ["none", "additive"])
def test_equals_the_loss_of_explicit_shapley_values(generator, normalization, reduction):
    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    bits = random_bits(2, 3, 33, generator)
    head = features, weight, bias = random(2, 33, 5), random(4, 5), random(4)
    game = [random(2, 3, 4), random(4), random(2, 4), random(2, 3)]
    switches = {"normalization": normalization, "reduction": reduction}
    linear = fk.linear_shapley_loss(*head, bits, *game, **switches)
    phi = torch.nn.functional.linear(features, weight, bias)
    explicit = fk.shapley_regression_loss(phi, bits, *game, **switches)
    assert torch.allclose(linear, explicit, rtol=1e-12, atol=1e-12)
    inputs = [*head, *game]
    gradients = zip(
        torch.autograd.grad(linear.sum(), inputs, materialize_grads=True),
        torch.autograd.grad(explicit.sum(), inputs, materialize_grads=True),
        strict=True,
    )
    assert all(torch.allclose(ours, plain, rtol=1e-12, atol=1e-12) for ours, plain in gradients)
