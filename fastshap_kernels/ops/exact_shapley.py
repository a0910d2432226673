"""Exact Shapley values from the value of every coalition."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import exact_shapley as reference

_KERNELS = ("cuda", "triton", "cpu")
_MAX_PLAYERS = 20


def exact_shapley(values: Tensor, *, backend: str | None = None) -> Tensor:
    """Computes the Shapley value of every player from the values of all 2^P coalitions.

    phi[p] = Σ_{S ∌ p} |S|! (P − |S| − 1)! / P! · (v(S ∪ {p}) − v(S)), so that Σ_p phi[p] = v(N) − v(∅).

    Args:
        values (float16, bfloat16, float32, float64): (..., 2^P, K), v(S) for every coalition and class, 1 ≤ P ≤ 20;
            player p is present in the coalitions whose index has bit p set: index 0 is v(∅), the last one v(N).
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        (..., P, K) Shapley values in the dtype of `values`. Every dtype is summed in float64 and rounded once,
        at the end. Gradients flow to `values`.

    Raises:
        ValueError: if the number of coalitions is not a power of two from 2 to 2^20.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Source: Shapley, A value for n-person games (1953).

    Example:
        >>> values = torch.tensor([[0.0], [1.0], [2.0], [5.0]])  # v of {}, {0}, {1} and {0, 1}
        >>> fk.exact_shapley(values).tolist()
        [[2.0], [3.0]]
    """
    op = "exact_shapley"
    _check_values(op, values)
    served_by = _backend.select(op, values.device, backend, _KERNELS)
    if served_by == "reference":
        return reference.exact_shapley(values)
    return ExactShapley.apply(values, _library.namespace(served_by))


def _check_values(op: str, values: object) -> None:
    shape = "(..., 2^P, K)"
    tensor = _checks.check_tensor(op, "values", values, shape, range(2, 65))  # PyTorch has 64 dimensions
    coalitions = int(tensor.shape[-2])
    if coalitions < 2 or coalitions & (coalitions - 1) or coalitions > 2**_MAX_PLAYERS:
        _checks.fail(
            op,
            "values",
            f"{shape} with every coalition of 1 ≤ P ≤ {_MAX_PLAYERS} players, the empty and the full one included",
            values,
            "For more players, or for a sample of the coalitions, use kernel_shap.",
        )


class ExactShapley(torch.autograd.Function):
    """Autograd face of `fastshap::exact_shapley`."""

    @staticmethod
    def forward(values: Tensor, namespace: str) -> Tensor:
        return _library.kernels(namespace).exact_shapley(values)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.players = reference.players_of(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The map is linear and its gradient rare: the transposed product of the reference will do.
        return (reference.coefficients(ctx.players, grad.device).T @ grad.double()).to(grad.dtype), None


@_library.define(
    "exact_shapley",
    "(Tensor values) -> Tensor",
)
def _fake(values: Tensor) -> Tensor:
    return values.new_empty((*values.shape[:-2], reference.players_of(values), values.shape[-1]))


_library.register_autograd("exact_shapley", ExactShapley)
