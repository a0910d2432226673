"""The backend under test. How close is close enough: `fastshap_kernels.testing`."""

import os
from functools import partial

import torch

from fastshap_kernels import _library, pack_bits, testing

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
