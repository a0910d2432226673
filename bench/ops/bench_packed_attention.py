"""packed_attention beside attention on all tokens, and PyTorch's own for packed sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

import fastshap_kernels as fk
from bench.lib.rows import Provider, Row
from fastshap_kernels.testing import Case, Draw

MASKED = "scaled_dot_product_attention on all tokens, absent keys masked"


def variable_length_attention(case: Case, sizes: dict[str, Any]) -> Provider:
    """Queries, keys and values apart, as it likes them best."""
    from torch.nn.attention.varlen import varlen_attn

    boundaries, longest = case.tensors["cu_seqlens"], sizes["prefix"] + sizes["players"]
    parts = [x.contiguous().requires_grad_() for x in case.tensors["qkv"].detach().unbind(1)]
    return Provider(
        lambda: varlen_attn(*parts, boundaries, boundaries, longest, longest),
        parts,
        lambda outputs: [outputs[0], *([torch.stack(outputs[1:], 1)] if outputs[1:] else [])],
    )


def masked_attention(case: Case, sizes: dict[str, Any]) -> Provider:
    """What dropping players replaces: every token of every coalition, absent players' keys masked."""
    qkv = case.tensors["qkv"]
    draw = Draw(0, qkv.dtype, qkv.device)
    present = draw.pairs(sizes["batch"], sizes["coalitions"], sizes["players"]).flatten(0, 1)
    return dense_attention(qkv, pad(present, (sizes["prefix"], 0), value=True))


def dense_attention(qkv: Tensor, keys: Tensor) -> Provider:
    """Of sequences whose keys (n, T) are all there but masked; qkv gives heads, dtype and device."""
    count, length = keys.shape
    shape = count, qkv.shape[2], length, qkv.shape[3]
    parts = [torch.randn(shape, dtype=qkv.dtype, device=qkv.device).requires_grad_() for _ in range(3)]
    mask = keys[:, None, None].expand(-1, 1, length, -1)
    return Provider(lambda: scaled_dot_product_attention(*parts, attn_mask=mask), parts, None)


def gpu_rows(tiny: bool) -> list[Row]:
    batch, players = (1, 20) if tiny else (64, 196)
    return [
        Row(
            "packed_attention",
            f"{name}: {heads} heads of 64, B {batch}, M 8, P {players}, Q 1",
            {"batch": batch, "coalitions": 8, "players": players, "prefix": 1, "heads": heads, "head_dim": 64},
            ("qkv",),
            {"varlen_attn": variable_length_attention, "masked SDPA": masked_attention},
            torch.bfloat16,
            compiled=heads == 12,
        )
        for name, heads in (("ViT-S", 6), ("ViT-B", 12))
    ]


@pytest.mark.short
def test_packed_attention(pair):
    sizes = {"batch": 8, "coalitions": 2, "players": 196, "prefix": 1, "heads": 6, "head_dim": 64}
    shape = "16 coalitions of 196 players in pairs, Q 1, 6 heads of 64, float32, forward + backward"
    pair.of_row(Row("packed_attention", shape, sizes, ("qkv",), {MASKED: masked_attention}))


def test_packed_attention_on_short_sequences(pair):
    """Every coalition of a small game, as exact Shapley values need them."""
    keys = pad(fk.unpack_bits(torch.arange(4096, dtype=torch.int32).unsqueeze(1), 12), (1, 0), value=True)
    cu_seqlens = pad(keys.sum(1).cumsum(0), (1, 0)).int()
    qkv = torch.randn(int(cu_seqlens[-1]), 3, 4, 16)
    shape = "4096 coalitions of 12 players, Q 1, 4 heads of 16, float32"
    dense = torch.no_grad()(dense_attention(qkv, keys).forward)
    pair("packed_attention", shape, MASKED, lambda: fk.packed_attention(qkv, cu_seqlens, 13), dense)
