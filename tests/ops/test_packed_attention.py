from contextlib import nullcontext
from functools import partial

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
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastshap_kernels as fk
from fastshap_kernels import _backend

LENGTHS = (5, 0, 17, 1, 16, 50)

# torch's flash attention in bfloat16 raises where a processor has AMX and ATEN_CPU_CAPABILITY is below it.
LOWERED = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") and torch.cpu._is_amx_tile_supported()

# Triton's kernels have no float64, and a device's follow `cu_seqlens` unchecked.
SERVED = tuple(dtype for dtype in DTYPES if BACKEND != "triton" or dtype != torch.float64)
PRECISE = CHECKED = tuple(backend for backend in BACKENDS if backend != "triton")


def rows_and_boundaries(generator, lengths=LENGTHS, heads=2, head_dim=8, dtype=torch.float32):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    shape = (sum(lengths), 3, heads, head_dim)
    return normal(generator, *shape, dtype=dtype), cu_seqlens


def attend(qkv, lengths, scale=None):
    """PyTorch's own attention, one sequence at a time."""
    outputs = []
    for sequence in qkv.split(lengths):
        query, key, value = sequence.permute(1, 2, 0, 3).unsqueeze(1)
        with sdpa_kernel(SDPBackend.MATH) if LOWERED else nullcontext():
            out = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=scale)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


def output_and_gradient(function, qkv, cotangent):
    x = qkv.clone().requires_grad_()
    out = function(x)
    out.backward(cotangent)
    return out.detach(), x.grad


def assert_accurate_everywhere(generator, lengths, heads, head_dim, dtype, scale=None):
    assert_accurate_at(generator, rows_and_boundaries(generator, lengths, heads, head_dim, dtype)[0], lengths, scale)


def assert_accurate_at(generator, qkv, lengths, scale=None, backends=BACKENDS):
    dtype, cu_seqlens = qkv.dtype, torch.tensor([0, *lengths]).cumsum(0).int()
    cotangent = normal(generator, len(qkv), *qkv.shape[2:])

    def run(backend, qkv, cotangent):
        return output_and_gradient(
            lambda x: fk.packed_attention(x, cu_seqlens, max(lengths), scale=scale, backend=backend), qkv, cotangent
        )

    def plain(qkv, cotangent):
        return output_and_gradient(lambda x: attend(x, lengths, scale), qkv, cotangent)

    for backend in backends:  # probabilities are rounded to the dtype of the values
        inputs, terms = (qkv, cotangent), max(lengths) + qkv.shape[3]
        assert_all_accurate(run, inputs, dtype, terms=terms, plain=plain, backend=backend, working=dtype)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize(("heads", "head_dim"), [(1, 1), (3, 8), (4, 16), (2, 24), (3, 64), (1, 72), (1, 128)])
def test_accurate_for_any_head(generator, heads, head_dim, dtype):
    assert_accurate_everywhere(generator, LENGTHS, heads, head_dim, dtype)


@pytest.mark.parametrize("dtype", SERVED)
@pytest.mark.parametrize("players", PLAYERS)
def test_accurate_for_any_length(generator, players, dtype):
    lengths, heads = (players, players + 1), 2
    if BACKEND == "triton" and players > 64:  # its interpreter takes milliseconds a block, and float32 has small ones
        lengths, heads = (min(players, 260 if dtype == torch.float32 else 520),), 1
    assert_accurate_everywhere(generator, lengths, heads, 16, dtype)


@pytest.mark.parametrize("dtype", SERVED)
def test_accurate_where_short_and_long_sequences_meet(generator, dtype):
    assert_accurate_everywhere(generator, (64, 257, 129, 0, 65, 128, 3), 1, 32, dtype)


@pytest.mark.parametrize("head_dim", [72, 96])
def test_accurate_for_long_sequences_of_wide_heads(generator, head_dim):
    assert_accurate_everywhere(generator, (130, 60), 1, head_dim, torch.bfloat16)


def test_scale(generator):
    assert_accurate_everywhere(generator, LENGTHS, 2, 8, torch.float32, scale=0.7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropping_players_equals_masking_their_keys(generator, backend):
    batch, coalitions, players, prefix, heads, head_dim = 2, 4, 5, 1, 2, 8
    dtype = torch.float64 if backend in PRECISE else torch.float32
    bits = random_bits(batch, coalitions, players, generator)
    tokens = torch.randn(batch, prefix + players, 3 * heads * head_dim, generator=generator, dtype=dtype)
    rows, cu_seqlens, max_seqlen = fk.pack_tokens(tokens, bits, prefix, backend=backend)
    out = fk.packed_attention(rows.view(-1, 3, heads, head_dim), cu_seqlens, max_seqlen, backend=backend)
    pooled = fk.segment_sum(out.flatten(1), cu_seqlens, prefix, backend="reference")

    present = fk.unpack_bits(bits, players)
    keys = torch.nn.functional.pad(present, (prefix, 0), value=True).view(batch, coalitions, 1, 1, prefix + players)
    tiled = tokens.view(batch, 1, prefix + players, 3, heads, head_dim).expand(-1, coalitions, -1, -1, -1, -1)
    query, key, value = tiled.permute(3, 0, 1, 4, 2, 5)
    dense = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=keys)
    dense = dense.transpose(2, 3).flatten(3)[:, :, prefix:] * present.unsqueeze(-1)
    close = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(pooled, dense.sum(2).flatten(0, 1), rtol=close, atol=close)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sequences_do_not_see_each_other(generator, backend):
    qkv, cu_seqlens = rows_and_boundaries(generator)
    spoiled = qkv.clone()
    spoiled[5:22] = float("nan")  # the whole third sequence
    cotangent = torch.randn(len(qkv), 2, 8, generator=generator)
    clean, same = (
        output_and_gradient(lambda x: fk.packed_attention(x, cu_seqlens, 50, backend=backend), x, cotangent)
        for x in (qkv, spoiled)
    )
    for one, other in zip(clean, same, strict=True):
        assert torch.equal(one[:5], other[:5])
        assert torch.equal(one[22:], other[22:])
        assert other[5:22].isnan().all()


# With the first of them, bits added to an exponent made a number of NaN. NumPy, in Triton's interpreter, warns of NaN.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("pattern", [0x7FFFFFFF, 0x7FC00000, -1, 0x7F800001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_nan_stays_one(generator, backend, dtype, pattern):
    qkv, cu_seqlens = rows_and_boundaries(generator, (5, 40))
    nan = torch.tensor(pattern, dtype=torch.int32).view(torch.float32)
    for part in range(3):  # in a query, a key or a value
        spoiled = qkv.clone()
        spoiled[20, part, 1, 3] = nan
        if dtype == torch.bfloat16:  # a cast would make one NaN of all
            spoiled = spoiled.view(torch.int32).bitwise_right_shift(16).to(torch.int16).view(dtype)
            spoiled[20, part, 1, 3] = torch.tensor(pattern >> 16 | 1, dtype=torch.int32).to(torch.int16).view(dtype)
        out = fk.packed_attention(spoiled, cu_seqlens, 40, backend=backend)
        assert out[:5].isfinite().all()
        assert out[5:, 0].isfinite().all()
        reached = out[20:21, 1] if part == 0 else out[5:, 1] if part == 1 else out[5:, 1, 3]
        assert reached.isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e3, 1e15])
def test_large_scores_do_not_overflow(generator, size, backend):
    qkv, cu_seqlens = rows_and_boundaries(generator)
    qkv[:, :2] *= size
    out, gradient = output_and_gradient(
        lambda x: fk.packed_attention(x, cu_seqlens, 50, backend=backend), qkv, torch.ones(len(qkv), 2, 8)
    )
    torch.testing.assert_close(out, attend(qkv.double(), LENGTHS).float())
    assert torch.isfinite(gradient).all()


def test_strided_and_expanded_inputs(generator):
    qkv, cu_seqlens = rows_and_boundaries(generator)
    strided = torch.stack([qkv, qkv], -1)[..., 0]
    assert torch.equal(fk.packed_attention(strided, cu_seqlens, 50), fk.packed_attention(qkv, cu_seqlens, 50))
    x, y = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    fk.packed_attention(x, cu_seqlens, 50).sum().backward()  # an expanded gradient
    fk.packed_attention(y, cu_seqlens, 50).backward(torch.ones(len(qkv), 2, 8))
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_empty(generator, lengths, backend):
    qkv, cu_seqlens = rows_and_boundaries(generator, lengths)
    out = fk.packed_attention(qkv.requires_grad_(), cu_seqlens, 7, backend=backend)
    assert out.shape == (0, 2, 8)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_gradcheck(generator):
    qkv, cu_seqlens = rows_and_boundaries(generator, (3, 0, 1, 2), 2, 2, torch.float64)
    for backend in PRECISE:

        def op(x, backend=backend):
            return fk.packed_attention(x, cu_seqlens, 3, backend=backend)

        check_gradients(op, qkv.clone().requires_grad_())


def derivatives(qkv, cu_seqlens, backend):
    """Σ of cubes of the output, three times derived, each time along the same direction."""
    x, direction = qkv.clone().requires_grad_(), torch.linspace(-1, 1, qkv.numel(), dtype=qkv.dtype).view_as(qkv)
    value, found = fk.packed_attention(x, cu_seqlens, 3, backend=backend).pow(3).sum(), []
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, x, create_graph=True)
        found.append(gradient.detach())
        value = (gradient * direction).sum()
    return found


def test_derivatives_of_any_order(generator):
    qkv, cu_seqlens = rows_and_boundaries(generator, (3, 0, 1, 2), 2, 2, torch.float64)
    exact = derivatives(qkv, cu_seqlens, "reference")
    dtype = torch.float64 if BACKEND in PRECISE else torch.float32
    assert all(x.abs().max() > 0.01 for x in exact)
    for ours, wanted in zip(derivatives(qkv.to(dtype), cu_seqlens, BACKEND), exact, strict=True):
        torch.testing.assert_close(ours, wanted.to(dtype))


def test_opcheck(generator):
    qkv, cu_seqlens = rows_and_boundaries(generator)
    torch.library.opcheck(KERNELS.packed_attention.default, (qkv.requires_grad_(), cu_seqlens, 50, 0.3))
    out, logsumexp = (x.detach() for x in KERNELS.packed_attention(qkv, cu_seqlens, 50, 0.3))
    arguments = out.requires_grad_(), qkv, cu_seqlens, 50, logsumexp, 0.3
    torch.library.opcheck(KERNELS.packed_attention_backward.default, arguments)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(generator, backend):
    qkv, cu_seqlens = rows_and_boundaries(generator)

    def loss(x):
        return fk.packed_attention(x, cu_seqlens, 50, backend=backend).square().sum()

    x, y = qkv.clone().requires_grad_(), qkv.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_the_whole_path_compiles_without_graph_breaks(generator):
    tokens = torch.randn(2, 6, 48, generator=generator)
    present = torch.rand(2, 1, 5, generator=generator) < 0.5
    bits = fk.pack_bits(torch.cat([present, ~present], 1))

    def loss(x):
        rows, cu_seqlens, max_seqlen = fk.pack_tokens(x, bits, 1, paired=True)
        out = fk.packed_attention(rows.view(-1, 3, 2, 8), cu_seqlens, max_seqlen)
        return fk.segment_sum(out.flatten(1), cu_seqlens, 1, backend="reference").square().sum()

    x, y = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(x).backward()
    loss(y).backward()
    assert torch.equal(x.grad, y.grad)


def test_the_number_of_threads_does_not_change_the_bits(generator):
    lengths = (40, 7) if BACKEND == "triton" else (130, 7, 60) * 5
    qkv, cu_seqlens = rows_and_boundaries(generator, lengths, 3, 24)
    cotangent = torch.randn(len(qkv), 3, 24, generator=generator)

    def run():
        return output_and_gradient(lambda x: fk.packed_attention(x, cu_seqlens, 130), qkv, cotangent)

    first, threads = run(), torch.get_num_threads()
    try:
        for count in (1, 2) if BACKEND == "triton" else (1, 2, 3, 5):
            torch.set_num_threads(count)
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", CHECKED)
@pytest.mark.parametrize("boundaries", [[0, 3], [1, 4], [0, 3, 2, 4], [0, 5, 4], [0, -1, 4]])
def test_boundaries_are_checked(boundaries, backend):
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    with pytest.raises((ValueError, RuntimeError), match=r"packed_attention: argument `cu_seqlens` must .*0 to T = 4"):
        fk.packed_attention(torch.zeros(4, 3, 2, 8), cu_seqlens, 4, backend=backend)


@pytest.mark.parametrize("backend", CHECKED)
def test_max_seqlen_is_checked(generator, backend):
    qkv, cu_seqlens = rows_and_boundaries(generator)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"packed_attention: argument `max_seqlen` must be at least 50"
    ):
        fk.packed_attention(qkv, cu_seqlens, 49, backend=backend)


@pytest.mark.parametrize(
    ("qkv", "reason"),
    [
        (torch.zeros(4, 3, 2, 8, dtype=torch.float64), "no float64"),
        (torch.zeros(4, 3, 2, 136), "head_dim up to 128, and `qkv` has 136"),
    ],
)
def test_what_triton_cannot_serve_is_named(qkv, reason, monkeypatch):
    monkeypatch.setattr(_backend, "problem", lambda backend, device: None)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(RuntimeError, match=f"'triton' can't serve this call: .*{reason}"):
        fk.packed_attention(qkv, cu_seqlens, 4, backend="triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(4, 3, 8)}, "`qkv` must be a floating-point tensor"),
        ({"qkv": torch.zeros(4, 2, 2, 8)}, r"\(T, 3, heads, head_dim\)"),
        ({"qkv": torch.zeros(4, 3, 2, 0)}, "at least one head"),
        ({"cu_seqlens": torch.zeros(2)}, "`cu_seqlens` must be int32"),
        ({"max_seqlen": 4.0}, "`max_seqlen`"),
        ({"scale": "none"}, "`scale`"),
        ({"backend": "gpu"}, "Choose one of"),
        ({"qkv": torch.zeros(4, 3, 2, 8, device="meta")}, "on meta like the other arguments"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {
        "qkv": torch.zeros(4, 3, 2, 8),
        "cu_seqlens": torch.tensor([0, 4], dtype=torch.int32),
        "max_seqlen": 4,
    }
    with pytest.raises((ValueError, TypeError), match=f"packed_attention.*{message}"):
        fk.packed_attention(**(arguments | change))


if BACKEND == "cpu":

    @pytest.mark.parametrize("head_dim", [2, 6, 16, 18, 64, 120])
    @pytest.mark.parametrize("lengths", [[1], [2, 0, 3], [47, 48, 49], [197, 96, 101]])
    def test_bfloat16_with_and_without_pairs(generator, lengths, head_dim):
        """An even head_dim is multiplied in pairs where the processor can; one value more and it is not."""
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
        qkv = torch.randn(sum(lengths), 3, 2, head_dim, generator=generator).bfloat16()
        odd = torch.nn.functional.pad(qkv, (0, 1))  # a zero changes no product
        scale = -0.7  # the largest score is then not that of the largest product
        in_pairs = fk.packed_attention(qkv, cu_seqlens, 200, scale=scale)
        one_by_one = fk.packed_attention(odd, cu_seqlens, 200, scale=scale)[..., :-1]
        torch.testing.assert_close(in_pairs, one_by_one, rtol=2e-2, atol=1e-2)


def test_gradients_of_large_scores_keep_their_digits():
    """The logsumexp of a score of 10⁴ is off by 0.0005, and all probabilities of its row would be with it."""
    generator = torch.Generator().manual_seed(1)
    qkv = torch.randn(32, 3, 2, 24, generator=generator).index_fill(0, torch.tensor([3]), 30.0)
    cu_seqlens = torch.tensor([0, 4, 21, 23, 30, 32], dtype=torch.int32)
    cotangent = torch.randn(32, 2, 24, generator=generator)

    def gradient(dtype, backend):
        x = qkv.to(dtype, copy=True).requires_grad_()
        fk.packed_attention(x, cu_seqlens, 17, backend=backend).backward(cotangent.to(dtype))
        return x.grad

    exact = gradient(torch.float64, "reference")
    plain = (gradient(torch.float32, "reference") - exact).norm()
    assert (gradient(torch.float32, BACKEND) - exact).norm() < 3 * plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("lengths", "head_dim"), [((30, 2), 1), ((2, 30, 2), 8), ((14, 70, 200), 16), ((7,), 72)])
@pytest.mark.parametrize("value", [0.7, 4.0])
def test_accurate_where_gradients_cancel(generator, value, lengths, head_dim, dtype):
    """All keys are alike: gradients of queries and keys are 0, and what rounding leaves of them is all there is."""
    if BACKEND == "triton" and head_dim < 72:  # its interpreter takes milliseconds a block
        lengths = tuple(min(length, 70) for length in lengths)
    qkv = torch.full((sum(lengths), 3, 2, head_dim), value, dtype=dtype)
    assert_accurate_at(generator, qkv, lengths, scale=0.6, backends=(BACKEND,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [30, 1e3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_scores_choose_one_key(generator, dtype, size, backend):
    """Forward and backward may round them otherwise: by 10⁵ where they are 10¹²."""
    if (dtype, backend) == (torch.float32, "triton"):
        size = min(size, 1e4)  # a logsumexp of 10⁹ is off by more than float32 has powers
    qkv, cu_seqlens = rows_and_boundaries(generator, (40, 7, 1), dtype=dtype)
    qkv[:, :2] *= size
    cotangent = torch.randn(48, 2, 8, generator=generator).to(dtype)

    def run(backend, qkv, cotangent):
        attention = partial(fk.packed_attention, cu_seqlens=cu_seqlens, max_seqlen=40, backend=backend)
        out, gradient = output_and_gradient(attention, qkv, cotangent)
        assert gradient.isfinite().all()
        # Not those of queries and keys: a probability that rounding makes 0 is there multiplied by `size`.
        return out, gradient[:, 2]

    wanted = run("reference", qkv.double(), cotangent.double())
    close = {torch.float32: 2e-5, torch.bfloat16: 1e-2}[dtype]
    for ours, exact in zip(run(backend, qkv, cotangent), wanted, strict=True):
        assert (ours - exact).norm() <= close * exact.norm()
