"""What the gate compiles: calls of raw operators at the shapes of a ViT, and the instructions that must come of them.

A Triton kernel is compiled as its launcher starts it. The tensors lie on the processor and their values don't
matter: nothing runs. CUDA kernels are all compiled; here they are only named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

HALF, SINGLE = torch.bfloat16, torch.float32

WIDE_ACCESS = r"\b(LDG|STG)\.E(\.\w+)*\.128"
MATRIX_UNITS = r"\b(\w*HGMMA|HMMA|UTC\w*MMA)\b"


@dataclass
class Case:
    """One call of a raw operator.

    Attributes:
        name: what the budget calls it.
        call: makes the call on `torch.ops.fastshap_triton`.
        instructions: for each kernel that it launches, a pattern that its machine code must hold.
    """

    name: str
    call: Callable[[Any], Any]
    instructions: dict[str, str]


def bits(batch: int, coalitions: int, players: int) -> torch.Tensor:
    return torch.zeros(batch, coalitions, (players + 31) // 32, dtype=torch.int32)


def mask_patches() -> Iterator[Case]:
    for label, dtype, layout in (
        ("float32", SINGLE, torch.contiguous_format),
        ("bfloat16", HALF, torch.contiguous_format),
        ("bfloat16 channels_last", HALF, torch.channels_last),
    ):
        images = torch.zeros(2, 3, 224, 224, dtype=dtype).to(memory_format=layout)
        grad = torch.zeros(16, 3, 224, 224, dtype=dtype).to(memory_format=layout)
        fill = torch.zeros(1, 3, 224, 224, dtype=dtype).to(memory_format=layout)
        yield Case(
            f"mask_patches {label}",
            lambda ops, images=images, fill=fill: ops.mask_patches(images, bits(2, 8, 196), fill, 14, 14, images.dtype),
            {"_forward": WIDE_ACCESS},
        )
        yield Case(
            f"mask_patches_backward {label}",
            lambda ops, grad=grad: ops.mask_patches_backward(grad, bits(2, 8, 196), 14, 14, True, grad.dtype),
            {"_backward": WIDE_ACCESS},
        )


def packed_attention() -> Iterator[Case]:
    for dtype, head_dim, max_seqlen in (
        (HALF, 64, 197),
        (HALF, 64, 50),
        (HALF, 72, 257),
        (HALF, 128, 197),
        (SINGLE, 64, 197),
        (SINGLE, 128, 197),
    ):
        label = f"{str(dtype).removeprefix('torch.')} head_dim {head_dim} max_seqlen {max_seqlen}"
        qkv = torch.zeros(max_seqlen, 3, 6, head_dim, dtype=dtype)
        grad = torch.zeros(max_seqlen, 6, head_dim, dtype=dtype)
        sums = torch.zeros(max_seqlen, 6)
        boundaries = torch.tensor([0, max_seqlen], dtype=torch.int32)
        products = MATRIX_UNITS if dtype == HALF else r"\bFFMA\b"
        backward = ("_backward_keys",) if max_seqlen <= 64 else ("_backward_keys", "_backward_queries")
        yield Case(
            f"packed_attention {label}",
            lambda ops, qkv=qkv, at=boundaries, n=max_seqlen: ops.packed_attention(qkv, at, n, 0.125),
            {"_forward": products},
        )
        yield Case(
            f"packed_attention_backward {label}",
            lambda ops, grad=grad, qkv=qkv, at=boundaries, n=max_seqlen, sums=sums: ops.packed_attention_backward(
                grad, qkv, at, n, sums, 0.125
            ),
            dict.fromkeys(backward, products),
        )


#: Every file of Triton kernels has its cases here.
TRITON: dict[str, Callable[[], Iterator[Case]]] = {"mask_patches": mask_patches, "packed_attention": packed_attention}

#: CUDA kernels that must hold an instruction in at least one of their instantiations for sm_90.
CUDA: dict[str, str] = {
    "mask_patches_kernel": WIDE_ACCESS,
    "mask_patches_backward_kernel": WIDE_ACCESS,
}
