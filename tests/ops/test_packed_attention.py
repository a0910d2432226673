import torch
from accuracy import random_bits

import fastshap_kernels as fk


def test_dropping_players_equals_masking_their_keys(generator):
    batch, coalitions, players, prefix, heads, head_dim = 2, 4, 5, 1, 2, 8
    bits = random_bits(batch, coalitions, players, generator)
    tokens = torch.randn(batch, prefix + players, 3 * heads * head_dim, generator=generator, dtype=torch.float64)
    rows, cu_seqlens, max_seqlen = fk.pack_tokens(tokens, bits, prefix)
    out = fk.packed_attention(rows.view(-1, 3, heads, head_dim), cu_seqlens, max_seqlen)
    pooled = fk.segment_sum(out.flatten(1), cu_seqlens, prefix)

    present = fk.unpack_bits(bits, players)
    keys = torch.nn.functional.pad(present, (prefix, 0), value=True).view(batch, coalitions, 1, 1, prefix + players)
    tiled = tokens.view(batch, 1, prefix + players, 3, heads, head_dim).expand(-1, coalitions, -1, -1, -1, -1)
    query, key, value = tiled.permute(3, 0, 1, 4, 2, 5)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
    dense = dense.transpose(2, 3).flatten(3)[:, :, prefix:] * present.unsqueeze(-1)
    torch.testing.assert_close(pooled, dense.sum(2).flatten(0, 1), rtol=1e-12, atol=1e-12)
