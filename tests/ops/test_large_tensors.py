"""Tensors of more than 2^31 values, where offsets of 32 bits end."""

import pytest
import torch
from accuracy import BACKEND, random_bits

import fastshap_kernels as fk

pytestmark = pytest.mark.slow

VALUES = 2**31 + 2**24
PERIOD = 1_000_003  # prime, so that a wrapped offset finds other values


@pytest.fixture(autouse=True)
def _memory_as_it_is(_poisoned_memory):
    """Filling so much memory with NaN takes long, and the values at both ends are compared."""
    torch.use_deterministic_algorithms(False)


def large(generator, *shape):
    """bfloat16 that repeat with a prime period."""
    values = torch.randn(PERIOD, generator=generator).bfloat16()
    count = torch.Size(shape).numel()
    return values.repeat(-(-count // PERIOD))[:count].view(shape)


def test_mask_patches(generator):
    coalitions, side = 1024, 224
    batch = -(-VALUES // (coalitions * 3 * side * side))
    images = torch.randn(batch, 3, side, side, generator=generator).bfloat16()
    bits = random_bits(batch, coalitions, 196, generator)
    out = fk.mask_patches(images, bits, (14, 14), 0.5, backend=BACKEND)
    assert out.numel() > 2**31
    for b in (0, batch - 1):
        wanted = fk.mask_patches(images[b : b + 1], bits[b : b + 1], (14, 14), 0.5, backend="reference")
        assert torch.equal(out[b * coalitions : (b + 1) * coalitions], wanted)


def test_coalition_sum(generator):
    players, width = 196, 768
    batch = -(-VALUES // (players * width))
    features, bits = large(generator, batch, players, width), random_bits(batch, 2, players, generator)
    sums = fk.coalition_sum(features, bits, backend=BACKEND)
    for images in (slice(0, 4), slice(batch - 4, batch)):
        wanted = fk.coalition_sum(features[images], bits[images], backend="reference")
        torch.testing.assert_close(sums[images], wanted, rtol=1e-2, atol=1e-2)


def test_segment_sum_both_ways(generator):
    length, width = 197, 768
    sequences = -(-VALUES // (length * width))
    rows = large(generator, sequences * length, width).requires_grad_()
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32) * length
    sums = fk.segment_sum(rows, cu_seqlens, 1, backend=BACKEND)
    cotangent = torch.randn(sums.shape, generator=generator).bfloat16()
    (gradient,) = torch.autograd.grad(sums, rows, cotangent)
    some = cu_seqlens[:5]
    for first in (0, sequences - 4):
        part = rows.detach()[first * length : (first + 4) * length]
        wanted = fk.segment_sum(part, some, 1, backend="reference")
        torch.testing.assert_close(sums[first : first + 4], wanted, rtol=1e-2, atol=1e-2)
        of_rows = gradient[first * length : (first + 4) * length].view(4, length, width)
        assert not of_rows[:, 0].any()
        assert torch.equal(of_rows[:, 1:], cotangent[first : first + 4, None].expand(-1, length - 1, -1))


def test_pack_tokens(generator):
    players, width, coalitions = 196, 768, 8
    total = coalitions // 2 * (players + 2)
    batch = -(-VALUES // (total * width))
    tokens = large(generator, batch, players + 1, width)
    bits = fk.sample_coalitions(batch, coalitions, players, seed=0)
    rows, _, _ = fk.pack_tokens(tokens, bits, 1, paired=True, backend=BACKEND)
    assert rows.numel() > 2**31
    for b in (0, batch - 1):
        one = slice(b, b + 1)
        wanted, _, _ = fk.pack_tokens(tokens[one], bits[one], 1, paired=True, backend="reference")
        assert torch.equal(rows[b * total : (b + 1) * total], wanted)
