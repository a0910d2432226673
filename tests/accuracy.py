"""The backend under test, and inputs for it. How close is close enough: `fastshap_kernels.testing`."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastshap_kernels import _library, pack_bits, testing, unpack_bits

#: What these tests hold against the reference: FASTSHAP_BACKEND, which also serves the calls that name no backend.
BACKEND = os.environ.get("FASTSHAP_BACKEND", "cpu")
BACKENDS = ("reference", BACKEND)
#: Its raw operators.
KERNELS = _library.kernels(_library.namespace(BACKEND))

PLAYERS = (1, 2, 31, 32, 33, 64, 196, 1025)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

assert_all_accurate = partial(testing.assert_all_accurate, backend=BACKEND)


def random_bits(batch, coalitions, players, generator, probability=0.5):
    """Random coalitions, empty and full ones possible."""
    return pack_bits(torch.rand(batch, coalitions, players, generator=generator) < probability)


def all_coalitions(players):
    """bool (2^P, P), row S = the players of coalition S."""
    return unpack_bits(torch.arange(2**players, dtype=torch.int32).unsqueeze(1), players)


def normal(generator, *shape, dtype=torch.float64):
    """Normal numbers, the same in every dtype but for rounding."""
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def check_gradients(op: Callable[..., Any], inputs: Any) -> None:
    """First and second derivatives, against differences of values in float64.

    In random directions where a kernel is interpreted: it is called as often as there are numbers otherwise.
    """
    fast = BACKEND == "triton"
    torch.autograd.gradcheck(op, inputs, fast_mode=fast)
    torch.autograd.gradgradcheck(op, inputs, fast_mode=fast)
