"""The backend under test, and how close is close enough: twice the error of plain PyTorch in the same dtype."""

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


def error(actual, exact):
    """Largest error, relative to the largest exact value."""
    scale = exact.abs().max().clamp_min(1e-30) if exact.numel() else 1.0
    return float((actual.double() - exact).abs().max() / scale) if exact.numel() else 0.0


def assert_accurate(actual, plain, exact):
    """`actual` (a kernel's) against `exact` (float64), with `plain` (PyTorch in the kernel's dtype) as the measure."""
    assert actual.shape == plain.shape == exact.shape
    assert actual.dtype == plain.dtype
    assert torch.isfinite(actual).all()
    # In float64 the exact side is itself float64, summed in another order.
    floor = 1e-12 if actual.dtype == torch.float64 else torch.finfo(actual.dtype).eps
    assert error(actual, exact) <= 2 * error(plain, exact) + floor


def random_bits(batch, coalitions, players, generator, probability=0.5):
    """Random coalitions, empty and full ones possible."""
    return pack_bits(torch.rand(batch, coalitions, players, generator=generator) < probability)
