"""What is measured of an op: its shapes, and the ways to the same result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from bench.lib.timer import Call
from fastshap_kernels import testing

MODES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Provider:
    """One way to compute a row; `align` turns its output and gradients into those of the op, None where none can."""

    forward: Callable[[], Tensor]
    leaves: list[Tensor]
    align: Callable[[list[Tensor]], list[Tensor]] | None = lambda outputs: outputs

    def calls(self, mode: str) -> tuple[Call, Callable[[], list[Tensor]]]:
        """What is timed, and what gives the output and the gradients that the mode makes."""
        if mode == "forward":
            return self.forward, lambda: [self.forward().detach()]
        out = self.forward()
        cotangent = testing.cotangents(out)

        def backward() -> list[Tensor]:
            return list(torch.autograd.grad(out, self.leaves, cotangent, retain_graph=True))

        def both() -> list[Tensor]:
            again = self.forward()
            return [again.detach(), *torch.autograd.grad(again, self.leaves, cotangent)]

        return (both, both) if mode == "both" else (backward, lambda: [out.detach(), *backward()])


#: rival(case, sizes) → provider.
Rival = Callable[[testing.Case, dict[str, Any]], Provider]


@dataclass(frozen=True)
class Row:
    """One op at one shape.

    Args:
        op: its name.
        shape: the sizes in words.
        sizes: of `fastshap_kernels.testing.make`.
        leaves: the inputs that gradients flow to.
        rivals: other ways to the same result, by name, the most important first.
        dtype: of the inputs.
        compiled: whether torch.compile is tried too: it takes seconds a shape.
    """

    op: str
    shape: str
    sizes: dict[str, Any]
    leaves: tuple[str, ...]
    rivals: dict[str, Rival] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES if self.leaves else MODES[:1]

    def case(self, device: torch.device | str) -> testing.Case:
        return replace(testing.make(self.op, 0, self.dtype, device, **self.sizes), leaves=self.leaves)

    def providers(self, case: testing.Case) -> dict[str, Callable[[], Provider]]:
        """Makers of the row's providers, our backends first."""
        ours = ("triton", "cuda") if case.device.type == "cuda" else ("cpu",)
        names = [*testing.backends(self.op, *ours), "reference"]
        makers = {name: lambda name=name: served(case, name) for name in names}
        for name, rival in self.rivals.items():
            makers[name] = lambda rival=rival: rival(case, self.sizes)
        if self.compiled:
            for name in ["reference", *(name for name in self.rivals if name == "eager")]:
                makers[f"{name}, compiled"] = lambda name=name: compiled(makers[name]())
        return makers


def in_dtypes(op: str, shape: str, sizes: dict[str, Any], leaves: tuple[str, ...], compiled: bool = True) -> list[Row]:
    """One shape without rivals in bfloat16, where torch.compile is tried too, and in float32."""
    row = Row(op, shape, sizes, leaves)
    return [replace(row, dtype=torch.bfloat16, compiled=compiled), row]


def beside(case: testing.Case, compute: Callable[..., Tensor]) -> Provider:
    """Any function of the case's tensors, by name."""
    tensors = {name: x.detach().requires_grad_(name in case.leaves) for name, x in case.tensors.items()}
    return Provider(lambda: compute(**tensors), [tensors[name] for name in case.leaves])


def served(case: testing.Case, backend: str) -> Provider:
    return beside(case, lambda **tensors: case.call(backend, **tensors))


def compiled(provider: Provider) -> Provider:
    return replace(provider, forward=torch.compile(provider.forward, dynamic=False))
