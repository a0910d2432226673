"""layer_norm_segment_sum: a program has one sequence and normalises a few whole rows at a time in registers.

Each row is read once (forward), or read once and its gradient written once (backward): the normalised rows, which plain
PyTorch writes and reads again, exist in registers only. Weight and bias come after the sum.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_VALUES = 8192  # of a program at a time: 32 a thread
_MOST_ROWS = 32


@triton.jit
def _normalize(values, inside, width, EPS: tl.constexpr):
    """Rows minus their means, and 1 / √(variance + eps); 0 outside."""
    mean = tl.sum(values, 1) / width
    centred = tl.where(inside, values - mean[:, None], 0.0)
    variance = tl.sum(centred * centred, 1) / width
    # A row outside must not divide by 0 where eps is 0.
    variance = tl.where(tl.sum(inside.to(tl.int32), 1) > 0, variance, 1.0)
    return centred, 1 / tl.sqrt(variance + EPS)


@triton.jit
def _forward(
    rows,  # [T, D]
    cu_seqlens,  # [S + 1]
    weight,  # [D] or None
    bias,  # [D] or None
    out,  # [S, D]
    normalized,  # [S, D]
    prefix,
    width,
    EPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    first = tl.load(cu_seqlens + s).to(tl.int64) + prefix
    end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    sums = tl.zeros([ROWS, COLUMNS], ACCUMULATE)
    for block in range(first, end, ROWS):
        row = block + tl.arange(0, ROWS)
        inside = (row < end)[:, None] & (column < width)[None, :]
        values = tl.load(rows + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(ACCUMULATE)
        centred, scale = _normalize(values, inside, width, EPS)
        sums += tl.where(inside, centred * scale[:, None], 0.0)
    total = tl.sum(sums, 0)
    tl.store(normalized + s * width + column, total, mask=column < width)
    if weight is not None:
        total *= tl.load(weight + column, mask=column < width, other=0.0)
    if bias is not None:
        total += tl.maximum(end - first, 0).to(ACCUMULATE) * tl.load(bias + column, mask=column < width, other=0.0)
    tl.store(out + s * width + column, total.to(out.dtype.element_ty), mask=column < width)


@triton.jit
def _backward(
    grad,  # [S, D]
    rows,  # [T, D]
    cu_seqlens,  # [S + 1]
    weight,  # [D] or None
    out,  # [T, D]
    prefix,
    width,
    EPS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    s = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    start = tl.load(cu_seqlens + s).to(tl.int64)
    end = tl.load(cu_seqlens + s + 1).to(tl.int64)
    g = tl.load(grad + s * width + column, mask=column < width, other=0.0).to(ACCUMULATE)
    if weight is not None:
        g *= tl.load(weight + column, mask=column < width, other=0.0)
    g_centred = g - tl.sum(g, 0) / width
    for block in range(start, end, ROWS):
        row = block + tl.arange(0, ROWS)
        written = (row < end)[:, None] & (column < width)[None, :]
        inside = written & (row >= start + prefix)[:, None]
        at = row[:, None] * width + column[None, :]
        values = tl.load(rows + at, mask=inside, other=0.0).to(ACCUMULATE)
        centred, scale = _normalize(values, inside, width, EPS)
        slope = tl.sum(centred * g[None, :], 1) / width * scale * scale
        result = scale[:, None] * (g_centred[None, :] - centred * slope[:, None])
        tl.store(out + at, tl.where(inside, result, 0.0).to(out.dtype.element_ty), mask=written)


def _configuration(width: int, dtype: torch.dtype) -> dict[str, int]:
    columns = triton.next_power_of_2(width)
    return {
        "ACCUMULATE": tl.float64 if dtype == torch.float64 else tl.float32,
        "ROWS": max(1, min(_MOST_ROWS, _VALUES // columns)),
        "COLUMNS": columns,
        "num_warps": 8 if columns <= _VALUES else 16,
        "enable_fp_fusion": True,
    }


def layer_norm_segment_sum(
    rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None, bias: Tensor | None, prefix: int, eps: float
) -> tuple[Tensor, Tensor]:
    rows, cu_seqlens = rows.contiguous(), cu_seqlens.contiguous()
    width = rows.shape[1]
    out = rows.new_empty(cu_seqlens.shape[0] - 1, width)
    normalized = torch.empty_like(out, dtype=torch.promote_types(rows.dtype, torch.float32))
    if out.numel():
        _forward[(out.shape[0],)](
            rows,
            cu_seqlens,
            None if weight is None else weight.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            normalized,
            prefix,
            width,
            EPS=eps,
            **_configuration(width, rows.dtype),
        )
    return out, normalized


def layer_norm_segment_sum_backward(
    grad: Tensor, rows: Tensor, cu_seqlens: Tensor, weight: Tensor | None, prefix: int, eps: float
) -> Tensor:
    grad, rows, cu_seqlens = grad.contiguous(), rows.contiguous(), cu_seqlens.contiguous()
    width = rows.shape[1]
    out = rows.new_empty(rows.shape)
    if out.numel():
        _backward[(grad.shape[0],)](
            grad,
            rows,
            cu_seqlens,
            None if weight is None else weight.contiguous(),
            out,
            prefix,
            width,
            EPS=eps,
            **_configuration(width, rows.dtype),
        )
    return out
