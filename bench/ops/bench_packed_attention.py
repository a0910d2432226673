import torch
from torch.nn.functional import pad, scaled_dot_product_attention

import fastshap_kernels as fk


def masked_dense(qkv, present):
    """What dropping players replaces: every token of every coalition, absent players' keys masked."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return scaled_dot_product_attention(query, key, value, attn_mask=pad(present, (1, 0), value=True)[:, None, None])


def test_packed_attention(compare):
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(8, 196, generator=generator) < torch.rand(8, 1, generator=generator)
    present = torch.stack([present, ~present], 1).flatten(0, 1)
    cu_seqlens = pad((present.sum(1) + 1).cumsum(0), (1, 0)).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, 6, 64, generator=generator, requires_grad=True)
    cotangent = torch.randn(qkv.shape[0], 6, 64, generator=generator)
    dense = torch.randn(16, 197, 3, 6, 64, generator=generator, requires_grad=True)
    dense_cotangent = torch.randn(16, 6, 197, 64, generator=generator)
    compare(
        "packed_attention",
        "16 coalitions of 196 players in pairs, Q 1, 6 heads of 64, float32, forward + backward",
        lambda: torch.autograd.grad(fk.packed_attention(qkv, cu_seqlens, 197), qkv, cotangent),
        lambda: torch.autograd.grad(masked_dense(dense, present), dense, dense_cotangent),
        against="scaled_dot_product_attention on all tokens, absent keys masked",
    )


def test_packed_attention_on_short_sequences(compare):
    """Every coalition of a small game, as exact Shapley values need them."""
    generator = torch.Generator().manual_seed(0)
    present = fk.unpack_bits(torch.arange(4096, dtype=torch.int32).unsqueeze(1), 12)
    cu_seqlens = pad((present.sum(1) + 1).cumsum(0), (1, 0)).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, 4, 16, generator=generator)
    dense = torch.randn(4096, 13, 3, 4, 16, generator=generator)
    compare(
        "packed_attention",
        "4096 coalitions of 12 players, Q 1, 4 heads of 16, float32",
        lambda: fk.packed_attention(qkv, cu_seqlens, 13),
        lambda: masked_dense(dense, present),
        against="scaled_dot_product_attention on all tokens, absent keys masked",
    )
