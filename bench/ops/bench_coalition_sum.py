import torch

import fastshap_kernels as fk


def test_coalition_sum(compare):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(32, 196, 384, generator=generator, requires_grad=True)
    bits = fk.pack_bits(torch.rand(32, 4, 196, generator=generator) < 0.5)
    cotangent = torch.randn(32, 4, 384, generator=generator)

    def ours():
        return torch.autograd.grad(fk.coalition_sum(features, bits), features, cotangent)

    def plain():
        return torch.autograd.grad(torch.bmm(fk.unpack_bits(bits, 196).float(), features), features, cotangent)

    compare(
        "coalition_sum",
        "B 32, M 4, P 196, L 384, float32, forward + backward",
        ours,
        plain,
        against="unpack to float masks, bmm",
        bar=1.0,
        rounds=60,
    )
