"""Calls with one or two arguments spoiled: each is refused by an error that names an argument, or served rightly.

A worker process makes the calls and writes a line a call, so that a crash is seen, and by which call.
"""

from __future__ import annotations

import math
import random
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from contracts import CALLS, DTYPES, Call
from torch import Tensor

#: How a call may end. All but the first two are faults.
ENDS = ("refused", "served", "bare error", "not refused", "wrongly refused", "wrong result", "crash")

#: Far from rounding and far from a mistake: how accurate a result is, differential.py measures.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.2}


def _sparse(tensor: Tensor) -> Any:
    return tensor.to_sparse()


def _compressed(tensor: Tensor) -> Any:
    return tensor.to_sparse_csr() if tensor.ndim == 2 else tensor.to_sparse()


def _nested(tensor: Tensor) -> Any:
    parts = list(tensor.unbind()) if tensor.ndim > 1 and len(tensor) else [tensor, tensor]
    return torch.nested.nested_tensor(parts)


def _jagged(tensor: Tensor) -> Any:
    parts = list(tensor.unbind()) if tensor.ndim > 1 and len(tensor) else [tensor, tensor]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def _quantized(tensor: Tensor) -> Any:
    return torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8)


def _resized(rng: random.Random, tensor: Tensor) -> Tensor:
    """One dimension longer, shorter or gone."""
    if not tensor.ndim:
        return tensor.expand(2)
    axis = rng.randrange(tensor.ndim)
    size = rng.choice((0, 1, max(tensor.shape[axis] - 1, 0), tensor.shape[axis] + 1, 2 * tensor.shape[axis] + 1))
    shape = list(tensor.shape)
    shape[axis] = size
    return torch.zeros(shape, dtype=tensor.dtype)


def _renumbered(rng: random.Random, tensor: Tensor) -> Tensor:
    """Other numbers in the same shape: not finite, huge, negative, in another order."""
    out = tensor.clone()
    if not out.numel():
        return out
    at = rng.randrange(out.numel())
    if out.dtype.is_floating_point:
        out.view(-1)[at] = rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0))
    elif out.dtype == torch.int32:
        out.view(-1)[at] = rng.choice((-1, 0, 2**31 - 1, -(2**31), 7))
    return out


def _reshaped(rng: random.Random, tensor: Tensor) -> Tensor:
    ways = [tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.flatten()]
    if tensor.ndim:
        ways += [tensor.sum(0).to(tensor.dtype), tensor.movedim(0, -1)]
    return rng.choice(ways)


def _spoiled_tensor(rng: random.Random, tensor: Tensor) -> Any:
    """The tensor in another form: most of them wrong, some of them as good as the first."""
    other = [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.complex64]
    ways: list[Callable[[], Any]] = [
        lambda: tensor.to(rng.choice(other)),
        lambda: tensor.to(rng.choice((torch.float8_e4m3fn, torch.float8_e5m2))),
        lambda: tensor.to(rng.choice(DTYPES)),
        lambda: tensor.to("meta"),
        lambda: _sparse(tensor),
        lambda: _compressed(tensor),
        lambda: _nested(tensor),
        lambda: _jagged(tensor),
        lambda: _quantized(tensor),
        lambda: tensor.float().to_mkldnn(),
        lambda: _resized(rng, tensor),
        lambda: _resized(rng, tensor),
        lambda: _reshaped(rng, tensor),
        lambda: _reshaped(rng, tensor),
        lambda: _renumbered(rng, tensor),
        lambda: _renumbered(rng, tensor),
        lambda: tensor.float().numpy(),
        lambda: tensor.tolist(),
        lambda: [tensor],
        lambda: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor,
        lambda: torch.stack([tensor, tensor], -1)[..., 0],
        lambda: torch.nn.Parameter(tensor) if tensor.is_floating_point() else tensor,
        lambda: torch._neg_view(-tensor) if tensor.dtype != torch.bool else tensor,
    ]
    return rng.choice(ways)()


def _spoiled_other(rng: random.Random, value: Any) -> Any:
    """Something else in the place of a number, a name or a flag."""
    ways: list[Any] = [-1, 0, 1, 7, 2**31, 2**63, 2**64, -(2**63), 10**400, True, False, 0.5, 3.0, math.nan, math.inf]
    ways += [None, "", "none", "7", b"cpu", 1j, object(), torch.float16, int, (), [], {}, (2, 2), [True, True]]
    ways += [np.int64(2), np.int8(1), np.uint64(3), np.float32(0.5), np.float64(2), np.bool_(True), np.arange(3)]
    ways += [torch.tensor(2), torch.tensor([True, False]), torch.tensor(0.5), list(range(5000)), "x" * 5000]
    if isinstance(value, int) and not isinstance(value, bool):
        ways += [value - 1, value + 1, float(value), np.int64(max(min(value, 2**63 - 1), 0)), str(value), [value]]
    if isinstance(value, str):
        ways += [value.upper(), value + " ", [value], (value,)]
    if isinstance(value, bool):
        ways += [int(value), [value], np.bool_(value)]
    if isinstance(value, tuple):
        ways += [
            value[0],
            (*value, 1),
            value[::-1],
            [np.int64(n) for n in value],
            torch.tensor(value),
            (True, value[1]),
        ]
    return rng.choice(ways)


def spoil(rng: random.Random, arguments: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The arguments with one of them, or two, replaced, and the names of those."""
    spoiled = dict(arguments)
    names = rng.sample(list(arguments), min(len(arguments), rng.choice((1, 1, 1, 2))))
    for name in names:
        value = spoiled[name]
        if isinstance(value, Tensor) and rng.random() < 0.8:
            spoiled[name] = _spoiled_tensor(rng, value)
        else:
            spoiled[name] = _spoiled_other(rng, value)
    return spoiled, names


def helps(call: Call, error: BaseException) -> bool:
    """Whether an error says which function and which argument, briefly, and is of a type that callers expect."""
    message = str(error)
    if not isinstance(error, ValueError | TypeError | RuntimeError) or len(message) > 1500:
        return False
    if type(error).__name__ == "TrainingError":  # a run that is lost says what to lower
        return True
    if call.name not in CALLS:  # fastshap_vision's messages name the argument first, or a dataset's item
        return bool(re.search(rf"`({'|'.join(call.roles)})\b", message))
    if "the backend '" in message:
        return f"{call.name}: " in message
    named = re.findall(r"`(\w+)[^`]*`", message.split(", but it is ")[0])
    # A message of a compiled kernel begins with where it comes from.
    return f"{call.name}: argument `" in message and bool(set(named) & set(call.roles))


def same(ours: Any, wanted: Any) -> bool:
    """Equal up to rounding; infinite or NaN in the same places."""
    if isinstance(wanted, tuple):
        return len(ours) == len(wanted) and all(same(*pair) for pair in zip(ours, wanted, strict=True))
    if not isinstance(wanted, Tensor):
        return ours == wanted
    if ours.shape != wanted.shape or ours.dtype != wanted.dtype or ours.device != wanted.device:
        return False
    if wanted.is_meta or not wanted.numel():
        return True
    if not wanted.is_floating_point():
        return torch.equal(ours, wanted)
    allowed = TOLERANCES[wanted.dtype]
    finite = wanted.isfinite()
    if not torch.equal(ours.isfinite(), finite):
        return False
    ours, wanted = ours[finite].double(), wanted[finite].double()
    scale = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    return torch.allclose(ours, wanted, rtol=0, atol=allowed * scale)


def try_call(call: Call, arguments: dict[str, Any]) -> tuple[str, str]:
    """How a call ends, and what it said."""
    valid = call.is_valid(arguments)
    try:
        result = call.function(**arguments)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if valid:
            return "wrongly refused", said
        return ("refused" if helps(call, error) else "bare error"), said
    if valid is False:
        return "not refused", ""
    if "backend" in arguments:
        wanted = call.function(**(arguments | {"backend": "reference"}))
        if not same(result, wanted):
            return "wrong result", f"{result} for {wanted}"
    return "served", ""


def make(seed: int, number: int, calls: dict[str, Call] = CALLS) -> tuple[Call, dict[str, Any], list[str]]:
    """The call of a number: the same in every process."""
    rng = random.Random(f"{seed} {number}")
    names = list(calls)
    call = calls[names[number % len(names)]]
    torch.manual_seed(rng.getrandbits(32))
    arguments = call.make(rng)
    while True:
        try:
            # A form that the tensor can't take (a float8 of a complex one, say) is no case.
            return call, *spoil(rng, arguments)
        except (RuntimeError, NotImplementedError, TypeError, IndexError):
            continue


def run_one(seed: int, number: int, calls: dict[str, Call] = CALLS) -> tuple[str, str, list[str], str]:
    """Name of the op, how the call ended, which arguments were spoiled, what it said."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes of PyTorch's: nested, quantised and sparse tensors
        call, arguments, names = make(seed, number, calls)
        ended, said = try_call(call, arguments)
    return call.name, ended, names, said
