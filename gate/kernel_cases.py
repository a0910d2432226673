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
WARP_SUM = r"\bREDUX\b"
SINGLE_UNITS = r"\bFFMA2?\b"  # the second multiplies pairs
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


def linear_shapley_loss() -> Iterator[Case]:
    for label, dtype, products in (("float32", SINGLE, SINGLE_UNITS), ("bfloat16", HALF, MATRIX_UNITS)):
        classes = 1000
        pooled, weight = torch.zeros(4, 8, 768), torch.zeros(classes, 768, dtype=dtype)
        given = (
            pooled,
            weight,
            torch.zeros(4, 8),
            *torch.zeros(2, 1, classes),
            torch.zeros(4, 8, classes, dtype=dtype),
        )
        yield Case(
            f"linear_shapley_errors {label}",
            lambda ops, given=given: ops.linear_shapley_errors(*given),
            {"_residuals": products},
        )
        yield Case(
            f"linear_shapley_errors_backward {label}",
            lambda ops, given=given: ops.linear_shapley_errors_backward(torch.zeros(4, 8), *given, False),
            {"_residuals": products},
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
        products = MATRIX_UNITS if dtype == HALF else SINGLE_UNITS
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


def cu_seqlens(sequences: int) -> torch.Tensor:
    return torch.zeros(sequences + 1, dtype=torch.int32)


def pack_tokens() -> Iterator[Case]:
    for label, dtype in (("float32", SINGLE), ("bfloat16", HALF)):
        tokens, grad = torch.zeros(2, 197, 768, dtype=dtype), torch.zeros(2 * 4 * 198, 768, dtype=dtype)
        yield Case(
            f"pack_tokens {label}",
            lambda ops, tokens=tokens: ops.pack_tokens(tokens, bits(2, 8, 196), 1, True, -1),
            {"_forward": WIDE_ACCESS},
        )
        yield Case(
            f"pack_tokens_backward {label}",
            lambda ops, grad=grad: ops.pack_tokens_backward(grad, bits(2, 8, 196), cu_seqlens(16), 1, 197, True),
            {"_backward": WIDE_ACCESS},
        )


def layer_norm_segment_sum() -> Iterator[Case]:
    weight = torch.zeros(768)
    for label, dtype in (("float32", SINGLE), ("bfloat16", HALF)):
        rows, grad = torch.zeros(2 * 4 * 198, 768, dtype=dtype), torch.zeros(16, 768, dtype=dtype)
        yield Case(
            f"layer_norm_segment_sum {label}",
            lambda ops, rows=rows: ops.layer_norm_segment_sum(rows, cu_seqlens(16), weight, weight, 1, 1e-6),
            {"_forward": WIDE_ACCESS},
        )
        yield Case(
            f"layer_norm_segment_sum_backward {label}",
            lambda ops, rows=rows, grad=grad: ops.layer_norm_segment_sum_backward(
                grad, rows, cu_seqlens(16), weight, 1, 1e-6
            ),
            {"_backward": WIDE_ACCESS},
        )


def segment_sum() -> Iterator[Case]:
    for label, dtype in (("float32", SINGLE), ("bfloat16", HALF)):
        rows, grad = torch.zeros(2 * 4 * 198, 768, dtype=dtype), torch.zeros(16, 768, dtype=dtype)
        yield Case(
            f"segment_sum {label}",
            lambda ops, rows=rows: ops.segment_sum(rows, cu_seqlens(16), 1),
            {"_forward": WIDE_ACCESS},
        )
        yield Case(
            f"segment_sum_backward {label}",
            lambda ops, grad=grad: ops.segment_sum_backward(grad, cu_seqlens(16), 1, 2 * 4 * 198),
            {"_backward": WIDE_ACCESS},
        )


def sample_coalitions() -> Iterator[Case]:
    seed, offset = 2**40, 2**41  # 64-bit, whatever their values
    for players in (49, 196, 1024, 4096):
        thresholds = torch.zeros(players - 2, dtype=torch.int64)
        yield Case(
            f"sample_coalitions {players} players",
            lambda ops, t=thresholds, p=players: ops.sample_coalitions(t, 64, 4, p, seed, offset, True),
            {"_sample": WARP_SUM},
        )


def coalition_sizes() -> Iterator[Case]:
    for players in (49, 196, 1024, 4096):
        words = bits(64, 4, players)
        yield Case(
            f"coalition_sizes {players} players",
            lambda ops, words=words, p=players: ops.coalition_sizes(words, p),
            {"_sizes": WIDE_ACCESS} if words.shape[2] % 4 == 0 else {},
        )


def exact_shapley() -> Iterator[Case]:
    for label, shape, dtype in (
        ("16 players 10 classes float32", (20, 2**16, 10), SINGLE),
        ("12 players 1000 classes bfloat16", (4, 2**12, 1000), HALF),
        ("20 players 1 class float32", (1, 2**20, 1), SINGLE),
    ):
        values = torch.empty(shape, dtype=dtype)
        yield Case(f"exact_shapley {label}", lambda ops, values=values: ops.exact_shapley(values), {})


def coalition_sum() -> Iterator[Case]:
    for coalitions in (4, 32, 128):
        for label, dtype in (("float32", SINGLE), ("bfloat16", HALF), ("float64", torch.float64)):
            # Rows of 1000: not a multiple of 16, which the compiler would see by itself.
            features = torch.zeros(2, 196, 1000, dtype=dtype)
            grad = torch.zeros(2, coalitions, 1000, dtype=dtype)
            words = bits(2, coalitions, 196)
            wanted = MATRIX_UNITS if dtype != torch.float64 else WIDE_ACCESS
            yield Case(
                f"coalition_sum {label} M {coalitions}",
                lambda ops, x=features, words=words: ops.coalition_sum(x, words, x.dtype),
                {"_forward": wanted},
            )
            yield Case(
                f"coalition_sum_backward {label} M {coalitions}",
                lambda ops, x=grad, words=words: ops.coalition_sum_backward(x, words, 196, x.dtype),
                {"_backward": wanted},
            )


def shapley_regression_loss() -> Iterator[Case]:
    for label, dtype in (("float32", SINGLE), ("bfloat16", HALF)):
        phi, target = torch.zeros(2, 196, 1000, dtype=dtype), torch.zeros(2, 32, 1000)
        scale, words = torch.zeros(2, 32), bits(2, 32, 196)
        yield Case(
            f"shapley_regression_loss {label}",
            lambda ops, x=phi, target=target, words=words: ops.shapley_regression_loss(x, words, target),
            {"_forward": MATRIX_UNITS},
        )
        yield Case(
            f"shapley_regression_loss_backward {label}",
            lambda ops, grad=target, scale=scale, words=words, dtype=dtype: ops.shapley_regression_loss_backward(
                grad, scale, words, 196, dtype
            ),
            {"_backward": MATRIX_UNITS},
        )


#: Every file of Triton kernels has its cases here.
TRITON: dict[str, Callable[[], Iterator[Case]]] = {
    "coalition_sizes": coalition_sizes,
    "coalition_sum": coalition_sum,
    "exact_shapley": exact_shapley,
    "layer_norm_segment_sum": layer_norm_segment_sum,
    "linear_shapley_loss": linear_shapley_loss,
    "mask_patches": mask_patches,
    "pack_tokens": pack_tokens,
    "packed_attention": packed_attention,
    "sample_coalitions": sample_coalitions,
    "segment_sum": segment_sum,
    "shapley_regression_loss": shapley_regression_loss,
}

#: CUDA kernels that must hold an instruction in at least one of their instantiations for sm_90.
CUDA: dict[str, str] = {
    "coalition_sizes_kernel": WIDE_ACCESS,
    "coalition_sums_kernel": WIDE_ACCESS,
    "coalition_scatter_kernel": WIDE_ACCESS,
    "layer_norm_segment_sum_kernel": WIDE_ACCESS,
    "layer_norm_segment_sum_backward_kernel": WIDE_ACCESS,
    "pack_tokens_kernel": WIDE_ACCESS,
    "pack_tokens_backward_kernel": WIDE_ACCESS,
    "segment_sum_kernel": WIDE_ACCESS,
    "segment_sum_backward_kernel": WIDE_ACCESS,
    "mask_patches_kernel": WIDE_ACCESS,
    "mask_patches_backward_kernel": WIDE_ACCESS,
    "sample_coalitions_kernel": WARP_SUM,
}
