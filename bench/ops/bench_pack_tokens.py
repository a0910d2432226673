import pytest
import torch

import fastshap_kernels as fk

BATCH, COALITIONS, PLAYERS = 4, 4, 196


@pytest.mark.parametrize("width", [384, 1152])
def test_pack_tokens(compare, width):
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(BATCH, COALITIONS // 2, PLAYERS, generator=generator) < 0.5
    present = torch.stack([present, ~present], 2).flatten(1, 2)
    bits = fk.pack_bits(present)
    kept = torch.nn.functional.pad(present, (1, 0), value=True)
    tokens = torch.randn(BATCH, 1 + PLAYERS, width, generator=generator, requires_grad=True)
    cotangent = torch.randn(int(kept.sum()), width, generator=generator)

    def plain():
        lengths = kept.sum(2).flatten().cumsum(0)
        rows = tokens.unsqueeze(1).expand(-1, COALITIONS, -1, -1)[kept]
        return torch.autograd.grad(rows, tokens, cotangent), lengths

    compare(
        "pack_tokens",
        f"B 4, M 4, P 196, Q 1, D {width}, float32, forward + backward",
        lambda: torch.autograd.grad(fk.pack_tokens(tokens, bits, 1, paired=True)[0], tokens, cotangent),
        plain,
        against="indexing the repeated tokens with a ready boolean mask",
    )
