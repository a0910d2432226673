"""Operators in the dispatcher: one schema, one fake and one gradient formula, in every namespace.

Triton's kernels and the CUDA ones serve the same tensors, so that Triton's have a namespace of their own. An op's
autograd.Function takes the namespace as its last argument and keeps it as `ctx.namespace` for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_NAMESPACES = {"cpu": "fastshap", "cuda": "fastshap", "triton": "fastshap_triton"}

_Fake = TypeVar("_Fake", bound=Callable[..., Any])


def namespace(backend: str) -> str:
    """Where the dispatcher keeps the kernels of a backend."""
    return _NAMESPACES[backend]


def kernels(name: str) -> Any:
    """The operators of a namespace: `kernels("fastshap").mask_patches(...)`."""
    return getattr(torch.ops, name)


def define(name: str, schema: str) -> Callable[[_Fake], _Fake]:
    """Defines an operator; decorates its fake implementation."""

    def decorate(fake: _Fake) -> _Fake:
        for library in dict.fromkeys(_NAMESPACES.values()):
            torch.library.define(f"{library}::{name}", schema)
            torch.library.register_fake(f"{library}::{name}", fake)
        return fake

    return decorate


def register_autograd(name: str, function: type) -> None:
    """Gives the raw operators the gradient of an autograd.Function, so that none silently returns no gradient.

    Args:
        function: has `setup_context(ctx, inputs, output)`, whose last input is the namespace, and
            `backward(ctx, *grads)`, whose last gradient is that input's.
    """
    for library in dict.fromkeys(_NAMESPACES.values()):

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any, library: str = library) -> None:
            function.setup_context(ctx, (*inputs, library), output)  # type: ignore[attr-defined]

        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return function.backward(ctx, *grads)[:-1]  # type: ignore[attr-defined]

        torch.library.register_autograd(f"{library}::{name}", backward, setup_context=setup_context)


def register_vmap(name: str) -> None:
    """Batches the operators of a tensor with any leading dimensions, its first argument, in one call under vmap."""
    for library in dict.fromkeys(_NAMESPACES.values()):
        operator = getattr(kernels(library), name)

        def batched(info: Any, in_dims: tuple[int | None, ...], *inputs: Any, operator: Any = operator) -> Any:
            tensor, *others = inputs
            return operator(tensor.movedim(in_dims[0], 0), *others), 0

        torch.library.register_vmap(f"{library}::{name}", batched)
