"""Tensors of more than 2^31 values, where offsets of 32 bits end."""

import pytest
import torch

import fastshap_kernels as fk
from fastshap_kernels import testing

pytestmark = pytest.mark.gpu

VALUES = 2**31 + 2**24
#: What a test holds at its peak: the large tensor, its gradient, and what one of them is compared with.
BYTES = 3 * 2 * VALUES
#: A card takes part where this share of its memory is enough, whatever else runs there.
SHARE = 0.7


def fits():
    if not torch.cuda.is_available():
        return True  # collected all the same
    return SHARE * torch.cuda.get_device_properties(0).total_memory >= BYTES


def parameters(op):
    names = testing.backends(op, "triton", "cuda") if fits() else []
    return pytest.mark.parametrize("backend", [pytest.param(name, id=f"{op}-{name}-large") for name in names])


@pytest.fixture(autouse=True)
def _room():
    """Memory is not poisoned: filling it takes long, and every value that counts is compared."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.cuda.empty_cache()


def random_bfloat16(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


@parameters("mask_patches")
def test_mask_patches(backend):
    coalitions, pixels = 1024, 3 * 224 * 224
    batch = -(-VALUES // (coalitions * pixels))
    case = testing.make(
        "mask_patches",
        0,
        torch.bfloat16,
        "cuda",
        batch=batch,
        coalitions=coalitions,
        grid=(14, 14),
        patch=(16, 16),
    )
    images, bits, baseline = (case.tensors[name] for name in ("images", "bits", "baseline"))
    out = case.call(backend, images.requires_grad_(), bits, baseline)
    assert out.numel() > 2**31
    cotangent = out.detach()
    (gradient,) = torch.autograd.grad(out, images, cotangent)
    for b in (0, batch // 2, batch - 1):
        one = images[b : b + 1].detach().requires_grad_()
        rows = slice(b * coalitions, (b + 1) * coalitions)
        wanted = case.call("reference", one, bits[b : b + 1], baseline)
        assert torch.equal(out[rows], wanted)
        (exact,) = torch.autograd.grad(
            case.call("reference", one.float(), bits[b : b + 1], baseline.float()), one, cotangent[rows].float()
        )
        torch.testing.assert_close(gradient[b : b + 1], exact, rtol=2e-2, atol=1e-2 * float(exact.abs().max()))


@parameters("coalition_sum")
def test_coalition_sum(backend):
    players, width, coalitions = 196, 768, 2
    batch = -(-VALUES // (players * width))
    case = testing.make("coalition_sum", 0, torch.bfloat16, "cuda", batch=1, coalitions=coalitions, players=players)
    features = random_bfloat16(batch, players, width).requires_grad_()
    bits = case.tensors["bits"].expand(batch, -1, -1).contiguous()
    assert features.numel() > 2**31
    out = case.call(backend, features, bits)
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, features, cotangent)
    for images in (slice(0, 8), slice(batch // 2, batch // 2 + 8), slice(batch - 8, batch)):
        some = features[images].detach().requires_grad_()
        wanted = case.call("reference", some, bits[images])
        torch.testing.assert_close(out[images], wanted, rtol=1e-2, atol=1e-1)
        (exact,) = torch.autograd.grad(wanted, some, cotangent[images])
        torch.testing.assert_close(gradient[images], exact, rtol=1e-2, atol=1e-2)


@parameters("segment_sum")
def test_segment_sum(backend):
    length, width, prefix = 197, 768, 1
    sequences = -(-VALUES // (length * width))
    rows = random_bfloat16(sequences * length, width).requires_grad_()
    assert rows.numel() > 2**31
    cu_seqlens = torch.arange(sequences + 1, dtype=torch.int32, device="cuda") * length
    case = testing.make("segment_sum", 0, torch.bfloat16, "cuda", prefix=prefix)
    out = case.call(backend, rows, cu_seqlens)
    cotangent = torch.randn_like(out)
    (gradient,) = torch.autograd.grad(out, rows, cotangent)
    for first in (0, sequences // 2, sequences - 8):
        some = slice(first, first + 8)
        sums = rows.detach().view(sequences, length, width)[some, prefix:].float().sum(1)
        torch.testing.assert_close(out[some].float(), sums, rtol=1e-2, atol=1e-1)
        spread = cotangent[some].unsqueeze(1).expand(-1, length, -1).clone()
        spread[:, :prefix] = 0
        assert torch.equal(gradient.view(sequences, length, width)[some], spread)


@parameters("pack_tokens")
def test_pack_tokens(backend):
    players, width, coalitions, prefix = 196, 768, 8, 1
    total = coalitions // 2 * (players + 2 * prefix)
    batch = -(-VALUES // (total * width))
    case = testing.make(
        "pack_tokens",
        0,
        torch.bfloat16,
        "cuda",
        batch=batch,
        coalitions=coalitions,
        players=players,
        width=width,
    )
    tokens, bits = case.tensors["tokens"].requires_grad_(), case.tensors["bits"]
    rows = case.call(backend, tokens, bits)
    assert rows.numel() > 2**31
    cotangent = rows.detach()
    (gradient,) = torch.autograd.grad(rows, tokens, cotangent)
    for b in (0, batch // 2, batch - 1):
        one = tokens[b : b + 1].detach().requires_grad_()
        wanted = case.call("reference", one, bits[b : b + 1])
        assert torch.equal(rows[b * total : (b + 1) * total], wanted)
        # A token that n coalitions hold comes back n times.
        times = fk.unpack_bits(bits[b], players).sum(0)
        exact = torch.cat([one[0, :prefix].float() * coalitions, one[0, prefix:].float() * times.unsqueeze(1)])
        torch.testing.assert_close(gradient[b].float(), exact.detach(), rtol=1e-2, atol=1e-2)
