import gc
import multiprocessing
import os

import pytest
import torch
from hypothesis import settings

from fastshap_kernels import _backend

if _backend.INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()

# By default the same few examples everywhere, fewer where kernels are interpreted; HYPOTHESIS_PROFILE=long draws new
# ones, and many.
EXAMPLES = 6 if _backend.INTERPRETED else 24
settings.register_profile("default", derandomize=True, max_examples=EXAMPLES, deadline=None, database=None)
settings.register_profile("long", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every `torch.empty` holds NaN, in the kernels too: a value that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    if multiprocessing.active_children():
        gc.collect()
        for process in multiprocessing.active_children():
            process.join(30)  # where a processor is busy, what is told to end takes a while
        assert not multiprocessing.active_children()


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
