"""linear_shapley_loss: a product of pooled features and head whose residuals are squared in registers.

Forward nothing of the size (B·M, K) is written: the floor is the head and the values read once and the product's
arithmetic. Backward makes the residuals again, _CLASSES of them at a time, and gives them to matrix products.
Sums over players stay float32: they are split into three exact bfloat16 pieces for a bfloat16 head, so that the
matrix units lose nothing; other heads are multiplied in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

_CLASSES = 4096  # of which backward keeps the residuals at a time
_ROWS, _COLUMNS, _DEPTH = 64, 128, 32


@triton.jit
def _residuals(
    pooled,  # [B·M, L]
    weight,  # [K, L]
    scale,  # [B·M]
    slope,  # [B or 1, K]
    level,  # [B or 1, K]
    values,  # [B·M, K]
    factor,  # [B·M], read where the residuals are STORED
    out,  # [B·M, tiles] sums of squares, or [B·M, count] where they are STORED
    rows,
    width,
    classes,
    first,
    count,
    coalitions,
    slope_step,
    level_step,
    STORED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """pooled · weight + scale · slope + level - values, for `count` classes from `first`."""
    # Programs of the same classes run side by side: their rows of the head come from the cache.
    blocks = tl.cdiv(rows, ROWS)
    tile = tl.program_id(0) // blocks
    row = tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS)
    at = tile * COLUMNS + tl.arange(0, COLUMNS)
    column = first + at
    known, wanted = row < rows, at < count
    wide_row, wide_column = row.to(tl.int64), column.to(tl.int64)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + tl.arange(0, DEPTH)
        inside = depth < width
        left = tl.load(
            pooled + wide_row[:, None] * width + depth[None, :], mask=known[:, None] & inside[None, :], other=0.0
        )
        right = tl.load(
            weight + wide_column[None, :] * width + depth[:, None], mask=inside[:, None] & wanted[None, :], other=0.0
        )
        if right.dtype == tl.bfloat16:
            high = left.to(tl.bfloat16)
            rest = left - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            total = tl.dot(low, right, total)
            total = tl.dot(middle, right, total)
            total = tl.dot(high, right, total)
        else:
            total = tl.dot(left, right.to(tl.float32), total, input_precision="ieee")
    both = known[:, None] & wanted[None, :]
    image = (row // coalitions).to(tl.int64)
    steepness = tl.load(slope + image[:, None] * slope_step + column[None, :], mask=both, other=0.0)
    height = tl.load(level + image[:, None] * level_step + column[None, :], mask=both, other=0.0)
    value = tl.load(values + wide_row[:, None] * classes + column[None, :], mask=both, other=0.0).to(tl.float32)
    total += tl.load(scale + row, mask=known, other=0.0)[:, None] * steepness + height - value
    if STORED:
        total *= tl.load(factor + row, mask=known, other=0.0)[:, None]
        tl.store(out + wide_row[:, None] * count + at[None, :], total, mask=both)
    else:
        squares = tl.sum(tl.where(both, total * total, 0.0), 1)
        tl.store(out + wide_row * tl.cdiv(count, COLUMNS) + tile, squares, mask=known)


def _launch(given: Sequence[Tensor], factor: Tensor | None, out: Tensor, first: int, count: int) -> None:
    """`given`: pooled, weight, scale, slope, level and values."""
    pooled, weight, _, slope, level, _ = given
    batch, coalitions, width = pooled.shape
    programs = triton.cdiv(batch * coalitions, _ROWS) * triton.cdiv(count, _COLUMNS)
    if not programs:
        return
    _residuals[(programs,)](
        *given,
        given[2] if factor is None else factor,
        out,
        batch * coalitions,
        width,
        weight.shape[0],
        first,
        count,
        coalitions,
        slope.shape[1] if slope.shape[0] > 1 else 0,
        level.shape[1] if level.shape[0] > 1 else 0,
        STORED=factor is not None,
        ROWS=_ROWS,
        COLUMNS=_COLUMNS,
        DEPTH=_DEPTH,
        num_warps=8,
        num_stages=3,
        enable_fp_fusion=True,
    )


def linear_shapley_errors(
    pooled: Tensor, weight: Tensor, scale: Tensor, slope: Tensor, level: Tensor, values: Tensor
) -> Tensor:
    given = [x.contiguous() for x in (pooled, weight, scale, slope, level, values)]
    classes = weight.shape[0]
    partial = pooled.new_empty((*values.shape[:2], triton.cdiv(classes, _COLUMNS)))
    _launch(given, None, partial, 0, classes)
    return partial.sum(-1)


def linear_shapley_errors_backward(
    grad: Tensor,
    pooled: Tensor,
    weight: Tensor,
    scale: Tensor,
    slope: Tensor,
    level: Tensor,
    values: Tensor,
    values_too: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    given = [x.contiguous() for x in (pooled, weight, scale, slope, level, values)]
    pooled, weight, scale, slope, level, values = given
    factor = (2 * grad).contiguous()
    classes = weight.shape[0]
    # The gradient of a bfloat16 head is rounded to it: so may what it is made of. float16 would lose small gradients.
    operand = torch.bfloat16 if weight.dtype == torch.bfloat16 else torch.float32
    rows, head = pooled.flatten(0, 1).to(operand), weight.to(operand)
    grad_pooled, grad_weight = torch.zeros_like(pooled), torch.empty_like(weight)
    grad_slope, grad_level = torch.empty_like(slope), torch.empty_like(level)
    grad_values = torch.empty_like(values) if values_too else values.new_empty(0)
    # Autocast would round what is float32 on purpose.
    with torch.autocast(pooled.device.type, enabled=False):
        for first in range(0, classes, _CLASSES):
            chunk = slice(first, min(first + _CLASSES, classes))
            residual = pooled.new_empty((*values.shape[:2], chunk.stop - first))
            _launch(given, factor, residual, first, chunk.stop - first)
            of_slope, of_level = torch.bmm(scale.unsqueeze(1), residual), residual.sum(1, keepdim=True)
            for out, of_images in ((grad_slope, of_slope), (grad_level, of_level)):
                out[:, chunk] = of_images.squeeze(1) if out.shape[0] > 1 else of_images.sum(0)
            if values_too:
                grad_values[..., chunk] = -residual
            flat = residual.flatten(0, 1).to(operand)
            grad_weight[chunk] = flat.T @ rows
            grad_pooled += (flat @ head[chunk]).view_as(pooled)
    return grad_pooled, grad_weight, grad_slope, grad_level, grad_values
