"""exact_shapley: every value is read once and costs about four operations in float64, whatever the players.

`csrc/cpu/exact_shapley.cpp` has the formula: a coalition's value is weighted once, players' sums are shifted to add
up. The bits of a coalition's index are, from the lowest up, its row in a program's block, its place among the values
that a thread keeps apart, the step of the program, and the program's slice: so that a value is added to its own
running sum and to its step's, and players come from those. A second kernel adds up the slices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEPT = 8  # running sums of a thread for each of its rows and classes
_VALUES = 256  # rows · classes of a program: two a thread
_MAX_COLUMNS = 64
_MAX_STEP_BITS = 6
_PROGRAMS = 512  # enough to fill a device: with longer slices, fewer sums are written
_ITEMS, _SLICES = 32, 128  # what a program of the second kernel makes, and how many slices it adds up at a time


@triton.jit
def _size(coalition):
    """How many players: bits set of 20."""
    size = coalition - ((coalition >> 1) & 0x55555)
    size = (size & 0x33333) + ((size >> 2) & 0x33333)
    size = (size + (size >> 4)) & 0xF0F0F
    return (size + (size >> 8) + (size >> 16)) & 0x1F


@triton.jit
def _weights(PLAYERS: tl.constexpr):
    """float64 [32], by size s: 1 / ((P − 1) · C(P − 2, s − 1)); 0 for no player and for all."""
    size = tl.arange(0, 32)
    one = tl.full([32], 1.0, tl.float64)
    up, down = one, one * max(PLAYERS - 1, 1)
    for i in tl.static_range(1, PLAYERS - 1):  # factorials below 2^53: exact
        up *= tl.where(i < size, i, 1).to(tl.float64)
        down *= tl.where(i < size, PLAYERS - 1 - i, 1).to(tl.float64)
    return tl.where((size > 0) & (size < PLAYERS), up / down, 0.0)


@triton.jit
def _add_values(
    values,  # [images, 2^P, K]
    table,  # [32]
    partial,  # [images, slices, P, K]
    classes,
    tiles,
    PLAYERS: tl.constexpr,
    ROW_BITS: tl.constexpr,
    KEPT_BITS: tl.constexpr,
    STEP_BITS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    ROWS: tl.constexpr = 1 << ROW_BITS
    KEPT: tl.constexpr = 1 << KEPT_BITS
    STEPS: tl.constexpr = 1 << STEP_BITS
    BLOCK_BITS: tl.constexpr = ROW_BITS + KEPT_BITS + STEP_BITS
    SLICES: tl.constexpr = 1 << (PLAYERS - BLOCK_BITS)
    program = tl.program_id(0)
    slice = program // tiles % SLICES
    column = program % tiles * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < classes
    image = (program // tiles // SLICES).to(tl.int64)

    # Every program writes the same table, and reads what it wrote itself.
    tl.store(table + tl.arange(0, 32), _weights(PLAYERS))
    tl.debug_barrier()

    kept, row = tl.arange(0, KEPT), tl.arange(0, ROWS)
    bit = tl.arange(0, 1 if STEP_BITS == 0 else 8)
    within = kept[:, None] * ROWS + row[None, :]  # [kept, rows]
    sizes = _size(within)
    own = tl.zeros([KEPT, ROWS, COLUMNS], tl.float64)
    steps = tl.zeros([1 if STEP_BITS == 0 else 8, ROWS, COLUMNS], tl.float64)  # by bit of the step
    first = values + (image << PLAYERS) * classes + column
    null = tl.load(first, mask=inside, other=0.0).to(tl.float64)
    for step in range(STEPS):
        start = slice * (1 << BLOCK_BITS) + step * (ROWS * KEPT)
        weight = tl.load(table + _size(start) + sizes)
        at = (start + within).to(tl.int64) * classes
        value = tl.load(first[None, None, :] + at[:, :, None], mask=inside[None, None, :], other=0.0)
        gain = weight[:, :, None] * (value.to(tl.float64) - null[None, None, :])
        own += gain
        if STEP_BITS > 0:
            total = tl.sum(gain, 0)
            steps += tl.where(((step >> bit) & 1)[:, None, None] != 0, total[None, :, :], 0.0)

    # The mean of the players' sums: every value counts for as many players as its coalition has in all.
    total = tl.sum(own, 0)  # [rows, columns]
    members = tl.sum(own * _size(kept)[:, None, None].to(tl.float64), 0) + tl.sum(steps, 0)
    members += total * (_size(row)[:, None] + _size(slice)).to(tl.float64)
    mean = tl.sum(members, 0) / PLAYERS
    to = partial + ((image * SLICES + slice) * PLAYERS) * classes + column
    for player in tl.static_range(0, ROW_BITS):
        present = ((row >> player) & 1) != 0
        tl.store(to + player * classes, tl.sum(tl.where(present[:, None], total, 0.0), 0) - mean, mask=inside)
    for player in tl.static_range(0, KEPT_BITS):
        present = ((kept >> player) & 1) != 0
        sum = tl.sum(tl.sum(tl.where(present[:, None, None], own, 0.0), 0), 0)
        tl.store(to + (ROW_BITS + player) * classes, sum - mean, mask=inside)
    if STEP_BITS > 0:
        player = ROW_BITS + KEPT_BITS + bit
        stored = (bit < STEP_BITS)[:, None] & inside[None, :]
        tl.store(to[None, :] + player[:, None] * classes, tl.sum(steps, 1) - mean[None, :], mask=stored)
    all = tl.sum(total, 0)
    for player in tl.static_range(BLOCK_BITS, PLAYERS):
        present = (slice >> (player - BLOCK_BITS)) & 1
        tl.store(to + player * classes, all * present.to(tl.float64) - mean, mask=inside)


@triton.jit
def _add_slices(
    values,  # [images, 2^P, K]
    partial,  # [images, slices, P, K]
    out,  # [images, P, K]
    classes,
    slices,
    PLAYERS: tl.constexpr,
    ITEMS: tl.constexpr,
    SLICES: tl.constexpr,
):
    size = PLAYERS * classes
    blocks = tl.cdiv(size, ITEMS)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    item = program % blocks * ITEMS + tl.arange(0, ITEMS)
    inside = item < size
    sums = tl.zeros([SLICES, ITEMS], tl.float64)
    for start in range(0, slices, SLICES):
        slice = start + tl.arange(0, SLICES)
        at = (image * slices + slice)[:, None] * size + item[None, :]
        sums += tl.load(partial + at, mask=(slice < slices)[:, None] & inside[None, :], other=0.0)
    first = values + (image << PLAYERS) * classes + item % classes
    null = tl.load(first, mask=inside, other=0.0).to(tl.float64)
    grand = tl.load(first + tl.cast((1 << PLAYERS) - 1, tl.int64) * classes, mask=inside, other=0.0).to(tl.float64)
    phi = tl.sum(sums, 0) + (grand - null) / PLAYERS
    tl.store(out + image * size + item, phi.to(out.dtype.element_ty), mask=inside)


def exact_shapley(values: Tensor) -> Tensor:
    values = values.contiguous()
    players, classes = values.shape[-2].bit_length() - 1, values.shape[-1]
    out = values.new_empty((*values.shape[:-2], players, classes))
    if not out.numel():
        return out
    images = values.numel() // (2**players * classes)
    columns = min(triton.next_power_of_2(classes), _MAX_COLUMNS)
    tiles = triton.cdiv(classes, columns)
    kept_bits = min(players, _KEPT.bit_length() - 1)
    row_bits = min((_VALUES // columns).bit_length() - 1, players - kept_bits)
    left = players - kept_bits - row_bits
    step_bits = 0
    while left and step_bits < _MAX_STEP_BITS and images * tiles << (left - 1) >= _PROGRAMS:
        left, step_bits = left - 1, step_bits + 1
    slices = 2**left
    partial = torch.empty((images, slices, players, classes), dtype=torch.float64, device=values.device)
    table = torch.empty(32, dtype=torch.float64, device=values.device)
    _add_values[(images * slices * tiles,)](
        values,
        table,
        partial,
        classes,
        tiles,
        PLAYERS=players,
        ROW_BITS=row_bits,
        KEPT_BITS=kept_bits,
        STEP_BITS=step_bits,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    _add_slices[(images * triton.cdiv(players * classes, _ITEMS),)](
        values,
        partial,
        out,
        classes,
        slices,
        PLAYERS=players,
        ITEMS=_ITEMS,
        SLICES=min(_SLICES, slices),
        enable_fp_fusion=True,
    )
    return out
