"""Lower precision than the model's own, for coalition values that no gradient flows back through."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .._checks import check_choice


def at_least_float32(values: Tensor) -> Tensor:
    """The values themselves, or in float32 what has fewer bits: sums and differences then keep what there is."""
    return values.float() if values.dtype.itemsize < 4 else values


PRECISIONS = ("auto", "same", "bf16", "fp8")

_FLOAT8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FLOAT8).max
#: What `torch._scaled_mm` asks of both dimensions of a weight.
_MULTIPLE = 16
#: The first GPUs with 8-bit products: Ada; then Hopper and all newer ones.
_CAPABILITY = (8, 9)


def lowered(model: nn.Module, precision: str = "auto") -> AbstractContextManager[Any]:
    """A context in which `model` computes with less precision; it leaves the model as it was, errors or not.

    Args:
        model: a SelfExplainingClassifier or its backbone.
        precision: "same", the model's own, within the autocast that is on, if any; "bf16", bfloat16 autocast; "fp8",
            as "bf16", but the linear layers of the transformer's blocks multiply 8-bit floats (e4m3): weight and
            input each divided by their own largest magnitude (one scale a tensor, found on the device), sums in
            float32, results in bfloat16, layers whose sizes are no multiples of 16 left out; "auto", "bf16" for a
            float32 model on a GPU where no autocast is on, "same" elsewhere.

    Raises:
        ValueError: for an unknown precision; for "fp8" where gradients are on, on a GPU before compute capability
            8.9, and for a model without blocks of linear layers.

    Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433.
    """
    precision, device = resolved(model, precision), next(model.parameters()).device
    if precision == "same":
        return nullcontext()
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    _check_float8(device)
    return _float8(model, device)


def resolved(model: nn.Module, precision: str) -> str:
    """What "auto" is for this model, where it is; others are what they are."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    parameter = next(model.parameters())
    is_plain = parameter.dtype == torch.float32 and not torch.is_autocast_enabled(parameter.device.type)
    return "bf16" if parameter.device.type == "cuda" and is_plain else "same"


def _check_float8(device: torch.device) -> None:
    if torch.is_grad_enabled():
        raise ValueError("Precision 'fp8' has no gradient. Use it under torch.no_grad(), or choose 'bf16'.")
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _CAPABILITY:
        raise ValueError(
            f"Precision 'fp8' needs a GPU of compute capability 8.9 or newer, but {torch.cuda.get_device_name(device)} "
            f"has {'.'.join(map(str, torch.cuda.get_device_capability(device)))}. Choose 'bf16'."
        )


@contextmanager
def _float8(model: nn.Module, device: torch.device) -> Iterator[None]:
    weights = {id(layer.weight): quantise(layer.weight) for layer in _linear_layers(model)}
    with torch.autocast(device.type, torch.bfloat16), _Float8Products(weights):
        yield


class Float8(NamedTuple):
    """x ≈ scale · values, float8_e4m3fn."""

    values: Tensor
    scale: Tensor  # float32 ()


def quantise(x: Tensor) -> Float8:
    """x in 8 bits, its largest magnitude at the end of their range (448); no wait for the device."""
    scale = (x.detach().abs().amax().float() / _LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return Float8((x.detach() / scale).to(_FLOAT8), scale)


def _linear_layers(model: nn.Module) -> list[nn.Linear]:
    """The layers of the blocks that 8-bit products can serve."""
    blocks = getattr(getattr(model, "backbone", model), "blocks", None)
    layers = [layer for layer in blocks.modules() if isinstance(layer, nn.Linear)] if blocks is not None else []
    fitting = [x for x in layers if x.in_features % _MULTIPLE == 0 and x.out_features % _MULTIPLE == 0]
    if not fitting:
        raise ValueError(
            f"Precision 'fp8' is for transformers whose widths are multiples of {_MULTIPLE}; this model has no such "
            "linear layer in its blocks. Choose 'bf16'."
        )
    return fitting


class _Float8Products(TorchFunctionMode):
    """Replaces `linear` for the weights that it is given: id → weight in 8 bits."""

    def __init__(self, weights: dict[int, Float8]) -> None:
        super().__init__()
        self._weights = weights

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is linear:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if id(weight) in self._weights:
                return _product(self._weights[id(weight)], *_input_and_bias(*args, **kwargs))
        if func is Tensor.unflatten:  # a method in Python, whose super() torch 2.11 can't compile from here
            func = torch.unflatten
        return func(*args, **kwargs)


def _input_and_bias(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return input, bias


def _product(weight: Float8, x: Tensor, bias: Tensor | None) -> Tensor:
    """linear(x, weight, bias) of x (…, K) in bfloat16."""
    rows = x.reshape(-1, x.shape[-1])
    if not rows.shape[0]:
        return x.new_zeros(*x.shape[:-1], weight.values.shape[0], dtype=torch.bfloat16)
    rows8 = quantise(rows)
    bias = None if bias is None else bias.to(torch.bfloat16)
    out = torch._scaled_mm(
        rows8.values, weight.values.t(), rows8.scale, weight.scale, bias=bias, out_dtype=torch.bfloat16
    )
    return out.view(*x.shape[:-1], -1)
