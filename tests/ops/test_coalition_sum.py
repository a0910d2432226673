import pytest
import torch
from accuracy import (
    BACKEND,
    BACKENDS,
    DTYPES,
    KERNELS,
    PLAYERS,
    assert_all_accurate,
    check_gradients,
    normal,
    random_bits,
)

import fastshap_kernels as fk


def features_and_bits(generator, batch=3, coalitions=5, players=33, width=67, dtype=torch.float32):
    features = normal(generator, batch, players, width, dtype=dtype)
    return features, random_bits(batch, coalitions, players, generator)


@pytest.mark.parametrize("backend", BACKENDS)
def test_definition(generator, backend):
    features, bits = features_and_bits(generator, dtype=torch.float64)
    present = fk.unpack_bits(bits, 33)
    out = fk.coalition_sum(features, bits, backend=backend)
    for b in range(3):
        for m in range(5):
            exact = sum((features[b, p] for p in range(33) if present[b, m, p]), torch.zeros(67))
            assert torch.allclose(out[b, m], exact, rtol=0, atol=1e-12)


def gradient(features, bits, cotangent, backend):
    x = features.detach().requires_grad_()
    (result,) = torch.autograd.grad(fk.coalition_sum(x, bits, backend=backend), x, cotangent)
    return result


def assert_sums_and_gradient_accurate(generator, features, bits, dtype):
    cotangent = torch.randn(*bits.shape[:2], features.shape[2], generator=generator)

    def run(backend, features, cotangent):
        sums = fk.coalition_sum(features, bits, backend=backend)
        return sums, gradient(features, bits, cotangent, backend)

    assert_all_accurate(run, (features, cotangent), dtype, terms=features.shape[1] + bits.shape[1])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("players", PLAYERS)
def test_backends_agree(generator, players, dtype):
    features, bits = features_and_bits(generator, 3 if players < 1000 else 1, players=players)
    assert_sums_and_gradient_accurate(generator, features, bits, dtype)


# More coalitions than a word has bits; features in one strip, in whole strips, and in several tiles.
@pytest.mark.parametrize(("coalitions", "width"), [(1, 1), (2, 64), (4, 128), (33, 200), (130, 65), (3, 2100)])
def test_sizes(generator, coalitions, width):
    features, bits = features_and_bits(generator, coalitions=coalitions, width=width)
    assert_sums_and_gradient_accurate(generator, features, bits, torch.float32)


# Rows that divide into vectors of 16 bytes, one of 4 and none; few coalitions, and more than a word's bits.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("coalitions", "width"), [(8, 136), (8, 132), (9, 264), (40, 132)])
def test_vectors(generator, coalitions, width, dtype):
    features, bits = features_and_bits(generator, 1, coalitions, width=width)
    assert_sums_and_gradient_accurate(generator, features, bits, dtype)


@pytest.mark.parametrize("coalitions", [3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unaligned_slices(generator, dtype, coalitions):
    features, bits = features_and_bits(generator, coalitions=coalitions, width=64, dtype=dtype)
    grad = torch.randn(3, coalitions, 64, generator=generator).to(dtype)

    def shift(x):
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)

    assert torch.equal(
        KERNELS.coalition_sum(shift(features), bits, dtype), KERNELS.coalition_sum(features, bits, dtype)
    )
    assert torch.equal(
        KERNELS.coalition_sum_backward(shift(grad), bits, 33, dtype),
        KERNELS.coalition_sum_backward(grad, bits, 33, dtype),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_player_and_every_player(generator, backend):
    features, _ = features_and_bits(generator, dtype=torch.float64)
    bits = fk.pack_bits(torch.tensor([False, True]).view(1, 2, 1).expand(3, 2, 33))
    out = fk.coalition_sum(features, bits, backend=backend)
    assert torch.equal(out[:, 0], torch.zeros(3, 67, dtype=torch.float64))
    assert torch.allclose(out[:, 1], features.sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bits_beyond_the_players_are_ignored(generator, backend):
    features, bits = features_and_bits(generator)
    spoiled = bits.clone()
    spoiled[..., 1] |= -2  # players 33 to 63 of 33
    assert torch.equal(
        fk.coalition_sum(features, spoiled, backend=backend), fk.coalition_sum(features, bits, backend=backend)
    )
    cotangent = torch.randn(3, 5, 67, generator=generator)
    assert torch.equal(gradient(features, spoiled, cotangent, backend), gradient(features, bits, cotangent, backend))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, under Triton's interpreter
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_only_present_players_spoil_a_sum(generator, backend, dtype, rubbish):
    features, bits = features_and_bits(generator, coalitions=9, dtype=dtype)
    spoiled = features.clone()
    spoiled[1, 7, 20] = rubbish
    present = fk.unpack_bits(bits, 33)[1, :, 7]
    assert 0 < present.sum() < 9
    clean = fk.coalition_sum(features, bits, backend=backend)
    sums = fk.coalition_sum(spoiled, bits, backend=backend)
    reached = torch.zeros_like(clean, dtype=torch.bool)
    reached[1, present, 20] = True
    torch.testing.assert_close(sums[~reached], clean[~reached])
    assert not sums[reached].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_and_expanded_inputs(generator, backend):
    features, bits = features_and_bits(generator)
    expected = fk.coalition_sum(features, bits, backend=backend)
    tokens = torch.cat([torch.full((3, 2, 67), float("nan")), features], 1)
    assert torch.equal(fk.coalition_sum(tokens[:, 2:], bits, backend=backend), expected)
    planes = features.transpose(1, 2).contiguous().transpose(1, 2)  # players innermost
    assert torch.equal(fk.coalition_sum(planes, bits, backend=backend), expected)
    strided_bits = torch.stack([bits, bits], -1)[..., 0]
    assert torch.equal(fk.coalition_sum(features, strided_bits, backend=backend), expected)
    one = features[:1].expand(3, -1, -1)
    shared = bits[:, :1].expand(-1, 5, -1)
    assert torch.equal(
        fk.coalition_sum(one, shared, backend=backend),
        fk.coalition_sum(one.contiguous(), shared.contiguous(), backend=backend),
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_gradient(generator, backend):
    features, bits = features_and_bits(generator)
    counts = fk.unpack_bits(bits, 33).sum(1).unsqueeze(-1).expand(-1, -1, 67)
    assert torch.equal(gradient(features, bits, torch.ones(()).expand(3, 5, 67), backend), counts.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "coalitions", "width"), [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty(generator, batch, coalitions, width, backend):
    features, bits = features_and_bits(generator, batch, coalitions, width=width)
    x = features.requires_grad_()
    out = fk.coalition_sum(x, bits, backend=backend)
    assert out.shape == (batch, coalitions, width)
    out.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(generator, backend):
    features, bits = features_and_bits(generator, 2, 3, players=4, width=3, dtype=torch.float64)

    def op(x):
        return fk.coalition_sum(x, bits, backend=backend)

    check_gradients(op, features.requires_grad_())


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_does_not_round(generator, backend):
    features, bits = features_and_bits(generator)
    with torch.autocast("cpu", torch.bfloat16):
        out = fk.coalition_sum(features, bits, backend=backend)
    assert torch.equal(out, fk.coalition_sum(features, bits, backend=backend))


@pytest.mark.parametrize(
    ("dtype", "sums"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_opcheck(generator, dtype, sums):
    features, bits = features_and_bits(generator, dtype=dtype)
    torch.library.opcheck(KERNELS.coalition_sum.default, (features.requires_grad_(), bits, sums))
    grad = normal(generator, 3, 5, 67).to(sums).requires_grad_()
    torch.library.opcheck(KERNELS.coalition_sum_backward.default, (grad, bits, 33, dtype))


def test_compiles_without_graph_breaks(generator):
    features, bits = features_and_bits(generator)

    def loss(x):
        return fk.coalition_sum(x, bits).square().sum()

    x, y = features.clone().requires_grad_(), features.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_runs_and_thread_counts_give_the_same_bits(generator):
    features, bits = features_and_bits(generator, batch=4, coalitions=33, width=300)
    cotangent = torch.randn(4, 33, 300, generator=generator)

    def results():
        return fk.coalition_sum(features, bits), gradient(features, bits, cotangent, BACKEND)

    first = results()
    threads = torch.get_num_threads()
    try:
        for count in (threads, threads, threads, 1, threads + 1):
            torch.set_num_threads(count)
            assert all(torch.equal(ours, before) for ours, before in zip(results(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": [1.0]}, "`features` must be a tensor"),
        ({"features": torch.zeros(3, 33)}, r"tensor \(B, P, L\)"),
        ({"features": torch.zeros(3, 33, 4, dtype=torch.int64)}, "`features` must be a floating-point tensor"),
        ({"features": torch.zeros(3, 33, 4, dtype=torch.float8_e5m2)}, "float16, bfloat16, float32 or float64"),
        ({"features": torch.zeros(3, 0, 4)}, "from 1 to 4096"),
        ({"features": torch.zeros(1, 4097, 1)}, "from 1 to 4096"),
        ({"features": torch.zeros(3, 33, 4, device="meta")}, "on meta like the other arguments"),
        ({"bits": torch.zeros(3, 5, 1, dtype=torch.int32)}, r"`bits` must be int32 \(B, M, 2\) for 33 players"),
        ({"bits": torch.zeros(3, 5, 2)}, "sample_coalitions or pack_bits"),
        ({"bits": torch.zeros(2, 5, 2, dtype=torch.int32)}, "B = 3"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"features": torch.zeros(3, 33, 4), "bits": torch.zeros(3, 5, 2, dtype=torch.int32)}
    with pytest.raises((ValueError, TypeError), match=f"coalition_sum.*{message}"):
        fk.coalition_sum(**(arguments | change))
