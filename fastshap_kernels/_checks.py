"""Argument checks: each error says op, argument, what was expected, what came, and the remedy."""

from __future__ import annotations

import math
import numbers
import reprlib
from itertools import pairwise
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MAX_PLAYERS = 4096
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class _ShortRepr(reprlib.Repr):
    """Values of any size in one line."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 80

    def repr_instance(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor | np.ndarray):
            return describe(x)
        return super().repr_instance(x, level).replace("\n", " ")


_short = _ShortRepr()


def describe(value: object) -> str:
    """A tensor's or an array's dtype, shape and device, or any other value with its type, cut to a line."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_nested:
            return f"a nested tensor of {dtype} on {value.device}"
        layout = "" if value.layout == torch.strided else str(value.layout).removeprefix("torch.").lstrip("_") + " "
        return f"{layout}{dtype} {tuple(value.shape)} on {value.device}"
    if isinstance(value, np.ndarray):
        return f"a numpy array of {value.dtype} {value.shape}"
    text = _short.repr(value)
    return f"{text if len(text) <= 100 else text[:100] + '...'} ({type(value).__name__})"


def fail(op: str, argument: str, expected: str, got: object, remedy: str = "") -> NoReturn:
    """Raises the ValueError that every failed check ends in."""
    raise ValueError(f"{op}: argument `{argument}` must be {expected}, but it is {describe(got)}. {remedy}".rstrip())


def words(players: int) -> int:
    """32-bit words that hold one coalition of `players`."""
    return (players + 31) // 32


def has_values(tensor: Tensor) -> bool:
    """Whether the numbers in it can be read now; tracing and the meta device know shapes only."""
    return not (torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor))


def check_dense(op: str, argument: str, value: object, expected: str, remedy: str = "") -> Tensor:
    """A tensor with one value after another in memory: kernels read no other layout."""
    if not isinstance(value, Tensor):
        hint = "Convert it with torch.as_tensor(...)." if isinstance(value, np.ndarray) else remedy
        message = f"{op}: argument `{argument}` must be {expected}, but it is {describe(value)}. {hint}"
        raise TypeError(message.rstrip())
    if value.is_nested:
        fail(op, argument, f"{expected}, not nested", value, "Stack its parts with torch.stack(x.unbind()).")
    if value.layout != torch.strided:
        fail(op, argument, f"{expected}, not {describe(value).split()[0]}", value, "Convert it with .to_dense().")
    return value


def check_tensor(op: str, argument: str, value: object, shape: str, ndim: int | range) -> Tensor:
    """A floating-point tensor with `ndim` dimensions; `shape` names them in the message."""
    tensor = check_dense(op, argument, value, f"a tensor {shape}")
    if tensor.is_quantized:
        fail(op, argument, f"a floating-point tensor {shape}", tensor, "Convert it with .dequantize().")
    if tensor.dtype not in FLOATING:
        expected = f"a floating-point tensor {shape} of float16, bfloat16, float32 or float64"
        fail(op, argument, expected, tensor, "" if tensor.is_complex() else "Convert it with .float().")
    if tensor.ndim not in (ndim if isinstance(ndim, range) else (ndim,)):
        fail(op, argument, f"a floating-point tensor {shape}", tensor)
    return tensor


def check_count(op: str, argument: str, value: object, low: int, high: int, remedy: str = "") -> int:
    """A whole number in [low, high], Python's or numpy's."""
    if isinstance(value, np.integer):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        fail(op, argument, f"a whole number from {low} to {high}", value, remedy)
    return value


def check_number(op: str, argument: str, value: object, low: float = -math.inf) -> float:
    """A finite number from `low` on."""
    expected = "a finite number" if low == -math.inf else f"a finite number ≥ {low:g}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        fail(op, argument, expected, value)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not low <= number < math.inf:
        fail(op, argument, expected, value)
    return number


def check_flag(op: str, argument: str, value: object) -> bool:
    """True or False itself: 0, "no" and a list would each mean something to Python."""
    if not isinstance(value, bool):
        fail(op, argument, "True or False", value)
    return value


def check_choice(op: str, argument: str, value: object, choices: tuple[str, ...]) -> str:
    """One of a few names."""
    if not isinstance(value, str) or value not in choices:
        fail(op, argument, "one of " + ", ".join(choices), value)
    return value


def check_bits(op: str, bits: object, players: int, like: Tensor | None = None, argument: str = "bits") -> Tensor:
    """Coalitions as int32 (B, M, W) for `players`, with the batch and device of `like` where it is given."""
    remedy = "Make it with sample_coalitions or pack_bits."
    expected = f"int32 (B, M, {words(players)}) for {players} players"
    tensor = check_dense(op, argument, bits, expected, remedy)
    if tensor.dtype != torch.int32 or tensor.ndim != 3 or tensor.shape[2] != words(players):
        fail(op, argument, expected, tensor, remedy)
    if like is not None:
        if tensor.shape[0] != like.shape[0]:
            fail(op, argument, f"{expected} with B = {like.shape[0]} like the other arguments", tensor, remedy)
        check_device(op, argument, tensor, like)
    return tensor


def check_packed(op: str, bits: object, players: int) -> Tensor:
    """Coalitions as int32 (..., W) for `players`, with any leading dimensions."""
    expected, remedy = f"int32 (..., {words(players)}) for {players} players", "Make it with pack_bits."
    tensor = check_dense(op, "bits", bits, expected, remedy)
    if tensor.dtype != torch.int32 or tensor.ndim < 1 or tensor.shape[-1] != words(players):
        fail(op, "bits", expected, tensor, remedy)
    return tensor


def check_cu_seqlens(op: str, cu_seqlens: object, rows: Tensor) -> Tensor:
    """Boundaries of packed sequences on the device of `rows`; their values are left to `check_boundaries`."""
    expected = f"int32 (S + 1) that rises from 0 to T = {int(rows.shape[0])}"
    remedy = "Take it from pack_tokens."
    tensor = check_dense(op, "cu_seqlens", cu_seqlens, expected, remedy)
    if tensor.dtype != torch.int32 or tensor.ndim != 1 or not tensor.shape[0]:
        fail(op, "cu_seqlens", expected, tensor, remedy)
    check_device(op, "cu_seqlens", tensor, rows)
    return tensor


def check_boundaries(op: str, cu_seqlens: Tensor, total: int, max_seqlen: int | None = None) -> None:
    """The values of `cu_seqlens`, read on the CPU only: elsewhere that would wait for the device."""
    if cu_seqlens.device.type != "cpu" or not has_values(cu_seqlens):
        return
    starts = cu_seqlens.tolist()
    lengths = [after - before for before, after in pairwise(starts)]
    if starts[0] != 0 or starts[-1] != total or min(lengths, default=0) < 0:
        fall = next((f", and it falls after index {at}" for at, length in enumerate(lengths) if length < 0), "")
        raise ValueError(
            f"{op}: argument `cu_seqlens` must be int32 (S + 1) that rises from 0 to T = {total}, but its first value "
            f"is {starts[0]}, its last {starts[-1]}{fall}. Take it from pack_tokens."
        )
    if max_seqlen is not None and max(lengths, default=0) > max_seqlen:
        fail(op, "max_seqlen", f"at least {max(lengths)}, the longest sequence", max_seqlen)


def check_device(op: str, argument: str, value: Tensor, like: Tensor) -> None:
    """The device of the op's first tensor."""
    if value.device != like.device:
        remedy = "It holds no values." if value.is_meta else f"Move it with .to({str(like.device)!r})."
        fail(op, argument, f"on {like.device} like the other arguments", value, remedy)
