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


#: Every file of Triton kernels has its cases here.
TRITON: dict[str, Callable[[], Iterator[Case]]] = {"mask_patches": mask_patches}

#: CUDA kernels that must hold an instruction in at least one of their instantiations for sm_90.
CUDA: dict[str, str] = {
    "mask_patches_kernel": WIDE_ACCESS,
    "mask_patches_backward_kernel": WIDE_ACCESS,
}
