"""coalition_sizes: a program counts the set bits of a block of words, then adds them up by coalition.

The floor is the bytes of the words, read once. Triton has no instruction of its own for a count of bits: pairs of
bits, halves of bytes, bytes and words are added up side by side, a dozen operations a word.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WORDS = 1024  # of a program: 8 a thread


@triton.jit
def _count_bits(words):
    """The set bits of each uint32."""
    words -= (words >> 1) & 0x55555555
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    words += words >> 8
    words += words >> 16
    return (words & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["count"])
def _sizes(
    bits,  # [coalitions, W]
    out,  # [coalitions]
    count: tl.int64,  # coalitions
    PLAYERS: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    COALITIONS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * COALITIONS + tl.arange(0, COALITIONS)
    word = tl.arange(0, BLOCK)
    inside = (row < count)[:, None] & (word < WORDS)[None, :]
    words = tl.load(bits + row[:, None] * WORDS + word[None, :], mask=inside, other=0).to(tl.uint32)
    if PLAYERS % 32 != 0:
        every = tl.full([BLOCK], 0xFFFFFFFF, tl.uint32)
        used = tl.where(word == WORDS - 1, every >> (32 - PLAYERS % 32), every)
        words &= used[None, :]
    tl.store(out + row, tl.sum(_count_bits(words), 1), mask=row < count)


def coalition_sizes(bits: Tensor, players: int) -> Tensor:
    bits = bits.contiguous()
    words = triton.cdiv(players, 32)
    out = torch.empty(bits.shape[:-1], dtype=torch.int32, device=bits.device)
    if not out.numel():
        return out
    block = triton.next_power_of_2(words)
    together = _WORDS // block
    _sizes[(triton.cdiv(out.numel(), together),)](
        bits,
        out,
        out.numel(),
        PLAYERS=players,
        WORDS=words,
        BLOCK=block,
        COALITIONS=together,
        enable_fp_fusion=True,
    )
    return out
