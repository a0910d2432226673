import pytest
import torch

from fastshap_kernels import _backend

if _backend.INTERPRETED:
    import triton_interpreter

    triton_interpreter.install()


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Every `torch.empty` holds NaN, in the kernels too: a value that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)
