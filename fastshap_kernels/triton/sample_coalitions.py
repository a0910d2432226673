"""sample_coalitions: each program draws a few coalitions in registers, with their complements, without sorting.

`reference/sample_coalitions.py` defines the draw. Its layout of keys gives the four words of a Philox block to four
words of bits: 32 neighbouring blocks pack one word of bits from each of their outputs. The bits are the only traffic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCKS = 1024  # Philox blocks a program: 8 a thread, so 32 keys in registers


@triton.jit
def _philox(seed_low, seed_high, index, block, STREAM: tl.constexpr):
    """Philox4x32-10 with counter (index, block, stream): four uint32 tensors."""
    x0, x1 = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    x2, x3 = block.to(tl.uint32), tl.full(block.shape, STREAM, tl.uint32)
    key0, key1 = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    for _ in tl.static_range(10):
        # One wide product a word: Triton's interpreter takes umulhi apart element by element.
        product0 = x0.to(tl.uint64) * 0xD2511F53
        product1 = x2.to(tl.uint64) * 0xCD9E8D57
        x0 = (product1 >> 32).to(tl.uint32) ^ x1 ^ key0
        x1 = product1.to(tl.uint32)
        x2 = (product0 >> 32).to(tl.uint32) ^ x3 ^ key1
        x3 = product0.to(tl.uint32)
        key0 = (key0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        key1 = (key1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return x0, x1, x2, x3


@triton.jit
def _sizes(thresholds, index, seed_low, seed_high, PLAYERS: tl.constexpr):
    """One more than the number of thresholds that are no larger than each draw: they rise."""
    first, second, _, _ = _philox(seed_low, seed_high, index, tl.zeros_like(index), 0)
    draw = (first.to(tl.int64) << 31) + (second >> 1).to(tl.int64)
    count = tl.zeros_like(index).to(tl.int32)
    for step in tl.static_range(11, -1, -1):  # 2^12 players at most
        if 1 << step <= PLAYERS - 2:
            probe = count + (1 << step)
            inside = probe <= PLAYERS - 2
            threshold = tl.load(thresholds + probe - 1, mask=inside, other=0)
            count = tl.where(inside & (threshold <= draw), probe, count)
    return 1 + count


@triton.jit
def _first(keys, limit, player, ahead):
    """The keys below the limit, and of those that equal it the players ahead of another limit."""
    return (keys < limit) | ((keys == limit) & (player < ahead))


@triton.jit
def _write(bits, row, group, present, keep, complement, word, PLAYERS: tl.constexpr, WORDS: tl.constexpr):
    """Packs one word of bits for each group and coalition: present [groups, coalitions, 32]."""
    lane = tl.arange(0, 32)[None, None, :]
    packed = tl.sum(present.to(tl.int32) << lane, 2)
    at = group * 4 + word
    to = bits + row[None, :] * WORDS + at[:, None]
    inside = (at < WORDS)[:, None]
    tl.store(to, packed, mask=inside & keep[None, :])
    used = tl.sum(((at[:, None, None] * 32 + lane) < PLAYERS).to(tl.int32) << lane, 2)
    tl.store(to + WORDS, ~packed & used, mask=inside & complement[None, :])


@triton.jit(do_not_specialize=["count", "drawn", "coalitions", "seed_low", "seed_high", "offset"])
def _sample(
    thresholds,  # [P - 2]
    bits,  # [B, M, W]
    count: tl.int64,  # coalitions drawn, in all images
    drawn,  # of an image
    coalitions,  # M
    seed_low: tl.int64,  # the seed in halves: of a number past 2^31 the interpreter makes 32 bits, which it then shifts
    seed_high: tl.int64,
    offset: tl.int64,
    PAIRED: tl.constexpr,
    PLAYERS: tl.constexpr,
    WORDS: tl.constexpr,
    GROUPS: tl.constexpr,
    COALITIONS: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64) * COALITIONS + tl.arange(0, COALITIONS)
    keep = number < count
    member = number % drawn * (2 if PAIRED else 1)
    row = number // drawn * coalitions + member
    index = row + offset
    size = _sizes(thresholds, index, seed_low, seed_high, PLAYERS)

    group = tl.arange(0, GROUPS)
    block = group[:, None, None] * 32 + tl.arange(0, 32)[None, None, :]
    block, which = tl.broadcast(block, index[None, :, None])
    key0, key1, key2, key3 = _philox(seed_low, seed_high, which, block, 1)
    # Keys past the last player are as large as can be: never below a limit, and last among their equals.
    player = group[:, None, None] * 128 + tl.arange(0, 32)[None, None, :]
    last = tl.full([1, 1, 1], 0xFFFFFFFF, tl.uint32)
    key0 = tl.where(player < PLAYERS, key0, last)
    key1 = tl.where(player + 32 < PLAYERS, key1, last)
    key2 = tl.where(player + 64 < PLAYERS, key2, last)
    key3 = tl.where(player + 96 < PLAYERS, key3, last)

    # The largest limit with no more than `size` keys below it, or any with just as many: about log2(P) steps.
    limit = tl.zeros([COALITIONS], tl.uint32)
    below = tl.zeros([COALITIONS], tl.int32)
    bit = 31
    while bit >= 0:
        for _ in tl.static_range(4):  # the programs' threads agree to stop once in four steps
            candidate = limit | (tl.full([COALITIONS], 1, tl.uint32) << bit)
            cut = candidate[None, :, None]
            smaller = (key0 < cut).to(tl.int32) + (key1 < cut) + (key2 < cut) + (key3 < cut)
            smaller = tl.sum(tl.sum(smaller, 0), 1)
            limit = tl.where(smaller <= size, candidate, limit)
            below = tl.where(smaller <= size, smaller, below)
            bit -= 1
        if tl.max((below != size).to(tl.int32), 0) == 0:
            bit = -1

    # Where fewer are below, the first players whose keys equal the limit make up for it.
    cut = limit[None, :, None]
    player_limit = tl.zeros([COALITIONS], tl.int32)
    if tl.max((below != size).to(tl.int32), 0) != 0:
        for step in tl.static_range(11, -1, -1):
            candidate = player_limit + (1 << step)
            ahead = candidate[None, :, None]
            tied = ((key0 == cut) & (player < ahead)).to(tl.int32)
            tied += (key1 == cut) & (player + 32 < ahead)
            tied += (key2 == cut) & (player + 64 < ahead)
            tied += (key3 == cut) & (player + 96 < ahead)
            tied = tl.sum(tl.sum(tied, 0), 1)
            player_limit = tl.where(tied <= size - below, candidate, player_limit)
    ahead = player_limit[None, :, None]

    complement = keep & PAIRED & (member + 1 < coalitions)
    chosen = _first(key0, cut, player, ahead)
    _write(bits, row, group, chosen, keep, complement, 0, PLAYERS, WORDS)
    chosen = _first(key1, cut, player + 32, ahead)
    _write(bits, row, group, chosen, keep, complement, 1, PLAYERS, WORDS)
    chosen = _first(key2, cut, player + 64, ahead)
    _write(bits, row, group, chosen, keep, complement, 2, PLAYERS, WORDS)
    chosen = _first(key3, cut, player + 96, ahead)
    _write(bits, row, group, chosen, keep, complement, 3, PLAYERS, WORDS)


def sample_coalitions(
    thresholds: Tensor, batch: int, coalitions: int, players: int, seed: int, offset: int, paired: bool
) -> Tensor:
    words = triton.cdiv(players, 32)
    bits = torch.empty((batch, coalitions, words), dtype=torch.int32, device=thresholds.device)
    if not bits.numel():
        return bits
    drawn = triton.cdiv(coalitions, 2) if paired else coalitions
    groups = triton.next_power_of_2(triton.cdiv(players, 128))
    together = _BLOCKS // (32 * groups)
    _sample[(triton.cdiv(batch * drawn, together),)](
        thresholds.contiguous(),
        bits,
        batch * drawn,
        drawn,
        coalitions,
        seed & 0xFFFFFFFF,
        seed >> 32,
        offset,
        PAIRED=paired,
        PLAYERS=players,
        WORDS=words,
        GROUPS=groups,
        COALITIONS=together,
        num_warps=4 if groups < 8 else 8,  # sums over many groups take registers too
        maxnreg=128,  # without a limit of their own some compilers take fewer than it needs, and spill
        enable_fp_fusion=True,
    )
    return bits
