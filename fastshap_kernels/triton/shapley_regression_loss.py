"""shapley_regression_loss: coalition_sum's pass over phi, and what the sums, still in registers, miss of the target.

The floor is phi read once, the target read once and the residual written once; backward, the residual read once and
phi's gradient written once. The residual never leaves the registers between the sums and its square.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .coalition_sum import (
    accumulate,
    is_spoiled,
    resources,
    rows_of,
    scatter,
    stages,
    sum_players,
    sum_present,
    unit_of,
    whole_rows,
)

_WIDTH = 128  # classes of a program


@triton.jit
def _forward(
    phi,  # [B, P, K]
    bits,  # [B, M, W]
    target,  # [B, M, K]
    residual,  # [B, M, K]
    partial,  # [B, M, tiles] sums of squares
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
    member = program % chunks * COALITIONS + tl.arange(0, COALITIONS)
    tile = program // chunks % tiles
    column = tile * WIDTH + tl.arange(0, WIDTH)
    words = tl.cdiv(players, 32)
    phi += image * (image_units * UNIT)
    bits += image * coalitions * words
    total = sum_players(
        phi,
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
    row = image * coalitions + member
    at = row[:, None] * width + column[None, :]
    inside = (member < coalitions)[:, None] & (column < width)[None, :]
    missing = tl.where(inside, total - tl.load(target + at, mask=inside, other=0.0), 0.0)
    spoiled = 0
    if total.dtype != tl.float64:
        spoiled = is_spoiled(total)
    tl.store(residual + at, missing, mask=inside & (spoiled == 0))
    squares = tl.sum(missing * missing, 1)
    tl.store(partial + row * tiles + tile, squares, mask=(member < coalitions) & (spoiled == 0))
    if spoiled != 0:
        first = program % chunks * COALITIONS
        for m in range(first, tl.minimum(first + COALITIONS, coalitions)):
            sums = sum_present(phi, bits + m * words, column, players, player_units * UNIT, width, WIDTH)
            to = image * coalitions + m
            goal = tl.load(target + to * width + column, mask=column < width, other=0.0)
            missed = tl.where(column < width, sums - goal, 0.0)
            tl.store(residual + to * width + column, missed, mask=column < width)
            tl.store(partial + to * tiles + tile, tl.sum(missed * missed, 0))


def shapley_regression_loss(phi: Tensor, bits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    phi, bits, target = whole_rows(phi), bits.contiguous(), target.contiguous()
    batch, players, width = phi.shape
    coalitions, tiles = bits.shape[1], triton.cdiv(width, _WIDTH)
    residual = torch.empty_like(target)
    partial = torch.empty((batch, coalitions, tiles), dtype=target.dtype, device=target.device)
    if residual.numel():
        unit = unit_of(phi.stride(0), phi.stride(1), width)
        rows = rows_of(coalitions, phi.dtype)
        _forward[(batch * triton.cdiv(coalitions, rows) * tiles,)](
            phi,
            bits,
            target,
            residual,
            partial,
            coalitions,
            players,
            phi.stride(0) // unit,
            phi.stride(1) // unit,
            width // unit,
            UNIT=unit,
            COALITIONS=rows,
            WIDTH=_WIDTH,
            ACCUMULATE=accumulate(phi.dtype),
            num_stages=stages(phi.dtype),
            **resources(rows),
            enable_fp_fusion=False,
        )
    return residual, partial.sum(-1)


def shapley_regression_loss_backward(
    residual: Tensor, scale: Tensor, bits: Tensor, players: int, dtype: torch.dtype
) -> Tensor:
    return scatter(residual, scale, bits, players, dtype)
