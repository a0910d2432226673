"""Images with the patches of absent players replaced by a baseline, for every coalition at once."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import mask_patches as reference

_KERNELS = ("cuda", "triton", "cpu")


def mask_patches(
    images: Tensor,
    bits: Tensor,
    grid: tuple[int, int],
    baseline: float | Tensor = 0.0,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Replaces the patches of absent players by a baseline.

    out[b·M + m, c, y, x] = images[b, c, y, x] where bit p of bits[b, m] is set, else baseline[b, c, y, x],
    with p = (y // (H / h)) · w + x // (W / w). Absent pixels are selected, not multiplied: NaN in them is harmless.

    Args:
        images (float16, bfloat16, float32, float64): (B, C, H, W), contiguous or channels_last; other strides are
            copied to contiguous first.
        bits (int32): (B, M, ceil(P / 32)) coalitions of P = h·w players, row by row.
        grid: (h, w), patches per column and per row; h divides H, w divides W.
        baseline: a number, or a tensor (C,), (C, H, W) or (B, C, H, W) in the unit of `images`.
        dtype: dtype of the result; default that of `images`.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        (B·M, C, H, W) in the memory format of `images`: the coalitions of image b are rows b·M … b·M + M − 1.
        Gradients flow to `images` and `baseline`.

    Raises:
        ValueError: if the grid does not divide the image, or shapes, dtypes or devices do not match.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Example:
        >>> bits = fk.pack_bits(torch.tensor([[[True, False]]]))  # of two patches, the left one
        >>> fk.mask_patches(torch.ones(1, 1, 2, 4), bits, grid=(1, 2)).tolist()
        [[[[1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]]]]
    """
    op = "mask_patches"
    _checks.check_tensor(op, "images", images, "(B, C, H, W)", 4)
    grid = _check_grid(images, grid)
    _checks.check_bits(op, bits, grid[0] * grid[1], images)
    dtype = images.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _checks.FLOATING:
        _checks.fail(op, "dtype", "float16, bfloat16, float32 or float64", dtype)
    baseline_images = _expand_baseline(images, baseline)
    convertible = dtype == images.dtype or images.dtype == torch.float32
    reason = f"it converts float32 only, and `images` is {images.dtype}"
    unsupported = {} if convertible else dict.fromkeys(_KERNELS, reason)
    served_by = _backend.select(op, images.device, backend, _KERNELS, unsupported=unsupported)
    if served_by == "reference":
        return reference.mask_patches(images, bits, baseline_images, grid, dtype)
    return MaskPatches.apply(images, bits, baseline_images, grid[0], grid[1], dtype, _library.namespace(served_by))


def _check_grid(images: Tensor, grid: object) -> tuple[int, int]:
    height, width = images.shape[2:]
    if not isinstance(grid, tuple | list) or len(grid) != 2:
        _checks.fail("mask_patches", "grid", "two positive whole numbers (h, w)", grid)
    rows, columns = (_checks.check_count("mask_patches", f"grid[{i}]", grid[i], 1, 2**31 - 1) for i in (0, 1))
    if height % rows or width % columns:
        _checks.fail(
            "mask_patches",
            "grid",
            f"a divisor of the image size ({height}, {width})",
            grid,
            "Resize the images or change the grid.",
        )
    return rows, columns


def _expand_baseline(images: Tensor, baseline: float | Tensor) -> Tensor:
    """(1 or B, C, H, W) in the dtype and on the device of the images; a view wherever it can be."""
    channels, height, width = images.shape[1:]
    op, argument, shapes = "mask_patches", "baseline", "(C,), (C, H, W) or (B, C, H, W)"
    if isinstance(baseline, numbers.Real) and not isinstance(baseline, bool):
        # NaN and infinity are what the caller wrote; a finite number that the dtype can't hold is not.
        most = torch.finfo(images.dtype).max
        if not -most <= baseline <= most and baseline == baseline and baseline not in (math.inf, -math.inf):
            _checks.fail(op, argument, f"a number that {images.dtype}, the dtype of `images`, can hold", baseline)
        return images.new_full((), float(baseline)).expand(1, channels, height, width)
    if not isinstance(baseline, Tensor):
        _checks.fail(op, argument, f"a number or a tensor {shapes}", baseline)
    _checks.check_tensor(op, argument, baseline, shapes, range(1, 5))
    _checks.check_device(op, argument, baseline, images)
    baseline = baseline.to(images.dtype)
    if baseline.shape == (channels,):
        return baseline.view(1, channels, 1, 1).expand(1, channels, height, width)
    if baseline.shape == (channels, height, width):
        return baseline.unsqueeze(0)
    if baseline.shape == images.shape:
        return baseline
    return _checks.fail(
        op,
        argument,
        f"a number, ({channels},), {tuple(images.shape[1:])} or {tuple(images.shape)}",
        baseline,
    )


class MaskPatches(torch.autograd.Function):
    """Autograd face of `fastshap::mask_patches`."""

    @staticmethod
    def forward(
        images: Tensor, bits: Tensor, baseline: Tensor, rows: int, columns: int, dtype: torch.dtype, namespace: str
    ) -> Tensor:
        return _library.kernels(namespace).mask_patches(images, bits, baseline, rows, columns, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, bits, baseline, rows, columns, _, ctx.namespace = inputs
        ctx.save_for_backward(bits)
        ctx.grid = (rows, columns)
        ctx.dtype = images.dtype
        ctx.shared_baseline = baseline.shape[0] == 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        grad_images = grad_baseline = None
        if ctx.needs_input_grad[0]:
            grad_images = kernels.mask_patches_backward(grad, bits, *ctx.grid, True, ctx.dtype)
        if ctx.needs_input_grad[2]:
            grad_baseline = kernels.mask_patches_backward(grad, bits, *ctx.grid, False, ctx.dtype)
            if ctx.shared_baseline:
                grad_baseline = grad_baseline.sum(0, keepdim=True)
        return grad_images, None, grad_baseline, None, None, None, None


class MaskPatchesBackward:
    """The backward pass is linear: its own gradient is a mask_patches beside a baseline of 0, or of 0 beside one."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, bits, rows, columns, ctx.present, _, ctx.namespace = inputs
        ctx.save_for_backward(bits)
        ctx.grid = (rows, columns)
        ctx.dtype = grad.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        zeros = torch.zeros_like(grad)
        images, baseline = (grad, zeros) if ctx.present else (zeros, grad)
        masked = _library.kernels(ctx.namespace).mask_patches(images, bits, baseline, *ctx.grid, ctx.dtype)
        return masked, None, None, None, None, None, None


@_library.define(
    "mask_patches",
    "(Tensor images, Tensor bits, Tensor baseline, int rows, int columns, ScalarType dtype) -> Tensor",
)
def _fake(images: Tensor, bits: Tensor, baseline: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    shape = (images.shape[0] * bits.shape[1], *images.shape[1:])
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=reference.memory_format(images))


@_library.define(
    "mask_patches_backward",
    "(Tensor grad, Tensor bits, int rows, int columns, bool present, ScalarType dtype) -> Tensor",
)
def _fake_backward(grad: Tensor, bits: Tensor, rows: int, columns: int, present: bool, dtype: torch.dtype) -> Tensor:
    shape = (bits.shape[0], *grad.shape[1:])
    return torch.empty(shape, dtype=dtype, device=grad.device, memory_format=reference.memory_format(grad))


_library.register_autograd("mask_patches", MaskPatches)
_library.register_autograd("mask_patches_backward", MaskPatchesBackward)
