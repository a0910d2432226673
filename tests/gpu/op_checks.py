"""What must hold of a case, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from accuracy import assert_accurate, spread
from op_cases import Case
from torch import Tensor


def cotangents(out: Tensor) -> Tensor:
    """What the gradient starts from."""
    generator = torch.Generator(out.device).manual_seed(7)
    return torch.randn(out.shape, generator=generator, dtype=torch.float32, device=out.device).to(out.dtype)


def outputs(case: Case, backend: str, cotangent: Tensor | None = None) -> list[Tensor]:
    """The output of a case and its gradients."""
    return evaluate(case, lambda **tensors: case.call(backend, **tensors), cotangent)


def evaluate(case: Case, function: Callable[..., Tensor], cotangent: Tensor | None = None) -> list[Tensor]:
    """The output of any function of a case's inputs, and its gradients."""
    tensors = {name: x.detach().requires_grad_(name in case.leaves) for name, x in case.tensors.items()}
    out = function(**tensors)
    if not case.leaves:
        return [out]
    cotangent = cotangents(out) if cotangent is None else cotangent.to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, [tensors[name] for name in case.leaves], cotangent)]


@contextmanager
def plain_pytorch() -> Iterator[None]:
    """Not every operator of PyTorch has a deterministic version, which `_poisoned_memory` asks for."""
    wanted = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(wanted)


def expected(case: Case) -> list[Tensor]:
    """In float64."""
    with plain_pytorch():
        return outputs(case.to(torch.float64), "reference", cotangents(case.call("reference", **case.tensors)))


def check_accuracy(case: Case, backend: str) -> None:
    """By the rules of `accuracy`, forward and backward."""
    ours, exact = outputs(case, backend), expected(case)
    if not case.leaves:
        assert_same(ours, exact)
        return
    with plain_pytorch():
        plain = outputs(case, "reference") if case.plain is None else evaluate(case, case.plain)
        moved = spreads(case)
    terms = max(sum(x.shape) for x in case.tensors.values())
    for values in zip(ours, plain, exact, moved, strict=True):
        assert_accurate(*values, terms, ours[1].dtype if case.rounds_within else None)


def spreads(case: Case) -> list[Tensor]:
    """What the terms of each result amount to."""
    wide, cotangent = case.to(torch.float64), cotangents(case.call("reference", **case.tensors)).double()

    def results(cotangent: Tensor, *inputs: Tensor) -> list[Tensor]:
        return outputs(replace(wide, tensors=dict(zip(wide.tensors, inputs, strict=True))), "reference", cotangent)

    return spread(results, [cotangent, *wide.tensors.values()])


def check_repeatable(case: Case, backend: str) -> None:
    """Five runs give the same bits."""
    first = outputs(case, backend)
    for _ in range(4):
        assert_same(outputs(case, backend), first)


def assert_same(ours: list[Tensor], wanted: list[Tensor]) -> None:
    """The same bits."""
    for one, other in zip(ours, wanted, strict=True):
        assert torch.equal(one, other)
