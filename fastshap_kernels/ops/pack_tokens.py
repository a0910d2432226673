"""The tokens of every coalition in one packed batch: absent players are dropped, not masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import pack_tokens as reference

_KERNELS = ("cuda", "triton", "cpu")


def pack_tokens(
    tokens: Tensor, bits: Tensor, prefix: int, *, paired: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor, int]:
    """Gathers the tokens of every coalition, one sequence after another, with absent players left out.

    Sequence b·M + m holds the Q prefix tokens of image b, then the tokens of the players whose bit is set in
    bits[b, m], in order. Absent tokens are not read: NaN in them is harmless.

    Args:
        tokens (float16, bfloat16, float32, float64): (B, Q + P, D), prefix tokens first; any width D.
        bits (int32): (B, M, ceil(P / 32)) coalitions.
        prefix: Q ≥ 0, tokens that never play: present in every sequence.
        paired: a promise that coalitions 2j and 2j + 1 of an image are complements (M even). The number of rows,
            T = B · (M / 2) · (P + 2Q), then follows from the shapes: no wait for the device, and
            torch.compile(fullgraph=True) works. Without it T is counted from the bits. A GPU does not check the
            promise: its kernels take coalition 2j + 1 to be the complement of 2j.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        rows (T, D), cu_seqlens int32 (B·M + 1) with the first row of each sequence and T at its end, and
        max_seqlen = Q + P, an upper bound that follows from the shapes. Gradients flow to `tokens`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `paired` is not true of the bits.
        RuntimeError: if an explicitly chosen backend can't serve the call; and from the compiled backend, for wrong
            numbers in an argument of the right shape.

    Deterministic: yes, forward and backward.
    """
    op = "pack_tokens"
    _checks.check_tensor(op, "tokens", tokens, "(B, Q + P, D)", 3)
    length = int(tokens.shape[1])
    _checks.check_count(op, "prefix", prefix, 0, length - 1, "At least one token must be a player.")
    players = length - prefix
    _checks.check_count(op, "tokens.shape[1] - prefix", players, 1, _checks.MAX_PLAYERS)
    _checks.check_bits(op, bits, players, tokens)
    if paired and bits.shape[1] % 2:
        _checks.fail(op, "bits", "pairs of complements (M even), since `paired` is True", bits)
    served_by = _backend.select(op, tokens.device, backend, _KERNELS)
    if served_by == "reference":
        rows, cu_seqlens = _reference(tokens, bits, prefix, paired)
    else:
        rows, cu_seqlens = PackTokens.apply(tokens, bits, prefix, paired, _library.namespace(served_by))
    return rows, cu_seqlens, length


def _paired_total(bits: Tensor, length: int, prefix: int) -> int:
    """Rows of a packed batch of complementary pairs."""
    return bits.shape[0] * (bits.shape[1] // 2) * (length + prefix)


def _reference(tokens: Tensor, bits: Tensor, prefix: int, paired: bool) -> tuple[Tensor, Tensor]:
    promised = _paired_total(bits, tokens.shape[1], prefix) if paired else None
    rows, cu_seqlens = reference.pack_tokens(tokens, bits, prefix, promised)
    if paired and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        counted = int(cu_seqlens[-1])
        if counted != promised:
            _checks.fail(
                "pack_tokens",
                "bits",
                f"pairs of complements with {promised} tokens in all, since `paired` is True",
                counted,
                "Sample with paired=True, or leave `paired` out.",
            )
    return rows, cu_seqlens


class PackTokens(torch.autograd.Function):
    """Autograd face of `fastshap::pack_tokens`."""

    @staticmethod
    def forward(tokens: Tensor, bits: Tensor, prefix: int, paired: bool, namespace: str) -> tuple[Tensor, Tensor]:
        return _library.kernels(namespace).pack_tokens(tokens, bits, prefix, paired)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tokens, bits, prefix, _, ctx.namespace = inputs
        ctx.save_for_backward(bits, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.prefix = prefix
        ctx.length = tokens.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        bits, cu_seqlens = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        grad_tokens = kernels.pack_tokens_backward(grad, bits, cu_seqlens, ctx.prefix, ctx.length)
        return grad_tokens, None, None, None, None


@_library.define(
    "pack_tokens",
    "(Tensor tokens, Tensor bits, int prefix, bool paired) -> (Tensor rows, Tensor cu_seqlens)",
)
def _fake(tokens: Tensor, bits: Tensor, prefix: int, paired: bool) -> tuple[Tensor, Tensor]:
    total = _paired_total(bits, tokens.shape[1], prefix) if paired else torch.library.get_ctx().new_dynamic_size()
    cu_seqlens = bits.new_empty(bits.shape[0] * bits.shape[1] + 1)
    return tokens.new_empty(total, tokens.shape[2]), cu_seqlens


@_library.define(
    "pack_tokens_backward",
    "(Tensor grad, Tensor bits, Tensor cu_seqlens, int prefix, int length) -> Tensor",
)
def _fake_backward(grad: Tensor, bits: Tensor, cu_seqlens: Tensor, prefix: int, length: int) -> Tensor:
    return grad.new_empty(bits.shape[0], length, grad.shape[1])


_library.register_autograd("pack_tokens", PackTokens)
