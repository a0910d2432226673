import pytest
import torch

import fastshap_kernels as fk


@pytest.mark.parametrize("normalization", ["none", "additive"])
def test_shapley_regression_loss(compare, normalization):
    generator = torch.Generator().manual_seed(0)
    phi = torch.randn(32, 196, 1000, generator=generator, requires_grad=True)
    present = torch.rand(32, 8, 196, generator=generator) < 0.5
    bits, masks = fk.pack_bits(present), present.float()
    values = torch.randn(32, 8, 1000, generator=generator)
    grand = torch.randn(32, 1000, generator=generator)

    def ours():
        loss = fk.shapley_regression_loss(phi, bits, values, grand=grand, normalization=normalization)
        return torch.autograd.grad(loss, phi)

    def plain():
        normalized = phi + (grand - phi.sum(1)).unsqueeze(1) / 196 if normalization == "additive" else phi
        loss = (values - torch.einsum("bmp,bpk->bmk", masks, normalized)).square().mean()
        return torch.autograd.grad(loss, phi)

    switch = ", additive normalization" if normalization == "additive" else ""
    compare(
        "shapley_regression_loss",
        f"B 32, M 8, P 196, K 1000, float32, forward + backward{switch}",
        ours,
        plain,
        against="einsum with ready float masks",
        bar=1.5,
        rounds=60,
    )
