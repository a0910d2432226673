import pytest
import torch
from accuracy import BACKEND, BACKENDS, KERNELS, PLAYERS, random_bits
from hypothesis import given
from hypothesis import strategies as st

import fastshap_kernels as fk


@pytest.mark.parametrize("backend", BACKENDS)
def test_by_value(backend):
    bits = torch.tensor([[0, 0], [1, 0], [-1, 0], [5, 1], [-(2**31), 255], [-1, 255]], dtype=torch.int32)
    sizes = fk.coalition_sizes(bits, 40, backend=backend)
    assert sizes.dtype == torch.int32
    assert sizes.tolist() == [0, 1, 32, 3, 9, 40]


@pytest.mark.parametrize("players", [*PLAYERS, 97, 128, 130, 320, 1056, 2080, 4095, 4096])
def test_backends_agree(generator, players):
    """Words that divide into reads of four, of two and of one, of one thread and of several."""
    present = torch.rand(2, 5, players, generator=generator) < torch.rand(2, 5, 1, generator=generator)
    bits = fk.pack_bits(present)
    for backend in BACKENDS:
        assert torch.equal(fk.coalition_sizes(bits, players, backend=backend), present.sum(-1).int())


@pytest.mark.parametrize("count", [1, 31, 128, 129, 600, 1025])
def test_more_coalitions_than_a_program_counts(generator, count):
    bits = random_bits(1, count, 70, generator)
    ours = fk.coalition_sizes(bits, 70, backend=BACKEND)
    assert torch.equal(ours, fk.coalition_sizes(bits, 70, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (2, 1, 3, 2)])
def test_any_leading_dimensions(generator, shape, backend):
    present = torch.rand(*shape, 45, generator=generator) < 0.5
    sizes = fk.coalition_sizes(fk.pack_bits(present), 45, backend=backend)
    assert sizes.shape == shape
    assert torch.equal(sizes, present.sum(-1).int())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0), (0, 0, 1)])
def test_empty(shape, backend):
    sizes = fk.coalition_sizes(torch.zeros(*shape, 2, dtype=torch.int32), 40, backend=backend)
    assert sizes.shape == shape
    assert sizes.dtype == torch.int32


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", PLAYERS)
def test_no_player_and_every_player(players, backend):
    bits = fk.pack_bits(torch.tensor([[False], [True]]).expand(2, players))
    assert fk.coalition_sizes(bits, players, backend=backend).tolist() == [0, players]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [1, 31, 33, 40, 97, 100])
def test_bits_beyond_the_players_are_ignored(generator, players, backend):
    bits = random_bits(3, 5, players, generator)
    sizes = fk.coalition_sizes(bits, players, backend=backend)
    spoiled = bits.clone()
    spoiled[..., -1] |= -1 << players % 32
    assert torch.equal(fk.coalition_sizes(spoiled, players, backend=backend), sizes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [33, 128])
def test_strided_expanded_and_unaligned_inputs(generator, players, backend):
    bits = random_bits(4, 6, players, generator)
    sizes = fk.coalition_sizes(bits, players, backend=backend)
    assert torch.equal(fk.coalition_sizes(bits.mT.contiguous().mT, players, backend=backend), sizes)
    assert torch.equal(fk.coalition_sizes(bits.transpose(0, 1), players, backend=backend), sizes.T)
    assert torch.equal(fk.coalition_sizes(bits[:, ::2], players, backend=backend), sizes[:, ::2])
    shared = bits[:, :1].expand(-1, 5, -1)
    assert torch.equal(fk.coalition_sizes(shared, players, backend=backend), sizes[:, :1].expand(-1, 5))
    shifted = torch.cat([bits.new_zeros(1), bits.flatten()])[1:].view(bits.shape)
    assert torch.equal(fk.coalition_sizes(shifted, players, backend=backend), sizes)


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 4), st.integers(1, 200))
def test_sizes_of_complements_unions_and_intersections(seed, batch, coalitions, players):
    generator = torch.Generator().manual_seed(seed)
    one, other = (random_bits(batch, coalitions, players, generator) for _ in range(2))

    def sizes(bits):
        return fk.coalition_sizes(bits, players, backend=BACKEND)

    assert torch.equal(sizes(one), fk.coalition_sizes(one, players, backend="reference"))
    assert torch.equal(sizes(one) + sizes(~one), torch.full((batch, coalitions), players, dtype=torch.int32))
    assert torch.equal(sizes(one | other) + sizes(one & other), sizes(one) + sizes(other))


def test_sampled_pairs_add_up_to_all_players():
    sizes = fk.coalition_sizes(fk.sample_coalitions(3, 8, 196, seed=0), 196)
    assert torch.equal(sizes[:, ::2] + sizes[:, 1::2], torch.full((3, 4), 196, dtype=torch.int32))


def test_threads_do_not_change_the_sizes():
    # Enough words for several threads on the processor.
    words = 2**21 if BACKEND == "cpu" else 2**15
    bits = torch.arange(words, dtype=torch.int32).view(-1, 128)
    wanted = sum((bits >> bit & 1).sum(1) for bit in range(32))
    threads = torch.get_num_threads()
    try:
        for count in (1, threads, threads + 1):
            torch.set_num_threads(count)
            assert torch.equal(fk.coalition_sizes(bits, 4096, backend=BACKEND), wanted.int())
    finally:
        torch.set_num_threads(threads)


def test_opcheck(generator):
    torch.library.opcheck(KERNELS.coalition_sizes.default, (random_bits(3, 5, 40, generator), 40))
    torch.library.opcheck(KERNELS.coalition_sizes.default, (random_bits(3, 5, 40, generator).mT.contiguous().mT, 40))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(generator, backend):
    def shares(bits):
        return fk.coalition_sizes(bits, 40, backend=backend) / 40

    bits = random_bits(3, 5, 40, generator)
    compiled = torch.compile(shares, fullgraph=True, backend="aot_eager")
    for given_bits in (bits, bits[:2], bits[0]):
        assert torch.equal(compiled(given_bits), shares(given_bits))


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap(generator, backend):
    bits = random_bits(3, 5, 40, generator)
    sizes = fk.coalition_sizes(bits, 40, backend=backend)

    def count(one):
        return fk.coalition_sizes(one, 40, backend=backend)

    assert torch.equal(torch.vmap(count)(bits), sizes)
    assert torch.equal(torch.vmap(count, 1, 1)(bits), sizes)
    assert torch.equal(torch.vmap(torch.vmap(count))(bits), sizes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_sizes_have_no_gradient(generator, backend):
    bits, x = random_bits(3, 5, 40, generator), torch.ones((), requires_grad=True)
    sizes = fk.coalition_sizes(bits, 40, backend=backend)
    assert not sizes.requires_grad
    (gradient,) = torch.autograd.grad((sizes * x).sum(), x)
    assert gradient == sizes.sum()


def test_devices():
    backend = None if BACKEND == "cpu" else "reference"  # FASTSHAP_BACKEND never falls back
    bits = torch.zeros(2, 3, 2, dtype=torch.int32, device="meta")
    sizes = fk.coalition_sizes(bits, 40, backend=backend)
    assert (sizes.shape, sizes.dtype, sizes.device.type) == ((2, 3), torch.int32, "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": [1]}, r"`bits` must be int32 \(\.\.\., 2\) for 40 players"),
        ({"bits": torch.zeros(3, 1, dtype=torch.int32)}, r"`bits` must be int32 \(\.\.\., 2\) for 40 players"),
        ({"bits": torch.zeros(3, 2)}, "Make it with pack_bits"),
        ({"bits": torch.zeros(3, 2, dtype=torch.int64)}, "Make it with pack_bits"),
        ({"bits": torch.zeros((), dtype=torch.int32)}, r"int32 \(\.\.\., 2\)"),
        ({"bits": torch.zeros(3, 2, dtype=torch.int32).to_sparse()}, "not sparse_coo"),
        ({"players": 0}, "`players` must be a whole number from 1 to 4096"),
        ({"players": 4097}, "`players` must be a whole number from 1 to 4096"),
        ({"players": 40.0}, "`players`"),
        ({"players": True}, "`players`"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"bits": torch.zeros(3, 2, dtype=torch.int32), "players": 40}
    with pytest.raises((ValueError, TypeError), match=f"coalition_sizes.*{message}"):
        fk.coalition_sizes(**(arguments | change))


def test_an_explicit_backend_never_falls_back():
    bits = torch.zeros(3, 2, dtype=torch.int32, device="meta")
    with pytest.raises(RuntimeError, match=f"coalition_sizes: the backend {BACKEND!r} can't serve"):
        fk.coalition_sizes(bits, 40, backend=BACKEND)


@pytest.mark.skipif(BACKEND == "triton", reason="Triton's launcher checks nothing")
def test_the_raw_operator_never_reads_past_the_words():
    with pytest.raises(RuntimeError, match=r"coalition_sizes: argument `bits` must be \(\.\.\., 2\) for 40 players"):
        KERNELS.coalition_sizes(torch.zeros(3, 1, dtype=torch.int32), 40)
