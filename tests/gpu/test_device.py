"""Every op and backend on a CUDA device."""

from dataclasses import replace

import pytest
import torch
from dispatch import no_waiting
from torch.nn.functional import linear

import fastshap_kernels as fk
from fastshap_kernels import testing

pytestmark = pytest.mark.gpu

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SERVED = [(op, backend) for op in testing.OPS for backend in testing.backends(op, "triton", "cuda")]
EACH = pytest.mark.parametrize(("op", "backend"), [pytest.param(*pair, id="-".join(pair)) for pair in SERVED])
OTHER_DEVICES = range(1, torch.cuda.device_count())


def copy_into(case, other):
    """Overwrites the inputs of one case with those of another of the same sizes."""
    for name, x in other.tensors.items():
        case.tensors[name].copy_(x)


def hot_case(op, seed, device="cuda"):
    """Small, and without a gradient that the op leaves to PyTorch."""
    case = testing.make(op, seed, torch.bfloat16, device)
    return replace(case, leaves=()) if case.plain_gradient else case


@pytest.mark.parametrize(
    ("op", "backend", "dtype", "seed"),
    [
        pytest.param(*pair, dtype, seed, id=f"{'-'.join(pair)}-{name}-{seed}")
        for pair in SERVED
        for name, dtype in DTYPES.items()
        for seed in range(3)
    ],
)
def test_accurate(op, backend, dtype, seed):
    testing.check_accuracy(testing.make(op, seed, dtype, "cuda", **testing.sizes(op, seed)), backend)


@EACH
def test_five_runs_give_the_same_bits(op, backend):
    testing.check_repeatable(testing.make(op, 0, torch.bfloat16, "cuda"), backend)


@EACH
def test_a_captured_graph_takes_new_inputs(op, backend):
    case, new = hot_case(op, 0), hot_case(op, 0 if op == "sample_coalitions" else 1)
    cotangent = testing.cotangents(case.call(backend, **case.tensors))
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):
            testing.outputs(case, backend, cotangent)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = testing.outputs(case, backend, cotangent)
    copy_into(case, new)
    graph.replay()
    torch.cuda.synchronize()
    testing.assert_same(captured, testing.outputs(new, backend, cotangent))


@EACH
def test_the_current_stream_is_used(op, backend):
    case, new = hot_case(op, 0), hot_case(op, 1)
    wanted = testing.outputs(new, backend)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        # Only what comes after this copy, in this stream, sees the new inputs.
        copy_into(case, new)
        ours = testing.outputs(case if case.tensors else new, backend)
        stream.synchronize()
    testing.assert_same(ours, wanted)


@EACH
def test_nothing_waits_for_the_device(op, backend):
    case = hot_case(op, 0)
    cotangent = testing.cotangents(case.call(backend, **case.tensors))
    testing.outputs(case, backend, cotangent)
    with no_waiting():
        testing.outputs(case, backend, cotangent)


@pytest.mark.parametrize("index", OTHER_DEVICES)
@EACH
def test_another_device_than_the_current_one(op, backend, index):
    testing.check_accuracy(testing.make(op, 0, torch.bfloat16, f"cuda:{index}"), backend)


def packed_path(tokens, bits, weight, backend):
    """A transformer block's way with coalitions: pack, project, attend, pool."""
    rows, cu_seqlens, max_seqlen = fk.pack_tokens(tokens, bits, 1, paired=True, backend=backend)
    qkv = linear(rows, weight).view(-1, 3, 3, 16)
    out = fk.packed_attention(qkv, cu_seqlens, max_seqlen, backend="triton")
    return fk.segment_sum(out.flatten(1), cu_seqlens, 1, backend=backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_the_packed_path_compiles_whole(backend):
    draw = testing.Draw(0, torch.float32, "cuda")
    tokens, weight = draw.normal(2, 34, 48), draw.normal(144, 48) / 7
    bits = fk.pack_bits(draw.pairs(2, 4, 33))

    def gradient(function):
        x = tokens.clone().requires_grad_()
        out = function(x, bits, weight, backend)
        return [out.detach(), *torch.autograd.grad(out.square().sum(), x)]

    with testing.plain_pytorch():
        compiled = gradient(torch.compile(packed_path, fullgraph=True, dynamic=False))
        for ours, plain in zip(compiled, gradient(packed_path), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_loss_compiles_whole(backend):
    case = testing.make("linear_shapley_loss", 0, torch.float32, "cuda")
    compiled = torch.compile(lambda **tensors: case.call(backend, **tensors), fullgraph=True, dynamic=False)
    with testing.plain_pytorch():
        for ours, plain in zip(testing.outputs(case, compiled), testing.outputs(case, backend), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
