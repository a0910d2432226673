"""Argument checks: each error says op, argument, what was expected, what came, and the remedy."""

from __future__ import annotations

from itertools import pairwise
from typing import NoReturn

import torch
from torch import Tensor

MAX_PLAYERS = 4096


def describe(value: object) -> str:
    """A tensor's dtype, shape and device, or any other value with its type."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)} on {value.device}"
    return f"{value!r} ({type(value).__name__})"


def fail(op: str, argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    """Raises the ValueError that every failed check ends in."""
    raise ValueError(f"{op}: argument `{argument}` must be {expected}, but it is {describe(got)}. {remedy}".rstrip())


def words(players: int) -> int:
    """32-bit words that hold one coalition of `players`."""
    return (players + 31) // 32


def check_tensor(op: str, argument: str, value: object, shape: str, ndim: int) -> Tensor:
    """A floating-point tensor with `ndim` dimensions; `shape` names them in the message."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: argument `{argument}` must be a tensor {shape}, but it is {describe(value)}.")
    if value.ndim != ndim or not value.is_floating_point():
        fail(op, argument, f"a floating-point tensor {shape}", value)
    return value


def check_count(op: str, argument: str, value: object, low: int, high: int, remedy: str = "") -> int:
    """A whole number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(op, argument, f"a whole number from {low} to {high}", value, remedy)
    return value


def check_bits(op: str, bits: object, players: int, like: Tensor | None = None) -> Tensor:
    """Coalitions as int32 (B, M, W) for `players`, with the batch and device of `like` where it is given."""
    remedy = "Make it with sample_coalitions or pack_bits."
    expected = f"int32 (B, M, {words(players)}) for {players} players"
    if not isinstance(bits, Tensor):
        raise TypeError(f"{op}: argument `bits` must be {expected}, but it is {describe(bits)}. {remedy}")
    if bits.dtype != torch.int32 or bits.ndim != 3 or bits.shape[2] != words(players):
        fail(op, "bits", expected, bits, remedy)
    if like is not None:
        if bits.shape[0] != like.shape[0]:
            fail(op, "bits", f"{expected} with B = {like.shape[0]} like the other arguments", bits, remedy)
        check_device(op, "bits", bits, like)
    return bits


def check_cu_seqlens(op: str, cu_seqlens: object, rows: Tensor) -> Tensor:
    """Boundaries of packed sequences on the device of `rows`; their values are left to `check_boundaries`."""
    expected = f"int32 (S + 1) that rises from 0 to T = {int(rows.shape[0])}"
    remedy = "Take it from pack_tokens."
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{op}: argument `cu_seqlens` must be {expected}, but it is {describe(cu_seqlens)}. {remedy}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or not cu_seqlens.shape[0]:
        fail(op, "cu_seqlens", expected, cu_seqlens, remedy)
    check_device(op, "cu_seqlens", cu_seqlens, rows)
    return cu_seqlens


def check_boundaries(op: str, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> None:
    """The values of `cu_seqlens`, read on the CPU only: elsewhere that would wait for the device."""
    if torch.compiler.is_compiling() or cu_seqlens.device.type != "cpu":
        return
    starts = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        fail(op, "cu_seqlens", f"int32 (S + 1) that rises from 0 to T = {total}", starts, "Take it from pack_tokens.")
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        fail(op, "max_seqlen", f"at least {max(lengths)}, the longest sequence", max_seqlen)


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """The device of the op's first tensor."""
    if value.device != like.device:
        fail(
            op,
            argument,
            f"on {like.device} like the other arguments",
            value,
            f"Move it with .to({str(like.device)!r}).",
        )
