"""coalition_sum: the bits, expanded to 0 and 1 in registers, times the features, on the tensor cores.

The floor is the bytes of the features read once (the sums are M / P of them); backward, those of their gradient written
once. An add a coalition and value would take longer than that from about 8 coalitions on; on the tensor cores it is
free. 0 and 1 are exact in every format and a float32 is the sum of three bfloat16, so that the products are exact and
the sums those of float32. float64 is added up row by row.
0 times NaN is NaN, whoever has it: a tile that ends with a NaN, and no other, is added up anew, a present player after
the other.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_WIDTH = 128  # features of a program
_LEAST = 16  # rows that tl.dot needs, and the sums of float64 that stay in registers
_COALITIONS = 64  # most coalitions that a program adds up


@triton.jit
def add_product(present, values, total):
    """total + present · values, with present 0 or 1; float32 in three exact pieces, the smallest first."""
    if values.dtype == tl.float32:
        high = values.to(tl.bfloat16)
        rest = values - high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        present = present.to(tl.bfloat16)
        total = tl.dot(present, low, total)
        total = tl.dot(present, middle, total)
        total = tl.dot(present, high, total)
    else:
        total = tl.dot(present.to(values.dtype), values, total)
    return total


@triton.jit
def sum_players(
    features,  # [P, L] of one image
    bits,  # [M, W] of one image
    member,  # [COALITIONS]
    column,  # [WIDTH]
    coalitions,
    players,
    player_step,
    width,
    COALITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """[COALITIONS, WIDTH] sums over the present players."""
    words = tl.cdiv(players, 32)
    inside = column < width
    total = tl.zeros([COALITIONS, WIDTH], ACCUMULATE)
    if total.dtype == tl.float64:
        for player in range(players):
            word = tl.load(bits + member * words + player // 32, mask=member < coalitions, other=0)
            row = tl.load(features + tl.cast(player, tl.int64) * player_step + column, mask=inside, other=0.0)
            chosen = ((word >> (player % 32)) & 1) != 0
            total += tl.where(chosen[:, None], row[None, :], 0.0)
    else:
        bit = tl.arange(0, 32)
        for index in range(words):
            word = tl.load(bits + member * words + index, mask=member < coalitions, other=0)
            present = tl.where(((word[:, None] >> bit[None, :]) & 1) != 0, 1.0, 0.0)
            rows = features + tl.cast(index * 32, tl.int64) * player_step
            # Bits beyond the players meet zeros.
            known = (index * 32 + bit < players)[:, None] & inside[None, :]
            values = tl.load(rows + (bit[:, None] * player_step + column[None, :]), mask=known, other=0.0)
            total = add_product(present, values, total)
    return total


@triton.jit
def is_spoiled(total):
    """Whether a NaN or an infinity may have come from an absent player: 1 or 0. Looking at each value costs time."""
    return tl.max(tl.max((total != total).to(tl.int32), 1), 0)


@triton.jit
def sum_present(
    features,  # [P, L] of one image
    bits,  # [W] of one coalition
    column,  # [WIDTH]
    players,
    player_step,
    width,
    WIDTH: tl.constexpr,
):
    """[WIDTH] sums over the present players of one coalition, which are chosen and not multiplied."""
    total = tl.zeros([WIDTH], tl.float32)
    for player in range(players):
        present = (tl.load(bits + player // 32) >> (player % 32)) & 1
        row = features + tl.cast(player, tl.int64) * player_step
        total += tl.load(row + column, mask=(column < width) & (present != 0), other=0.0).to(tl.float32)
    return total


# Steps come in units of UNIT values, so that the compiler knows what divides them: a row of 1000 bfloat16 is read in
# vectors of 8.
@triton.jit
def _forward(
    features,  # [B, P, L]
    bits,  # [B, M, W]
    out,  # [B, M, L]
    coalitions,
    players,
    image_units,
    player_units,
    width_units,
    UNIT: tl.constexpr,
    COALITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    width = width_units * UNIT
    tiles = tl.cdiv(width, WIDTH)
    chunks = tl.cdiv(coalitions, COALITIONS)
    program = tl.program_id(0)
    image = (program // (chunks * tiles)).to(tl.int64)
    # The chunks that read the same features run side by side.
    member = program % chunks * COALITIONS + tl.arange(0, COALITIONS)
    column = program // chunks % tiles * WIDTH + tl.arange(0, WIDTH)
    words = tl.cdiv(players, 32)
    features += image * (image_units * UNIT)
    bits += image * coalitions * words
    total = sum_players(
        features,
        bits,
        member,
        column,
        coalitions,
        players,
        player_units * UNIT,
        width,
        COALITIONS,
        WIDTH,
        ACCUMULATE,
    )
    row = (image * coalitions + member)[:, None]
    inside = (member < coalitions)[:, None] & (column < width)[None, :]
    if total.dtype == tl.float64:
        tl.store(out + row * width + column[None, :], total, mask=inside)
    else:
        spoiled = is_spoiled(total)
        tl.store(out + row * width + column[None, :], total.to(out.dtype.element_ty), mask=inside & (spoiled == 0))
        if spoiled != 0:
            first = program % chunks * COALITIONS
            for m in range(first, tl.minimum(first + COALITIONS, coalitions)):
                sums = sum_present(features, bits + m * words, column, players, player_units * UNIT, width, WIDTH)
                at = out + (image * coalitions + m) * width + column
                tl.store(at, sums.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _backward(
    grad,  # [B, M, L]
    scale,  # [B, M] where SCALED
    bits,  # [B, M, W]
    out,  # [B, P, L]
    coalitions,
    players,
    width_units,
    UNIT: tl.constexpr,
    SCALED: tl.constexpr,
    PLAYERS: tl.constexpr,
    COALITIONS: tl.constexpr,
    WIDTH: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    width = width_units * UNIT
    words = tl.cdiv(players, 32)
    tiles = tl.cdiv(width, WIDTH)
    blocks = tl.cdiv(players, PLAYERS)
    program = tl.program_id(0)
    image = (program // (blocks * tiles)).to(tl.int64)
    # Its players share a word of bits, and the blocks that read the same gradients run side by side.
    block = program % blocks
    player = block * PLAYERS + tl.arange(0, PLAYERS)
    column = program // blocks % tiles * WIDTH + tl.arange(0, WIDTH)
    inside = column < width
    total = tl.zeros([PLAYERS, WIDTH], ACCUMULATE)
    if total.dtype == tl.float64:
        for member in range(coalitions):
            row = image * coalitions + member
            word = tl.load(bits + row * words + block * PLAYERS // 32)
            values = tl.load(grad + row * width + column, mask=inside, other=0.0)
            if SCALED:
                values = values * tl.load(scale + row)
            chosen = ((word >> (player % 32)) & 1) != 0
            total += tl.where(chosen[:, None], values[None, :], 0.0)
    else:
        for first in range(0, coalitions, COALITIONS):
            member = first + tl.arange(0, COALITIONS)
            known = member < coalitions
            row = image * coalitions + member
            word = tl.load(bits + row * words + block * PLAYERS // 32, mask=known, other=0)
            present = tl.where(((word[None, :] >> (player % 32)[:, None]) & 1) != 0, 1.0, 0.0)
            values = tl.load(
                grad + row[:, None] * width + column[None, :], mask=known[:, None] & inside[None, :], other=0.0
            )
            if SCALED:
                values = values.to(tl.float32) * tl.load(scale + row, mask=known, other=0.0)[:, None]
            total = add_product(present, values, total)
    row = image * players + player.to(tl.int64)
    within = (player < players)[:, None] & inside[None, :]
    tl.store(out + row[:, None] * width + column[None, :], total.to(out.dtype.element_ty), mask=within)


def unit_of(*steps: int) -> int:
    """The largest power of two up to 16 that divides every step."""
    unit = 16
    while any(step % unit for step in steps):
        unit //= 2
    return unit


def accumulate(dtype: torch.dtype) -> tl.dtype:
    """What sums run in."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def rows_of(coalitions: int, dtype: torch.dtype) -> int:
    """Coalitions that a program adds up."""
    most = _LEAST if dtype == torch.float64 else _COALITIONS
    return min(max(triton.next_power_of_2(coalitions), _LEAST), most)


def stages(dtype: torch.dtype) -> int:
    """Words of players under way: a float32 word's are as many bytes as two of half precision."""
    return 2 if dtype == torch.float32 else 3


def resources(rows: int) -> dict[str, int]:
    """Warps and registers of a program that sums over players for `rows` coalitions.

    Without a limit of their own some compilers give fewer registers than it needs, for a further program a
    multiprocessor, and spill. Triton 3.6 can't compile 64 rows in 8 warps for a B200.
    """
    return {"num_warps": 16 if rows > 32 else 8, "maxnreg": 128}


def whole_rows(features: Tensor) -> Tensor:
    """As it is where features lie one after the other: a slice of the players (tokens without their prefix) is no copy.

    And where a word's players lie in reach of 32-bit offsets.
    """
    return features if features.stride(2) == 1 and features.stride(1) < 2**25 else features.contiguous()


def coalition_sum(features: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    features, bits = whole_rows(features), bits.contiguous()
    batch, players, width = features.shape
    coalitions = bits.shape[1]
    out = torch.empty((batch, coalitions, width), dtype=dtype, device=features.device)
    if not out.numel():
        return out
    unit = unit_of(features.stride(0), features.stride(1), width)
    rows = rows_of(coalitions, features.dtype)
    _forward[(batch * triton.cdiv(coalitions, rows) * triton.cdiv(width, _WIDTH),)](
        features,
        bits,
        out,
        coalitions,
        players,
        features.stride(0) // unit,
        features.stride(1) // unit,
        width // unit,
        UNIT=unit,
        COALITIONS=rows,
        WIDTH=_WIDTH,
        ACCUMULATE=accumulate(features.dtype),
        num_stages=stages(features.dtype),
        **resources(rows),
        enable_fp_fusion=False,
    )
    return out


def coalition_sum_backward(grad: Tensor, bits: Tensor, players: int, dtype: torch.dtype) -> Tensor:
    return scatter(grad, None, bits, players, dtype)


def scatter(grad: Tensor, scale: Tensor | None, bits: Tensor, players: int, dtype: torch.dtype) -> Tensor:
    """out[b, p] = Σ_m scale[b, m] · grad[b, m] over the coalitions m that player p is in; no scale is 1."""
    grad, bits = grad.contiguous(), bits.contiguous()
    batch, coalitions, width = grad.shape
    out = torch.empty((batch, players, width), dtype=dtype, device=grad.device)
    if not out.numel():
        return out
    unit = unit_of(width)
    rows = _LEAST if grad.dtype == torch.float64 else 32
    _backward[(batch * triton.cdiv(players, rows) * triton.cdiv(width, _WIDTH),)](
        grad,
        grad if scale is None else scale.contiguous(),
        bits,
        out,
        coalitions,
        players,
        width // unit,
        UNIT=unit,
        SCALED=scale is not None,
        PLAYERS=rows,
        COALITIONS=_LEAST,
        WIDTH=_WIDTH,
        ACCUMULATE=accumulate(grad.dtype),
        num_stages=1,  # one or two steps: nothing to fetch ahead
        enable_fp_fusion=False,  # the same bits whether the caller scales or this does
    )
    return out
