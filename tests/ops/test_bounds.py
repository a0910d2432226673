"""Tensors that begin anywhere in memory, and empty ones: where an access of 16 bytes, or of none, would be a fault.

tests/sanitize.py runs these under sanitizers; without them a fault may go unseen.
"""

from dataclasses import replace

import pytest
import torch
from accuracy import BACKEND

import fastshap_kernels as fk
from fastshap_kernels import testing

#: Runs of whole 16 bytes, for which kernels move as many at a time where they can.
SIZES = {"mask_patches": {"patch": (2, 8)}, "exact_shapley": {"players": 5}, "packed_attention": {"heads": 1}}
OPS = [op for op in testing.OPS if BACKEND in testing.backends(op, BACKEND)]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def shifted(tensor):
    """The same numbers, one element further on than the start of an allocation."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].as_strided(tensor.shape, tensor.stride(), 1)
    return view.copy_(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_a_slice_may_begin_anywhere(op, dtype):
    if BACKEND == "triton" and op == "packed_attention" and dtype == torch.float64:
        pytest.skip("the backend has no float64 attention")
    case = testing.make(op, 0, dtype, "cpu", **SIZES.get(op, {}))
    moved = replace(case, tensors={name: shifted(tensor) for name, tensor in case.tensors.items()})
    cotangent = testing.cotangents(case.call(BACKEND, **case.tensors)) if case.leaves else None
    wanted = testing.outputs(case, BACKEND, cotangent)
    given = testing.outputs(moved, BACKEND, None if cotangent is None else shifted(cotangent))
    for ours, theirs in zip(given, wanted, strict=True):
        # Fewer values at a time may be added up in another order.
        torch.testing.assert_close(ours, theirs)


def test_channels_last_images_and_a_cast_may_begin_anywhere():
    if BACKEND == "triton":
        pytest.skip("Triton takes the alignment of each argument from the argument")
    images = torch.randn(2, 3, 4, 8).contiguous(memory_format=torch.channels_last)
    bits = torch.tensor([[[1], [6]], [[3], [8]]], dtype=torch.int32)
    for dtype in (torch.float32, torch.bfloat16):
        wanted = fk.mask_patches(images, bits, (2, 2), torch.ones(3, 4, 8), dtype=dtype, backend=BACKEND)
        for baseline in (torch.ones(3, 4, 8), shifted(torch.ones(3, 4, 8)), shifted(torch.ones(2, 3, 4, 8))):
            given = fk.mask_patches(shifted(images), bits, (2, 2), baseline, dtype=dtype, backend=BACKEND)
            assert torch.equal(given, wanted)


EMPTY = {
    "mask_patches": ({"batch": 0}, {"coalitions": 0}, {"patch": (2, 0)}, {"patch": (0, 2)}),
    "pack_tokens": ({"batch": 0}, {"coalitions": 0}, {"width": 0}),
    "packed_attention": ({"batch": 0}, {"coalitions": 0}),
    "segment_sum": ({"batch": 0}, {"coalitions": 0}, {"width": 0}),
    "layer_norm_segment_sum": ({"batch": 0}, {"coalitions": 0}),
    "coalition_sum": ({"batch": 0}, {"coalitions": 0}, {"coalitions": 0, "width": 3000}, {"width": 0}),
    "shapley_regression_loss": ({"batch": 0}, {"coalitions": 0}, {"classes": 0}),
    "linear_shapley_loss": ({"batch": 0}, {"coalitions": 0}, {"classes": 0}),
    "exact_shapley": ({"batch": 0}, {"classes": 0}),
    "sample_coalitions": ({"batch": 0}, {"coalitions": 0}),
    "coalition_sizes": ({"batch": 0}, {"coalitions": 0}),
}


@pytest.mark.parametrize("op", OPS)
def test_empty_tensors(op):
    for sizes in EMPTY[op]:
        case = testing.make(op, 0, torch.float32, "cpu", **sizes)
        for ours, theirs in zip(testing.outputs(case, BACKEND), testing.outputs(case, "reference"), strict=True):
            torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("width", [3, 200])
def test_a_batch_of_empty_sequences(width):
    rows = torch.zeros(0, width, requires_grad=True)
    sums = fk.segment_sum(rows, torch.zeros(4, dtype=torch.int32), 1, backend=BACKEND)
    assert torch.equal(sums, torch.zeros(3, width))
    sums.sum().backward()
    assert rows.grad.shape == (0, width)
