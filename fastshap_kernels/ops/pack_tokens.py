"""The tokens of every coalition in one packed batch: absent players are dropped, not masked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import pack_tokens as reference
from ..reference.pack_bits import unpack_bits

_KERNELS = ("cuda", "triton", "cpu")

_COUNTED = -1  # what the operators take as `total` for a T that they count from the bits


def pack_tokens(
    tokens: Tensor,
    bits: Tensor,
    prefix: int,
    *,
    paired: bool = False,
    rows: int | None = None,
    backend: str | None = None,
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
            promise: its kernels take coalition 2j + 1 to be the complement of 2j, forward and backward.
        rows: a fixed number of rows, at least T, for coalitions that are no pairs: shapes don't depend on the bits
            then either. The rows past T are 0 and form further sequences. A GPU checks that it is enough when its
            turn comes, as an assertion on the device.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        rows (T, D), cu_seqlens int32 (B·M + 1) with the first row of each sequence and T at its end, and
        max_seqlen = Q + P, an upper bound that follows from the shapes. Gradients flow to `tokens`. With `rows`:
        (rows, D), and cu_seqlens goes on with the ends of ceil(rows / (Q + P)) further sequences, up to `rows`.

    Raises:
        ValueError: if shapes, dtypes or devices do not match, `paired` and `rows` are both given, or, on the CPU, if
            `paired` is not true of the bits or `rows` are too few.
        RuntimeError: if an explicitly chosen backend can't serve the call; and from the compiled backend, for wrong
            numbers in an argument of the right shape.

    Example:
        >>> tokens, bits = torch.randn(2, 1 + 9, 8), fk.sample_coalitions(2, 4, 9, seed=0)
        >>> rows, cu_seqlens, max_seqlen = fk.pack_tokens(tokens, bits, prefix=1, paired=True)
        >>> rows.shape, cu_seqlens.shape, max_seqlen
        (torch.Size([44, 8]), torch.Size([9]), 10)
    """
    op = "pack_tokens"
    _checks.check_tensor(op, "tokens", tokens, "(B, Q + P, D)", 3)
    length = int(tokens.shape[1])
    prefix = _checks.check_count(op, "prefix", prefix, 0, length - 1, "At least one token must be a player.")
    players = length - prefix
    _checks.check_count(op, "tokens.shape[1] - prefix", players, 1, _checks.MAX_PLAYERS)
    _checks.check_bits(op, bits, players, tokens)
    _checks.check_flag(op, "paired", paired)
    if paired and bits.shape[1] % 2:
        _checks.fail(op, "bits", "pairs of complements (M even), since `paired` is True", bits)
    if rows is not None:
        rows = _checks.check_count(op, "rows", rows, 0, 2**31 - 1)
        if paired:
            _checks.fail(op, "rows", "left out for pairs, whose rows follow from the shapes", rows)
    elif not paired and bits.is_meta:
        _checks.fail(op, "bits", "coalitions that can be counted", bits, "Pass `rows`, or `paired` for pairs.")
    served_by = _backend.select(op, tokens.device, backend, _KERNELS)
    if served_by == "reference":
        packed, cu_seqlens = _reference(tokens, bits, prefix, paired, rows)
    else:
        packed, cu_seqlens = PackTokens.apply(
            tokens, bits, prefix, paired, _COUNTED if rows is None else rows, _library.namespace(served_by)
        )
    if rows is None:
        return packed, cu_seqlens, length
    if cu_seqlens.device.type not in ("cpu", "meta"):
        torch._assert_async(cu_seqlens[-1] <= rows, "pack_tokens: argument `rows` is less than the tokens present.")
    return packed, torch.cat([cu_seqlens, _surplus_ends(cu_seqlens, rows, length)]), length


def _surplus_ends(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    """Where the sequences of the rows past T end: none is longer than the others may be, and their count is fixed."""
    ends = torch.arange(1, (rows + length - 1) // length + 1, dtype=torch.int32, device=cu_seqlens.device) * length
    return (cu_seqlens[-1] + ends).clamp_max(rows)


def _is_paired(bits: Tensor, players: int) -> bool:
    """Whether coalitions 2j and 2j + 1 are complements, for every j."""
    present = unpack_bits(bits, players)
    return bool((present[:, 0::2] != present[:, 1::2]).all())


def _paired_total(bits: Tensor, length: int, prefix: int) -> int:
    """Rows of a packed batch of complementary pairs."""
    return bits.shape[0] * (bits.shape[1] // 2) * (length + prefix)


def _reference(tokens: Tensor, bits: Tensor, prefix: int, paired: bool, total: int | None) -> tuple[Tensor, Tensor]:
    promised = _paired_total(bits, tokens.shape[1], prefix) if paired else total
    rows, cu_seqlens = reference.pack_tokens(tokens, bits, prefix, promised)
    if promised is not None and cu_seqlens.device.type == "cpu" and _checks.has_values(cu_seqlens):
        counted = int(cu_seqlens[-1])
        if total is not None and counted > total:
            _checks.fail("pack_tokens", "rows", f"at least {counted}, the tokens present", total)
        if paired and not _is_paired(bits, tokens.shape[1] - prefix):
            _checks.fail(
                "pack_tokens",
                "bits",
                "pairs of complements, since `paired` is True",
                bits,
                "Sample with paired=True, or leave `paired` out.",
            )
    return rows, cu_seqlens


class PackTokens(torch.autograd.Function):
    """Autograd face of `fastshap::pack_tokens`."""

    @staticmethod
    def forward(
        tokens: Tensor, bits: Tensor, prefix: int, paired: bool, total: int, namespace: str
    ) -> tuple[Tensor, Tensor]:
        return _library.kernels(namespace).pack_tokens(tokens, bits, prefix, paired, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        tokens, bits, ctx.prefix, ctx.paired, _, ctx.namespace = inputs
        ctx.save_for_backward(bits, output[1])
        ctx.mark_non_differentiable(output[1])
        ctx.length = tokens.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        bits, cu_seqlens = ctx.saved_tensors
        kernels = _library.kernels(ctx.namespace)
        grad_tokens = kernels.pack_tokens_backward(grad, bits, cu_seqlens, ctx.prefix, ctx.length, ctx.paired)
        return grad_tokens, None, None, None, None, None


class PackTokensBackward:
    """The backward pass is linear too: its own gradient is a pack_tokens into as many rows."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, bits, _, ctx.prefix, _, ctx.paired, ctx.namespace = inputs
        ctx.save_for_backward(bits)
        ctx.total = _COUNTED if ctx.paired else grad.shape[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (bits,) = ctx.saved_tensors
        rows, _ = _library.kernels(ctx.namespace).pack_tokens(grad, bits, ctx.prefix, ctx.paired, ctx.total)
        return rows, None, None, None, None, None, None


@_library.define(
    "pack_tokens",
    "(Tensor tokens, Tensor bits, int prefix, bool paired, SymInt total) -> (Tensor rows, Tensor cu_seqlens)",
)
def _fake(tokens: Tensor, bits: Tensor, prefix: int, paired: bool, total: int | torch.SymInt) -> tuple[Tensor, Tensor]:
    sequences = bits.shape[0] * bits.shape[1]
    if paired:
        total = _paired_total(bits, tokens.shape[1], prefix)
    elif total == _COUNTED:
        total = torch.library.get_ctx().new_dynamic_size()
    return tokens.new_empty(total, tokens.shape[2]), bits.new_empty(sequences + 1)


@_library.define(
    "pack_tokens_backward",
    "(Tensor grad, Tensor bits, Tensor cu_seqlens, int prefix, int length, bool paired) -> Tensor",
)
def _fake_backward(grad: Tensor, bits: Tensor, cu_seqlens: Tensor, prefix: int, length: int, paired: bool) -> Tensor:
    return grad.new_empty(bits.shape[0], length, grad.shape[1])


_library.register_autograd("pack_tokens", PackTokens)
_library.register_autograd("pack_tokens_backward", PackTokensBackward)
