"""pack_tokens: a block of an image's tokens is read once and written for several coalitions.

A small kernel finds each token's place in each sequence first, four bytes beside the token's D values. A pair of
complements has P + 2Q rows whatever its bits are: only unpaired coalitions need a sum over sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32
_COLUMNS = 128  # a program has _TOKENS × _COLUMNS values at a time: 32 a thread
_COALITIONS = 32  # coalitions for which a program writes them
_PLACES = 2048  # places that a program finds


@triton.jit
def _find_places(
    bits,  # [B·M, W]
    places,  # [B·M, Q + P], −1 where the token is absent
    boundaries,  # PAIRED: cu_seqlens [B·M + 1]; else the lengths [B·M]
    sequences,
    prefix,
    players,
    words,
    PAIRED: tl.constexpr,
    SEQUENCES: tl.constexpr,
    LENGTH: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64) * SEQUENCES + tl.arange(0, SEQUENCES)
    # Of a pair only the first coalition's bits are read: no promise, true or not, makes a row lie outside the batch.
    odd = s % 2 if PAIRED else s * 0
    token = tl.arange(0, LENGTH)
    player = tl.maximum(token - prefix, 0)
    inside = (s < sequences)[:, None] & (token < prefix + players)[None, :]
    word = tl.load(bits + (s - odd)[:, None] * words + (player // 32)[None, :], mask=inside, other=0)
    voted = ((word >> (player % 32)[None, :]) & 1) != odd[:, None]
    present = (inside & ((token < prefix)[None, :] | voted)).to(tl.int32)
    length = tl.sum(present, 1)
    place = tl.where(present != 0, tl.cumsum(present, 1) - 1, -1)
    tl.store(places + s[:, None] * (prefix + players) + token[None, :], place, mask=inside)
    if PAIRED:
        pair = players + 2 * prefix
        start = s // 2 * pair + tl.where(odd != 0, pair - length, 0)
        tl.store(boundaries + s, start.to(tl.int32), mask=s < sequences)
        tl.store(boundaries + s + 1, (start + length).to(tl.int32), mask=s + 1 == sequences)
    else:
        tl.store(boundaries + s, length, mask=s < sequences)


@triton.jit
def _forward(
    tokens,  # [B, Q + P, D]
    places,  # [B·M, Q + P]
    cu_seqlens,  # [B·M + 1]
    rows,  # [T, D]
    total,
    coalitions,
    length,
    width,
    COALITIONS: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    groups = tl.cdiv(length, TOKENS)
    chunks = tl.cdiv(coalitions, COALITIONS)
    program = tl.program_id(0)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = program // tiles % groups * TOKENS + tl.arange(0, TOKENS)
    first = program // tiles // groups % chunks * COALITIONS
    image = (program // tiles // groups // chunks).to(tl.int64)
    inside = (token < length)[:, None] & (column < width)
    values = tl.load(tokens + (image * length + token)[:, None] * width + column, mask=inside)
    for m in range(first, tl.minimum(first + COALITIONS, coalitions)):
        s = image * coalitions + m
        place = tl.load(places + s * length + token, mask=token < length, other=-1)
        row = tl.load(cu_seqlens + s).to(tl.int64) + place
        # Where the caller has said how many rows there are, more tokens may be present.
        tl.store(rows + row[:, None] * width + column, values, mask=inside & ((place >= 0) & (row < total))[:, None])


@triton.jit
def _backward(
    grad,  # [T, D]
    places,  # [B·M, Q + P]
    cu_seqlens,  # [B·M + 1]
    out,  # [B, Q + P, D]
    total,
    coalitions,
    length,
    width,
    ACCUMULATE: tl.constexpr,
    TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    groups = tl.cdiv(length, TOKENS)
    program = tl.program_id(0)
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    token = program // tiles % groups * TOKENS + tl.arange(0, TOKENS)
    image = (program // tiles // groups).to(tl.int64)
    inside = (token < length)[:, None] & (column < width)
    sums = tl.zeros([TOKENS, COLUMNS], ACCUMULATE)
    for m in range(coalitions):
        s = image * coalitions + m
        place = tl.load(places + s * length + token, mask=token < length, other=-1)
        row = tl.load(cu_seqlens + s).to(tl.int64) + place
        present = inside & ((place >= 0) & (row < total))[:, None]
        sums += tl.load(grad + row[:, None] * width + column, mask=present, other=0.0).to(ACCUMULATE)
    tl.store(out + (image * length + token)[:, None] * width + column, sums.to(out.dtype.element_ty), mask=inside)


def _place_tokens(bits: Tensor, prefix: int, length: int, paired: bool) -> tuple[Tensor, Tensor]:
    """places (B·M, Q + P), and cu_seqlens of pairs or the lengths of other sequences."""
    batch, coalitions, words = bits.shape
    sequences = batch * coalitions
    places = bits.new_empty(sequences, length)
    boundaries = bits.new_empty(sequences + 1 if paired else sequences)
    padded = triton.next_power_of_2(length)
    together = max(1, _PLACES // padded)
    _find_places[(triton.cdiv(sequences, together),)](
        bits,
        places,
        boundaries,
        sequences,
        prefix,
        length - prefix,
        words,
        PAIRED=paired,
        SEQUENCES=together,
        LENGTH=padded,
        enable_fp_fusion=True,
    )
    return places, boundaries


def _columns(width: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(width))


def pack_tokens(tokens: Tensor, bits: Tensor, prefix: int, paired: bool, total: int) -> tuple[Tensor, Tensor]:
    tokens, bits = tokens.contiguous(), bits.contiguous()
    batch, length, width = tokens.shape
    coalitions = bits.shape[1]
    if not batch * coalitions:
        return tokens.new_zeros(max(total, 0), width), bits.new_zeros(1)
    is_given = total >= 0
    places, cu_seqlens = _place_tokens(bits, prefix, length, paired)
    if paired:
        total = batch * (coalitions // 2) * (length + prefix)
    else:
        ends = cu_seqlens.cumsum(0, dtype=torch.int64)
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0)).to(torch.int32)
        if not is_given:
            total = int(ends[-1].item())  # waits for the device: T hangs on the bits
    if total >= 2**31:
        raise RuntimeError(
            "pack_tokens: the packed batch must have fewer than 2^31 rows. Pass fewer images or coalitions."
        )
    rows = tokens.new_zeros(total, width) if is_given else tokens.new_empty(total, width)
    if not rows.numel():
        return rows, cu_seqlens
    columns = _columns(width)
    tiles = triton.cdiv(length, _TOKENS) * triton.cdiv(width, columns)
    _forward[(batch * triton.cdiv(coalitions, _COALITIONS) * tiles,)](
        tokens,
        places,
        cu_seqlens,
        rows,
        total,
        coalitions,
        length,
        width,
        COALITIONS=_COALITIONS,
        TOKENS=_TOKENS,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    return rows, cu_seqlens


def pack_tokens_backward(
    grad: Tensor, bits: Tensor, cu_seqlens: Tensor, prefix: int, length: int, paired: bool
) -> Tensor:
    grad, bits, cu_seqlens = grad.contiguous(), bits.contiguous(), cu_seqlens.contiguous()
    batch, coalitions = bits.shape[:2]
    total, width = grad.shape
    if not batch * coalitions:
        return grad.new_zeros(batch, length, width)
    out = grad.new_empty(batch, length, width)
    if not out.numel():
        return out
    places, _ = _place_tokens(bits, prefix, length, paired)
    columns = _columns(width)
    _backward[(batch * triton.cdiv(length, _TOKENS) * triton.cdiv(width, columns),)](
        grad,
        places,
        cu_seqlens,
        out,
        total,
        coalitions,
        length,
        width,
        ACCUMULATE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        TOKENS=_TOKENS,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    return out
