"""Linear layers on the CPU through oneDNN, which PyTorch carries and uses for bfloat16 but not for float32.

PyTorch multiplies float32 by the BLAS that it was built with. At the shapes of a transformer's rows oneDNN is faster
on the processors measured (bench/vision/bench_cpu_linear.py); a training step of a ViT spends five sixths of its time
there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Below this many rows the tenth of a millisecond that it takes to get to oneDNN's kernel is not won back.
FEWEST_ROWS = 512


def cpu_linears(like: Tensor) -> AbstractContextManager[Any]:
    """A context in which the linear layers of float32 tensors on the CPU, `like` one of them, run through oneDNN.

    Anywhere else, and while torch.compile traces, nothing changes. Gradients flow as ever (first derivatives only).
    """
    if torch.compiler.is_compiling() or like.device.type != "cpu":
        return nullcontext()
    has_onednn = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return _CpuLinears() if has_onednn else nullcontext()


class _CpuLinears(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.linear:
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    fits = (
        {type(input), type(weight)} <= {Tensor, nn.Parameter}  # subclasses have a linear of their own
        and weight.ndim == 2
        and input.shape[-1:] == weight.shape[1:]
        and {input.dtype, weight.dtype} == {torch.float32}
        and weight.device.type == "cpu"
        and input.numel() >= FEWEST_ROWS * weight.shape[1] > 0
        and weight.shape[0] > 0
        and not torch.is_autocast_enabled("cpu")
    )
    return CpuLinear.apply(input, weight, bias) if fits else functional.linear(input, weight, bias)


class CpuLinear(torch.autograd.Function):
    """input (..., I), weight (O, I), bias (O) or None → (..., O), float32 on the CPU."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        return _product(input, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        input, weight = ctx.saved_tensors
        grad_input = _product(grad, weight.t(), None) if ctx.needs_input_grad[0] else None
        rows = grad.flatten(0, -2)
        # This one, long in its sum and small in its result, the BLAS does as fast.
        grad_weight = rows.t() @ input.flatten(0, -2) if ctx.needs_input_grad[1] else None
        return grad_input, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _product(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(input, weight, bias, "none", [], "")
