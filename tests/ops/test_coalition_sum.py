import torch
from accuracy import random_bits

import fastshap_kernels as fk


def test_definition(generator):
    features = torch.randn(3, 33, 5, generator=generator, dtype=torch.float64)
    bits = random_bits(3, 4, 33, generator)
    present = fk.unpack_bits(bits, 33)
    out = fk.coalition_sum(features, bits)
    for b in range(3):
        for m in range(4):
            assert torch.allclose(out[b, m], features[b, present[b, m]].sum(0), rtol=0, atol=1e-12)
