"""segment_sum: a program has one sequence and a tile of its columns, and goes through the rows a block at a time.

Each row is read once (forward) or written once (backward).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 32
_COLUMNS = 128  # a program has _ROWS × _COLUMNS values at a time: 32 a thread


@triton.jit
def _forward(
    rows,  # [T, D]
    cu_seqlens,  # [S + 1]
    out,  # [S, D]
    prefix,
    width,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    sums = tl.zeros([ROWS, COLUMNS], ACCUMULATE)
    for block in range(start + prefix, end, ROWS):
        row = block + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        values = tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0)
        sums += values.to(ACCUMULATE)
    total = tl.sum(sums, 0).to(out.dtype.element_ty)
    tl.store(out + s * width + column, total, mask=column < width)


@triton.jit
def _backward(
    grad,  # [S, D]
    cu_seqlens,  # [S + 1]
    out,  # [T, D]
    prefix,
    width,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    tiles = tl.cdiv(width, COLUMNS)
    s = (tl.program_id(0) // tiles).to(tl.int64)
    column = tl.program_id(0) % tiles * COLUMNS + tl.arange(0, COLUMNS)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    first = start + prefix
    values = tl.load(grad + s * width + column, mask=column < width)[None, :]
    zeros = tl.zeros([ROWS, COLUMNS], out.dtype.element_ty)
    for block in range(start, end, ROWS):
        row = block + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        spread = tl.where((row >= first)[:, None], values, zeros)
        tl.store(out + row[:, None] * width + column[None, :], spread, mask=inside)


def _columns(width: int) -> int:
    return min(_COLUMNS, triton.next_power_of_2(width))


def segment_sum(rows: Tensor, cu_seqlens: Tensor, prefix: int) -> Tensor:
    rows, cu_seqlens = rows.contiguous(), cu_seqlens.contiguous()
    width = rows.shape[1]
    out = rows.new_empty(cu_seqlens.shape[0] - 1, width)
    if not out.numel():
        return out
    columns = _columns(width)
    _forward[(out.shape[0] * triton.cdiv(width, columns),)](
        rows,
        cu_seqlens,
        out,
        prefix,
        width,
        ACCUMULATE=tl.float64 if rows.dtype == torch.float64 else tl.float32,
        ROWS=_ROWS,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    return out


def segment_sum_backward(grad: Tensor, cu_seqlens: Tensor, prefix: int, total: int) -> Tensor:
    grad, cu_seqlens = grad.contiguous(), cu_seqlens.contiguous()
    width = grad.shape[1]
    out = grad.new_empty(total, width)
    if not out.numel():
        return out
    columns = _columns(width)
    _backward[(grad.shape[0] * triton.cdiv(width, columns),)](
        grad,
        cu_seqlens,
        out,
        prefix,
        width,
        ROWS=_ROWS,
        COLUMNS=columns,
        enable_fp_fusion=True,
    )
    return out
