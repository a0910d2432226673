"""Dense attention on the CPU in bfloat16 through `packed_attention`.

PyTorch's backward pass of it takes several times as long there (bench/vision/bench_cpu_attention.py); equal sequences
are a packed batch like any other. In float32 neither is clearly faster, and nothing changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fastshap_kernels import packed_attention

#: Of a head's width, what `packed_attention` takes.
WIDTH_STEP, WIDEST = 8, 128


def cpu_attention(like: Tensor, model: nn.Module | None = None) -> AbstractContextManager[Any]:
    """A context in which the self-attention of bfloat16 tensors on the CPU, `like` one's device, is packed attention.

    Attention with a mask, dropout or other keys than queries, other dtypes and devices, passes without gradients, and
    what torch.compile traces stay as they are; so does a `model` that checkpoints gradients, whose blocks are computed
    again outside of the context and must be what they were.
    """
    if torch.compiler.is_compiling() or like.device.type != "cpu" or not torch.is_grad_enabled():
        return nullcontext()
    if model is not None and any(getattr(part, "grad_checkpointing", False) for part in model.modules()):
        return nullcontext()
    return _CpuAttention()


class _CpuAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention and _fits(*args, **kwargs):
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _fits(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> bool:
    is_plain = attn_mask is None and dropout_p == 0.0 and not is_causal and not enable_gqa
    return (
        is_plain
        and type(query) is type(key) is type(value) is Tensor  # subclasses have an attention of their own
        and query.ndim == 4
        and query.shape == key.shape == value.shape
        and query.numel() > 0
        and query.dtype == key.dtype == value.dtype == torch.bfloat16
        and query.device.type == "cpu"
        and query.shape[-1] % WIDTH_STEP == 0
        and query.shape[-1] <= WIDEST
    )


def _attend(query: Tensor, key: Tensor, value: Tensor, *off: Any, scale: float | None = None, **too: Any) -> Tensor:
    """(B, heads, N, head_dim) each → the same, each image a sequence of N rows; what `_fits` has checked is off."""
    batch, _, length, _ = query.shape
    rows = torch.stack([query, key, value]).permute(1, 3, 0, 2, 4).flatten(0, 1)
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32) * length
    return packed_attention(rows, cu_seqlens, length, scale=scale).unflatten(0, (batch, length)).transpose(1, 2)
