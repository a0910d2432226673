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

#: Backends that hold the bits against what `paired` promised; a device does not wait for that.
CHECKING = [backend for backend in BACKENDS if backend in ("reference", "cpu")]


def tokens_and_bits(generator, batch=3, coalitions=4, players=12, prefix=1, width=6, dtype=torch.float32):
    tokens = normal(generator, batch, prefix + players, width, dtype=dtype)
    return tokens, random_bits(batch, coalitions, players, generator)


def paired_bits(generator, batch, pairs, players):
    present = torch.rand(batch, pairs, players, generator=generator) < 0.5
    return fk.pack_bits(torch.stack([present, ~present], 2).flatten(1, 2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_definition(generator, backend):
    tokens, bits = tokens_and_bits(generator, prefix=2)
    present = fk.unpack_bits(bits, 12)
    rows, cu_seqlens, max_seqlen = fk.pack_tokens(tokens, bits, 2, backend=backend)
    assert cu_seqlens.dtype == torch.int32
    assert max_seqlen == 14
    sequences = [torch.cat([tokens[b, :2], tokens[b, 2:][present[b, m]]]) for b in range(3) for m in range(4)]
    assert torch.equal(rows, torch.cat(sequences))
    assert cu_seqlens.diff().tolist() == [len(sequence) for sequence in sequences]


def gradient_of(bits, prefix):
    def run(backend, tokens, cotangent):
        x = tokens.detach().requires_grad_()
        return torch.autograd.grad(fk.pack_tokens(x, bits, prefix, backend=backend)[0], x, cotangent)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("players", PLAYERS)
def test_backends_agree(generator, players, prefix, dtype):
    few = {"batch": 1, "coalitions": 2} if BACKEND == "triton" and players > 512 else {}  # its interpreter is slow
    tokens, bits = tokens_and_bits(generator, players=players, prefix=prefix, dtype=dtype, **few)
    packed, plain = (fk.pack_tokens(tokens, bits, prefix, backend=backend) for backend in (BACKEND, "reference"))
    assert torch.equal(packed[0], plain[0])
    assert torch.equal(packed[1], plain[1])
    cotangent = normal(generator, *packed[0].shape)
    assert_all_accurate(gradient_of(bits, prefix), (tokens, cotangent), dtype, terms=4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", PLAYERS)
def test_pairs_have_a_size_known_beforehand(generator, players, backend):
    tokens, bits = torch.randn(2, 3 + players, 4, generator=generator), paired_bits(generator, 2, 3, players)
    rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 3, paired=True, backend=backend)
    counted, same_cu_seqlens, _ = fk.pack_tokens(tokens, bits, 3, backend=backend)
    assert rows.shape[0] == 2 * 3 * (players + 2 * 3)
    assert torch.equal(rows, counted)
    assert torch.equal(cu_seqlens, same_cu_seqlens)


@pytest.mark.parametrize("backend", CHECKING)
@pytest.mark.parametrize("bits", [[[0, 0]], [[31, 31]], [[3, 7]], [[28, 3], [4, 24]]])
def test_a_broken_promise_is_an_error(backend, bits):
    """Also where there are just as many tokens as in pairs."""
    bits = torch.tensor(bits, dtype=torch.int32).view(1, -1, 1).expand(2, -1, -1)
    with pytest.raises((ValueError, RuntimeError), match=r"pack_tokens: argument `bits`.*pairs of complements"):
        fk.pack_tokens(torch.zeros(2, 6, 3), bits, 1, paired=True, backend=backend)


if BACKEND not in CHECKING:

    @pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
    def test_a_broken_promise_stays_in_its_rows(generator, probability):
        tokens = torch.randn(2, 41, 6, generator=generator).requires_grad_()
        bits = random_bits(2, 4, 40, generator, probability)
        present = fk.unpack_bits(bits, 40)
        present[:, 1::2] = ~present[:, ::2]  # what the second of a pair is taken to be
        rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 1, paired=True, backend=BACKEND)
        kept, boundaries, _ = fk.pack_tokens(tokens, fk.pack_bits(present), 1, paired=True, backend="reference")
        assert torch.equal(rows, kept)
        assert torch.equal(cu_seqlens, boundaries)
        # The gradient is that of these values.
        cotangent = torch.randn(rows.shape, generator=generator)
        ours, wanted = (torch.autograd.grad(packed, tokens, cotangent)[0] for packed in (rows, kept))
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("surplus", [0, 1, 90])
def test_rows_fixed_beforehand(generator, surplus, backend):
    tokens, bits = tokens_and_bits(generator, players=40)
    x, y = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    counted, boundaries, _ = fk.pack_tokens(y, bits, 1, backend=backend)
    total = counted.shape[0]
    rows, cu_seqlens, max_seqlen = fk.pack_tokens(x, bits, 1, rows=total + surplus, backend=backend)
    assert torch.equal(rows, torch.cat([counted, counted.new_zeros(surplus, 6)]))
    assert cu_seqlens.dtype == torch.int32
    assert torch.equal(cu_seqlens[:13], boundaries)
    assert cu_seqlens[-1] == total + surplus
    assert 0 <= cu_seqlens.diff().min() <= cu_seqlens.diff().max() <= max_seqlen
    cotangent = torch.randn(rows.shape, generator=generator)
    rows.backward(cotangent)
    counted.backward(cotangent[:total])
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "coalitions"), [(0, 2), (2, 0)])
def test_fixed_rows_of_no_coalition(generator, batch, coalitions, backend):
    tokens, bits = tokens_and_bits(generator, batch=batch, coalitions=coalitions)
    x = tokens.requires_grad_()
    rows, cu_seqlens, _ = fk.pack_tokens(x, bits, 1, rows=5, backend=backend)
    assert torch.equal(rows, torch.zeros(5, 6))
    assert cu_seqlens.tolist() == [0, 5]  # 5 < Q + P
    rows.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("backend", CHECKING)
def test_too_few_fixed_rows_are_an_error(generator, backend):
    tokens, bits = tokens_and_bits(generator)
    total = fk.pack_tokens(tokens, bits, 1)[0].shape[0]
    with pytest.raises((ValueError, RuntimeError), match=f"pack_tokens: argument `rows` must be at least {total}"):
        fk.pack_tokens(tokens, bits, 1, rows=total - 1, backend=backend)


if BACKEND not in CHECKING:

    def test_too_few_fixed_rows_stay_in_memory(generator):
        tokens, bits = tokens_and_bits(generator, players=40)
        rows = fk.pack_tokens(tokens, bits, 1)[0]
        few = KERNELS.pack_tokens(tokens, bits, 1, False, rows.shape[0] - 9)[0]
        assert torch.equal(few, rows[:-9])


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 130, 264])
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_width_and_any_address(generator, dtype, width):
    tokens, bits = tokens_and_bits(generator, batch=2, players=35, width=width, dtype=dtype)
    flat = torch.cat([tokens.new_zeros(1), tokens.flatten()])
    shifted = flat[1:].view_as(tokens)  # contiguous, and no multiple of 16 bytes in memory
    rows = fk.pack_tokens(shifted, bits, 1)[0]
    assert torch.equal(rows, fk.pack_tokens(tokens, bits, 1, backend="reference")[0])
    cotangent = normal(generator, rows.numel() + 1, dtype=dtype)[1:].view_as(rows)
    assert_all_accurate(gradient_of(bits, 1), (shifted, cotangent), dtype, terms=4)


@pytest.mark.parametrize("coalitions", [64, 66, 130])
def test_many_coalitions(generator, coalitions):
    tokens = normal(generator, 1, 45, 5).requires_grad_()
    bits = paired_bits(generator, 1, coalitions // 2, 40)
    for paired in (True, False):
        rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 5, paired=paired)
        plain, boundaries, _ = fk.pack_tokens(tokens, bits, 5, backend="reference")
        assert torch.equal(rows, plain)
        assert torch.equal(cu_seqlens, boundaries)
    ours, exact = (torch.autograd.grad(x.sin().sum(), tokens)[0] for x in (rows, plain))
    torch.testing.assert_close(ours, exact)


def test_more_sequences_than_a_block_has_threads(generator):
    tokens, bits = tokens_and_bits(generator, batch=25, coalitions=42, players=3, width=1)
    rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 1)
    plain, boundaries, _ = fk.pack_tokens(tokens, bits, 1, backend="reference")
    assert torch.equal(rows, plain)
    assert torch.equal(cu_seqlens, boundaries)


def test_bits_past_the_last_player_do_not_count(generator):
    tokens, bits = tokens_and_bits(generator, players=33)
    rubbish = bits.clone()
    rubbish[..., 1] |= -2
    for backend in BACKENDS:
        clean, spoiled = (fk.pack_tokens(tokens, given, 1, backend=backend) for given in (bits, rubbish))
        assert torch.equal(clean[0], spoiled[0])
        assert torch.equal(clean[1], spoiled[1])


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_tokens_never_reach_the_rows(generator, backend, rubbish):
    tokens, bits = tokens_and_bits(generator, coalitions=1)
    absent = ~fk.unpack_bits(bits, 12)[:, 0]
    spoiled = tokens.clone()
    spoiled[:, 1:][absent] = rubbish
    clean, same = (fk.pack_tokens(x, bits, 1, backend=backend)[0] for x in (tokens, spoiled))
    assert torch.equal(clean, same)


def test_strided_and_expanded_inputs(generator):
    tokens, bits = tokens_and_bits(generator)
    plain = fk.pack_tokens(tokens, bits, 1)[0]
    assert torch.equal(fk.pack_tokens(torch.stack([tokens, tokens], -1)[..., 0], bits, 1)[0], plain)
    assert torch.equal(fk.pack_tokens(tokens, bits.transpose(0, 1).contiguous().transpose(0, 1), 1)[0], plain)
    x = tokens.clone().requires_grad_()
    fk.pack_tokens(x, bits, 1)[0].sum().backward()  # an expanded gradient
    assert torch.equal(x.grad[:, 0], torch.full_like(x.grad[:, 0], 4))
    assert torch.equal(x.grad[:, 1:, 0], fk.unpack_bits(bits, 12).sum(1).float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("batch", "coalitions"), [(0, 2), (2, 0)])
def test_empty(generator, batch, coalitions, paired, backend):
    tokens, bits = tokens_and_bits(generator, batch=batch, coalitions=coalitions)
    x = tokens.requires_grad_()
    rows, cu_seqlens, _ = fk.pack_tokens(x, bits, 1, paired=paired, backend=backend)
    assert rows.shape == (0, 6)
    assert cu_seqlens.tolist() == [0]
    rows.sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


def test_empty_coalition_without_prefix(generator):
    tokens = torch.randn(1, 3, 2, generator=generator)
    bits = fk.pack_bits(torch.tensor([[[False] * 3, [True] * 3, [False] * 3]]))
    rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 0)
    assert torch.equal(rows, tokens[0])
    assert cu_seqlens.tolist() == [0, 0, 3, 3]


def test_gradcheck(generator):
    tokens, bits = tokens_and_bits(generator, batch=2, coalitions=3, players=4, width=2, dtype=torch.float64)
    pairs = paired_bits(generator, 2, 2, 4)
    total = fk.pack_tokens(tokens, bits, 1)[0].shape[0]
    for backend in BACKENDS:
        for given, options in ((bits, {}), (bits, {"rows": total + 3}), (pairs, {"paired": True})):

            def op(x, given=given, options=options, backend=backend):
                return fk.pack_tokens(x, given, 1, **options, backend=backend)[0]

            check_gradients(op, tokens.clone().requires_grad_())


@pytest.mark.parametrize("paired", [True, False])
def test_the_backward_operator_has_a_gradient(generator, paired):
    tokens, bits = torch.randn(2, 6, 3, generator=generator), paired_bits(generator, 2, 2, 5)
    rows, cu_seqlens, _ = fk.pack_tokens(tokens, bits, 1)
    grad = torch.randn(rows.shape, generator=generator).requires_grad_()
    arguments = grad, bits, cu_seqlens, 1, 6, paired
    (gradient,) = torch.autograd.grad(KERNELS.pack_tokens_backward(*arguments), grad, tokens)
    assert torch.equal(gradient, rows)
    torch.library.opcheck(KERNELS.pack_tokens_backward.default, arguments)


@pytest.mark.parametrize("paired", [True, False])
def test_opcheck(generator, paired):
    x = torch.randn(2, 6, 3, generator=generator).requires_grad_()
    torch.library.opcheck(KERNELS.pack_tokens.default, (x, paired_bits(generator, 2, 2, 5), 1, paired, -1))
    torch.library.opcheck(KERNELS.pack_tokens.default, (x, paired_bits(generator, 2, 2, 5), 1, False, 30))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fixed", [{"paired": True}, {"rows": 30}])
def test_compiles_without_graph_breaks(generator, fixed, backend):
    tokens, bits = torch.randn(2, 6, 3, generator=generator), paired_bits(generator, 2, 2, 5)

    def loss(x):
        rows, cu_seqlens, _ = fk.pack_tokens(x, bits, 1, **fixed, backend=backend)
        return (rows.square().sum(1) * torch.arange(rows.shape[0])).sum() + cu_seqlens.sum()

    x, y = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(x)
    compiled.backward()
    plain = loss(y)
    plain.backward()
    assert torch.equal(compiled, plain)
    assert torch.equal(x.grad, y.grad)


def test_five_runs_give_the_same_bits(generator):
    batch, width = (4, 40) if BACKEND == "cpu" else (1, 16)
    tokens, bits = tokens_and_bits(generator, batch=batch, coalitions=33, players=70, width=width)

    def gradient():
        x = tokens.clone().requires_grad_()
        fk.pack_tokens(x, bits, 1)[0].sin().sum().backward()
        return x.grad

    first = gradient()
    assert all(torch.equal(gradient(), first) for _ in range(4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(2, 6)}, "`tokens` must be a floating-point tensor"),
        ({"tokens": torch.zeros(2, 6, 3, dtype=torch.int64)}, "`tokens`"),
        ({"bits": torch.zeros(2, 2, 2, dtype=torch.int32)}, "`bits` must be int32"),
        ({"bits": torch.zeros(2, 2, 1)}, "sample_coalitions or pack_bits"),
        ({"bits": torch.zeros(3, 2, 1, dtype=torch.int32)}, "B = 2"),
        ({"bits": torch.zeros(2, 3, 1, dtype=torch.int32), "paired": True}, "M even"),
        ({"rows": -1}, "`rows`"),
        ({"rows": 9, "paired": True}, "left out for pairs"),
        ({"prefix": -1}, "`prefix`"),
        ({"prefix": 6}, "At least one token must be a player"),
        ({"prefix": 1.0}, "`prefix`"),
        ({"backend": "gpu"}, "Choose one of"),
        ({"tokens": torch.zeros(2, 6, 3, device="meta")}, "on meta like the other arguments"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"tokens": torch.zeros(2, 6, 3), "bits": torch.zeros(2, 2, 1, dtype=torch.int32), "prefix": 1}
    with pytest.raises((ValueError, TypeError), match=f"pack_tokens.*{message}"):
        fk.pack_tokens(**(arguments | change))
