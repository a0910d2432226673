"""What must hold of a case, wherever it runs. A `backend` is a name, or any function of the op's arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .accuracy import assert_accurate, spread
from .cases import Case

Backend = str | Callable[..., Any]


def check_accuracy(case: Case, backend: Backend) -> None:
    """Holds output and gradients against float64; a result that is no floating-point number must have its very bits.

    Args:
        case: inputs of any dtype. In float64 the reference is no better, and only gross errors show.
        backend: what is under test.

    Raises:
        AssertionError: as `assert_accurate`.
    """
    ours, exact = outputs(case, backend), expected(case)
    if not case.leaves:
        assert_same(ours, exact)
        return
    with plain_pytorch():
        plain = outputs(case, case.plain or "reference")
        moved = _spreads(case)
    terms = max(sum(x.shape) for x in case.tensors.values())
    for values in zip(ours, plain, exact, moved, strict=True):
        assert_accurate(*values, terms, ours[1].dtype if case.rounds_within else None)


def check_repeatable(case: Case, backend: Backend) -> None:
    """Five runs give the same bits.

    Raises:
        AssertionError: where they do not.
    """
    first = outputs(case, backend)
    for _ in range(4):
        assert_same(outputs(case, backend), first)


def outputs(case: Case, backend: Backend, cotangent: Tensor | None = None) -> list[Tensor]:
    """The output of a case, then the gradient to each of its leaves.

    Args:
        case: the inputs.
        backend: what computes the output.
        cotangent: what the gradient starts from, in any dtype; default `cotangents` of the output.
    """
    tensors = {name: x.detach().requires_grad_(name in case.leaves) for name, x in case.tensors.items()}
    out = case.call(backend, **tensors)
    if not case.leaves:
        return [out]
    cotangent = cotangents(out) if cotangent is None else cotangent.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [tensors[name] for name in case.leaves], cotangent)]


def expected(case: Case) -> list[Tensor]:
    """`outputs` of the reference in float64."""
    with plain_pytorch():
        return outputs(case.to(torch.float64), "reference", cotangents(case.call("reference", **case.tensors)))


def cotangents(out: Tensor) -> Tensor:
    """Normal numbers of the shape and dtype of an output, the same in every dtype but for rounding."""
    generator = torch.Generator(out.device).manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=torch.float32, device=out.device).to(out.dtype)


def assert_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    """The same bits."""
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other)


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Without `torch.use_deterministic_algorithms`, which not every operator of PyTorch has a version for."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)


def _spreads(case: Case) -> list[Tensor]:
    """What the terms of each result amount to."""
    wide, cotangent = case.to(torch.float64), cotangents(case.call("reference", **case.tensors)).double()

    def results(cotangent: Tensor, *inputs: Tensor) -> list[Tensor]:
        return outputs(replace(wide, tensors=dict(zip(wide.tensors, inputs, strict=True))), "reference", cotangent)

    return spread(results, [cotangent, *wide.tensors.values()])
