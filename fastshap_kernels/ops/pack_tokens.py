"""The tokens of every coalition in one packed batch: absent players are dropped, not masked."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _checks
from ..reference import pack_tokens as reference


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
            torch.compile(fullgraph=True) works. Without it T is counted from the bits.
        backend: "reference" or "cpu"; default the best available.

    Returns:
        rows (T, D), cu_seqlens int32 (B·M + 1) with the first row of each sequence and T at its end, and
        max_seqlen = Q + P, an upper bound that follows from the shapes. Gradients flow to `tokens`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, or, on the CPU, if `paired` is not true of the bits.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, forward and backward.
    """
    op = "pack_tokens"
    _checks.check_tensor(op, "tokens", tokens, "(B, Q + P, D)", 3)
    length = int(tokens.shape[1])
    _checks.check_count(op, "prefix", prefix, 0, length - 1, "At least one token must be a player.")
    players = length - prefix
    _checks.check_count(op, "tokens.shape[1] - prefix", players, 1, _checks.MAX_PLAYERS)
    _checks.check_bits(op, bits, players, tokens)
    total = paired_total(bits, players, prefix) if paired else None
    _backend.select(op, tokens.device, backend, compiled=False)
    rows, cu_seqlens = reference.pack_tokens(tokens, bits, prefix, total)
    if total is not None and cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_promise(int(cu_seqlens[-1]), total)
    return rows, cu_seqlens, length


def paired_total(bits: Tensor, players: int, prefix: int) -> int:
    """Rows of a packed batch of complementary pairs."""
    if bits.shape[1] % 2:
        _checks.fail("pack_tokens", "bits", "pairs of complements (M even), since `paired` is True", bits)
    return bits.shape[0] * (bits.shape[1] // 2) * (players + 2 * prefix)


def _check_promise(counted: int, promised: int) -> None:
    if counted != promised:
        _checks.fail(
            "pack_tokens",
            "bits",
            f"pairs of complements with {promised} tokens in all, since `paired` is True",
            counted,
            "Sample with paired=True, or leave `paired` out.",
        )
