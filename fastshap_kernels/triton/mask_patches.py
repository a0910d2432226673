"""mask_patches: each block of an image is read once and written for several coalitions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.mask_patches import memory_format

_BLOCK = 1024  # values a program handles at a time: 8 a thread
_COALITIONS = 16  # coalitions for which a program writes its block


@triton.jit
def _players(at, width, channels, patch_height, patch_width, columns, height, CHANNELS_LAST: tl.constexpr):
    """The player whose patch holds value `at` of an image, counted in memory order."""
    if CHANNELS_LAST:
        pixel = at // channels
        y = pixel // width
    else:
        pixel = at
        y = (pixel // width) % height
    return (y // patch_height) * columns + (pixel % width) // patch_width


@triton.jit
def _forward(
    images,  # [B, pixels]
    bits,  # [B, M, W]
    baseline,  # [1 or B, pixels]
    out,  # [B, M, pixels]
    coalitions,
    pixels,
    baseline_step,
    words,
    height,
    width,
    channels,
    patch_height,
    patch_width,
    columns,
    CHANNELS_LAST: tl.constexpr,
    COALITIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(pixels, BLOCK)
    chunks = tl.cdiv(coalitions, COALITIONS)
    program = tl.program_id(0)
    image = (program // (blocks * chunks)).to(tl.int64)
    first = program // blocks % chunks * COALITIONS
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    player = _players(at, width, channels, patch_height, patch_width, columns, height, CHANNELS_LAST)
    pixel = tl.load(images + image * pixels + at, mask=inside)
    fill = tl.load(baseline + image * baseline_step + at, mask=inside)
    for member in range(first, tl.minimum(first + COALITIONS, coalitions)):
        row = image * coalitions + member
        word = tl.load(bits + row * words + player // 32, mask=inside, other=0)
        present = (word >> (player % 32)) & 1
        value = tl.where(present != 0, pixel, fill).to(out.dtype.element_ty)
        tl.store(out + row * pixels + at, value, mask=inside)


@triton.jit
def _backward(
    grad,  # [B, M, pixels]
    bits,  # [B, M, W]
    out,  # [B, pixels]
    coalitions,
    pixels,
    words,
    height,
    width,
    channels,
    patch_height,
    patch_width,
    columns,
    CHANNELS_LAST: tl.constexpr,
    PRESENT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    blocks = tl.cdiv(pixels, BLOCK)
    program = tl.program_id(0)
    image = (program // blocks).to(tl.int64)
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < pixels
    player = _players(at, width, channels, patch_height, patch_width, columns, height, CHANNELS_LAST)
    total = tl.zeros([BLOCK], ACCUMULATE)
    for member in range(coalitions):
        row = image * coalitions + member
        word = tl.load(bits + row * words + player // 32, mask=inside, other=0)
        wanted = inside & (((word >> (player % 32)) & 1) == PRESENT)
        total += tl.load(grad + row * pixels + at, mask=wanted, other=0.0).to(ACCUMULATE)
    tl.store(out + image * pixels + at, total.to(out.dtype.element_ty), mask=inside)


def _geometry(images: Tensor, rows: int, columns: int) -> tuple[int, ...]:
    """height, width, channels, patch_height, patch_width, columns."""
    channels, height, width = images.shape[1:]
    return height, width, channels, height // rows, width // columns, columns


def mask_patches(images: Tensor, bits: Tensor, baseline: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    layout = memory_format(images)
    images, bits = images.contiguous(memory_format=layout), bits.contiguous()
    baseline = baseline.contiguous(memory_format=layout)
    batch, coalitions, words = bits.shape
    out = torch.empty((batch * coalitions, *images.shape[1:]), dtype=dtype, device=images.device, memory_format=layout)
    if not out.numel():
        return out
    pixels = images[0].numel()
    programs = batch * triton.cdiv(coalitions, _COALITIONS) * triton.cdiv(pixels, _BLOCK)
    _forward[(programs,)](
        images,
        bits,
        baseline,
        out,
        coalitions,
        pixels,
        0 if baseline.shape[0] == 1 else pixels,
        words,
        *_geometry(images, rows, columns),
        CHANNELS_LAST=layout == torch.channels_last,
        COALITIONS=_COALITIONS,
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
    return out


def mask_patches_backward(
    grad: Tensor, bits: Tensor, rows: int, columns: int, present: bool, dtype: torch.dtype
) -> Tensor:
    layout = memory_format(grad)
    grad, bits = grad.contiguous(memory_format=layout), bits.contiguous()
    batch, coalitions, words = bits.shape
    out = torch.empty((batch, *grad.shape[1:]), dtype=dtype, device=grad.device, memory_format=layout)
    if not out.numel():
        return out
    pixels = out[0].numel()
    _backward[(batch * triton.cdiv(pixels, _BLOCK),)](
        grad,
        bits,
        out,
        coalitions,
        pixels,
        words,
        *_geometry(grad, rows, columns),
        CHANNELS_LAST=layout == torch.channels_last,
        PRESENT=int(present),
        ACCUMULATE=tl.float64 if grad.dtype == torch.float64 else tl.float32,
        BLOCK=_BLOCK,
        enable_fp_fusion=True,
    )
    return out
