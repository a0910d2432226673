"""The backend under test, and how close is close enough, on any processor.

Two rules hold together. On the whole, by the root of the sum of squares, a result is at most twice as far from
float64 as plain PyTorch in the same dtype, plus an eps. And no single value is farther than its arithmetic explains:
one rounding of the result, and c · √n · eps of what its terms amount to. Both change little with the order of a sum,
which differs between processors; the largest error divided by another largest error is chance.
"""

import os

import torch

from fastshap_kernels import _library, pack_bits

#: What these tests hold against the reference: FASTSHAP_BACKEND, which also serves the calls that name no backend.
BACKEND = os.environ.get("FASTSHAP_BACKEND", "cpu")
BACKENDS = ("reference", BACKEND)
#: Its raw operators.
KERNELS = _library.kernels(_library.namespace(BACKEND))

PLAYERS = (1, 2, 31, 32, 33, 64, 196, 1025)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: c of the second rule: sums in order, of terms of one sign, are five times nearer than it allows.
MARGIN = 8
#: With fewer values than these, one result may be nearer than another by luck: only the second rule holds.
FEW = 32
#: Relative step, and number of draws, of `spread`.
STEP, DRAWS = 1e-6, 8


def assert_all_accurate(run, inputs, dtype, *, terms, plain=None, backend=BACKEND, working=None):
    """Holds every result of a backend, gradients for example, against float64.

    Args:
        run: run(backend, *inputs) → list of tensors.
        inputs: floating-point ones are rounded to `dtype`, for float64 too, so that only the arithmetic differs.
        terms: numbers that the longest sum adds up.
        plain: plain(*inputs), what PyTorch gives in the same dtype and in float64; default run("reference", …).
        backend: the backend under test.
        working: dtype that sums and intermediate values have; default `dtype`, but at least float32.
    """
    given = [x.to(dtype) if is_floating(x) else x for x in inputs]
    wide = [x.double() if is_floating(x) else x for x in given]

    def reference(*tensors):
        return run("reference", *tensors) if plain is None else plain(*tensors)

    results = run(backend, *given), reference(*given), reference(*wide), spread(reference, wide)
    for ours, theirs, exact, moved in zip(*results, strict=True):
        assert_accurate(ours, theirs, exact, moved, terms, working)


def assert_accurate(actual, plain, exact, moved, terms, working=None):
    """`actual` (a kernel's) against `exact` (float64), with `plain` (PyTorch in the kernel's dtype) beside it.

    `moved` is the `spread` of the exact values, `terms` and `working` are as in `assert_all_accurate`.
    """
    assert actual.shape == plain.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all()
    rounding = torch.finfo(actual.dtype)
    working = torch.finfo(working or torch.promote_types(actual.dtype, torch.float32))
    off = (actual.double() - exact).abs()
    # In float64 the exact values are no better than ours.
    if actual.dtype != torch.float64 and exact.numel() >= FEW:
        allowed = 2 * (plain.double() - exact).norm() + rounding.eps * exact.norm() + working.eps * moved.norm()
        assert off.norm() <= allowed, f"error {off.norm():.3g}, plain PyTorch's {(plain.double() - exact).norm():.3g}"
    # Where terms cancel whatever they are, nothing moves, and they are still rounded: like the other values' terms.
    moved = moved.clamp_min(moved.square().mean().sqrt()) if moved.numel() else moved
    allowed = rounding.eps / 2 * exact.abs() + MARGIN * terms**0.5 * working.eps * moved
    allowed += rounding.tiny * rounding.eps  # steps of the numbers next to 0
    assert (off <= allowed).all(), f"an error of {(off / allowed).max():.3g} times what the arithmetic explains"


def spread(function, inputs):
    """What the terms of each value amount to, as the root of their sum of squares.

    A sum moves by as much when each of its terms moves by its own size, in a direction of its own: here every input
    does, in small, and the results are scaled back.
    """
    generator = torch.Generator().manual_seed(0)
    still = function(*inputs)
    squares = [torch.zeros_like(x) for x in still]
    for _ in range(DRAWS):
        results = function(*[_shake(x, generator) if is_floating(x) else x for x in inputs])
        for square, result, before in zip(squares, results, still, strict=True):
            square += ((result - before) / STEP).square() / DRAWS
    return [square.sqrt() for square in squares]


def is_floating(x):
    """Whether it is a tensor of numbers that get rounded."""
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _shake(x, generator):
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return x * (1 + STEP * noise)


def random_bits(batch, coalitions, players, generator, probability=0.5):
    """Random coalitions, empty and full ones possible."""
    return pack_bits(torch.rand(batch, coalitions, players, generator=generator) < probability)
