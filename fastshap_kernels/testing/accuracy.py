"""How close is close enough, on any processor.

Two rules hold together. On the whole, by the root of the sum of squares, a result is at most twice as far from
float64 as plain PyTorch in the same dtype, plus an eps. And no single value is farther than its arithmetic explains:
one rounding of the result, and c · √n · eps of what its terms amount to. Both change little with the order of a sum,
which differs between processors; the largest error divided by another largest error is chance. A number too large for
the dtype is an infinity of its sign, as in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

#: c of the second rule: sums in order, of terms of one sign, are five times nearer than it allows.
MARGIN = 8
#: How many times the error of plain PyTorch, and half an eps, the first rule allows.
TIMES = 2
#: Where fewer values than these make a result's size, one may be nearer than another by luck. The largest are then held
#: by the second rule alone, and the others, as soon as so many of them count, by both. What counts is
#: (Σ m²)² / Σ m⁴: all values where they are alike, 1 where one outweighs the others.
FEW = 32
#: Relative step, and number of draws, of `spread`.
STEP, DRAWS = 1e-6, 8


def assert_all_accurate(
    run: Callable[..., Sequence[Tensor]],
    inputs: Sequence[Any],
    dtype: torch.dtype,
    *,
    terms: int,
    backend: str,
    plain: Callable[..., Sequence[Tensor]] | None = None,
    working: torch.dtype | None = None,
) -> None:
    """Holds every result of a backend, gradients for example, against float64.

    Args:
        run: run(backend, *inputs) → list of tensors.
        inputs: floating-point ones are rounded to `dtype`, for float64 too, so that only the arithmetic differs.
        dtype: of the inputs.
        terms: how many numbers the longest sum adds up.
        backend: the backend under test.
        plain: plain(*inputs), what PyTorch gives in the same dtype and in float64; default run("reference", …).
        working: dtype that sums and intermediate values have; default `dtype`, but at least float32.

    Raises:
        AssertionError: for a result that is too far from float64.
    """
    given = [x.to(dtype) if is_floating(x) else x for x in inputs]
    wide = [x.double() if is_floating(x) else x for x in given]

    def reference(*tensors: Any) -> Sequence[Tensor]:
        return run("reference", *tensors) if plain is None else plain(*tensors)

    results = run(backend, *given), reference(*given), reference(*wide), spread(reference, wide)
    for ours, theirs, exact, moved in zip(*results, strict=True):
        assert_accurate(ours, theirs, exact, moved, terms, working)


def assert_accurate(
    actual: Tensor, plain: Tensor, exact: Tensor, moved: Tensor, terms: int, working: torch.dtype | None = None
) -> None:
    """Holds one result against float64 by the two rules.

    Args:
        actual: the result under test.
        plain: PyTorch's in the same dtype.
        exact: the float64 one, from the same inputs.
        moved: the `spread` of the exact values.
        terms: how many numbers the longest sum adds up.
        working: dtype that sums and intermediate values have; default that of `actual`, but at least float32.

    Raises:
        AssertionError: for another shape or dtype, a NaN, an infinity where the dtype can hold the exact value, or one
            that is too far off.
    """
    assert actual.shape == plain.shape == exact.shape, f"shape {actual.shape}, wanted {exact.shape}"
    assert actual.dtype == plain.dtype, f"{actual.dtype}, wanted {plain.dtype}"
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} values are NaN"
    rounding = torch.finfo(actual.dtype)
    eps = torch.finfo(working or torch.promote_types(actual.dtype, torch.float32)).eps
    off, off_plain = ((_beside(x.double(), exact, rounding.max) - exact).abs() for x in (actual, plain))
    # What the dtype can't hold weighs no more than its largest number.
    moved = moved.where(exact.abs() <= rounding.max, moved.clamp_max(rounding.max))
    # In float64 the exact values are no better than ours.
    if actual.dtype != torch.float64:
        many = _many(moved)
        size = exact.clamp(-rounding.max, rounding.max)[many].norm()
        allowed = TIMES * (off_plain[many].norm() + rounding.eps / 2 * size + eps / 2 * moved[many].norm())
        error = off[many].norm()
        assert error <= allowed, f"error {error:.3g}, plain PyTorch's {off_plain[many].norm():.3g}"
    # Where terms cancel whatever they are, nothing moves, and they are still rounded: like the other values' terms.
    moved = moved.clamp_min(moved.square().mean().sqrt()) if moved.numel() else moved
    allowed = rounding.eps / 2 * exact.abs() + MARGIN * terms**0.5 * eps * moved
    allowed += rounding.tiny * rounding.eps  # steps of the numbers next to 0
    assert (off <= allowed).all(), f"an error of {(off / allowed).max():.3g} times what the arithmetic explains"


def _many(moved: Tensor) -> Tensor:
    """Which values the first rule holds, bool: all but the largest that outweigh the others; none of a few."""
    sizes, order = moved.flatten().sort()
    squares = (sizes / sizes[-1:].clamp_min(1e-300)).square()
    sums, fourth = squares.cumsum(0).square(), squares.square().cumsum(0)
    counts = torch.where(fourth > 0, sums / fourth, torch.arange(1, len(sizes) + 1, device=moved.device))
    enough = (counts >= FEW).nonzero()
    kept = torch.zeros_like(sizes, dtype=torch.bool)
    if len(enough):
        kept[order[: int(enough[-1]) + 1]] = True
    return kept.view(moved.shape)


def _beside(x: Tensor, exact: Tensor, largest: float) -> Tensor:
    """`x`, an infinity of which stands for every number of its sign that is too large for the dtype."""
    return x.where(~x.isinf(), x.sign() * exact.abs().clamp_min(largest))


def spread(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Any]) -> list[Tensor]:
    """What the terms of each value amount to, as the root of their sum of squares.

    A sum moves by as much when each of its terms moves by its own size, in a direction of its own: here every input
    does, in small, and the results are scaled back.

    Args:
        function: function(*inputs) → list of float64 tensors.
        inputs: tensors, the floating-point ones float64, and whatever else the function takes.

    Returns:
        One tensor for each result, of its shape. Deterministic: from a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    still = function(*inputs)
    squares = [torch.zeros_like(x) for x in still]
    for _ in range(DRAWS):
        results = function(*[_shake(x, generator) if is_floating(x) else x for x in inputs])
        for square, result, before in zip(squares, results, still, strict=True):
            square += ((result - before) / STEP).square() / DRAWS
    return [square.sqrt() for square in squares]


def is_floating(x: Any) -> bool:
    """Whether it is a tensor of numbers that get rounded."""
    return isinstance(x, Tensor) and x.is_floating_point()


def _shake(x: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return x * (1 + STEP * noise)
