from fractions import Fraction
from itertools import combinations
from math import comb

import pytest
import torch
from accuracy import BACKEND, BACKENDS, KERNELS
from scipy.stats import chisquare

import fastshap_kernels as fk
from fastshap_kernels.reference import sample_coalitions as reference

PLAYERS = (2, 3, 31, 32, 33, 64, 127, 128, 129, 196, 1025, 4096)
#: Seed, offset and law of sizes.
DRAWS = ((0, 0, "shapley"), (2**64 - 1, 2**33 - 3, "uniform"), (2**40 + 9, 2**62, "shapley"))
#: Triton's interpreter and the emulation of CUDA are slow: their laws are tested with fewer draws.
FEWER = 1 if BACKEND == "cpu" else 10


@pytest.fixture
def large_programs(monkeypatch):
    """Triton's interpreter takes as long for a small program as for a large one."""
    if BACKEND == "triton":
        monkeypatch.setattr("fastshap_kernels.triton.sample_coalitions._BLOCKS", 2**16)


def exact_sizes(players, sizes):
    """p(s) for s = 1 … P − 1."""
    if sizes == "uniform":
        return [Fraction(1, players - 1)] * (players - 1)
    weights = [Fraction(1, s * (players - s)) for s in range(1, players)]
    total = sum(weights)
    return [weight / total for weight in weights]


def chi_square(observed, probabilities):
    """p-value; neighbouring rare sizes are pooled, as the test's approximation needs."""
    total, counts, expected = sum(observed), [0.0], [0.0]
    for count, probability in zip(observed, probabilities, strict=True):
        if expected[-1] >= 8:
            counts.append(0.0)
            expected.append(0.0)
        counts[-1] += count
        expected[-1] += float(probability) * total
    if expected[-1] < 8:  # the rest that is left over
        counts[-2:], expected[-2:] = [sum(counts[-2:])], [sum(expected[-2:])]
    return chisquare(counts, [e * total / sum(expected) for e in expected]).pvalue


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    """The vectors published with Random123."""
    words = reference.philox(tuple(torch.tensor([word]) for word in counter), key[1] << 32 | key[0])
    assert tuple(int(word) for word in words) == expected


@pytest.mark.parametrize("sizes", ["shapley", "uniform"])
@pytest.mark.parametrize("players", [2, 3, 4, 33, 196])
def test_thresholds_are_exact(players, sizes):
    cumulative, expected = Fraction(0), []
    for probability in exact_sizes(players, sizes)[:-1]:
        cumulative += probability
        expected.append(int(cumulative * 2**63))
    assert reference.size_thresholds(players, sizes) == expected


def test_thresholds_at_the_largest_game():
    thresholds = reference.size_thresholds(4096, "shapley")
    assert len(thresholds) == 4094
    assert all(low < high for low, high in zip([0, *thresholds], [*thresholds, 2**63], strict=True))
    # P(size ≤ P/2 − 1) + p(P/2) / 2 is one half, for the law is symmetric.
    assert abs((thresholds[2046] + thresholds[2047]) // 2 - 2**62) <= 1


@pytest.mark.parametrize(
    ("coalitions", "draws"),
    [(1, DRAWS[:1]), (2, DRAWS[1:2]), (5, DRAWS[2:])] if BACKEND == "triton" else [(n, DRAWS) for n in (1, 2, 5)],
)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("players", PLAYERS)
def test_backends_agree(players, paired, coalitions, draws):
    for seed, offset, sizes in draws:
        arguments = {"seed": seed, "offset": offset, "paired": paired, "sizes": sizes}
        ours = fk.sample_coalitions(3, coalitions, players, **arguments, backend=BACKEND)
        assert torch.equal(ours, fk.sample_coalitions(3, coalitions, players, **arguments, backend="reference"))
        assert ours.dtype == torch.int32
        assert ours.shape == (3, coalitions, (players + 31) // 32)


@pytest.mark.parametrize("seed", [0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1])
def test_backends_agree_at_the_ends_of_words(seed):
    """Where a number of 32 bits ends, signed or not, or one of 64."""
    for offset in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1 - 6):
        ours = fk.sample_coalitions(2, 3, 70, seed=seed, offset=offset, backend=BACKEND)
        assert torch.equal(ours, fk.sample_coalitions(2, 3, 70, seed=seed, offset=offset, backend="reference"))


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("players", [64, 196, 300, 700, 1000, 1500, 2000, 3000])
def test_every_number_of_groups_of_players(players, paired):
    """More coalitions than a program or a thread block draws, the last of them not full."""
    drawn = {"cpu": 70, "cuda": 9, "triton": 33 if players < 300 else 5}[BACKEND]
    arguments = {"seed": 2**50 + 3, "offset": 77, "paired": paired}
    ours = fk.sample_coalitions(1, drawn, players, **arguments, backend=BACKEND)
    assert torch.equal(ours, fk.sample_coalitions(1, drawn, players, **arguments, backend="reference"))


def test_the_bits_never_change():
    """A saved run resumes with the same coalitions in every later version."""
    bits = fk.sample_coalitions(1, 3, 40, seed=2**35 + 1, offset=2**32 - 1)
    assert bits.tolist() == [[[-1025, 255], [1024, 0], [0, 1]]]


def test_the_definition_draws_by_the_smallest_keys():
    bits = fk.sample_coalitions(1, 6, 300, seed=3, offset=11, paired=False)
    index = torch.arange(11, 17)
    sizes = reference.draw_sizes(index, torch.tensor(reference.size_thresholds(300, "shapley")), 3)
    for row, keys, size in zip(fk.unpack_bits(bits, 300)[0], reference.player_keys(index, 300, 3), sizes, strict=True):
        assert int(row.sum()) == int(size)
        assert keys[row].max() < keys[~row].min()
    for player in (0, 31, 32, 95, 127, 128, 299):  # the layout that the docstring promises
        block = torch.tensor([32 * (player // 128) + player % 32])
        words = reference.philox((index[:1], torch.zeros(1).long(), block, torch.ones(1).long()), 3)
        assert int(words[player // 32 % 4]) == int(reference.player_keys(index, 300, 3)[0, player])


def test_equal_keys_are_ordered_by_player():
    """Found by search: the last player in and the first one out share a key."""
    seed, index, players = 7, 2412845, 4096
    thresholds = torch.tensor(reference.size_thresholds(players, "shapley"))
    size = int(reference.draw_sizes(torch.tensor(index), thresholds, seed))
    keys = reference.player_keys(torch.tensor(index), players, seed)
    limit = keys.sort().values[size - 1]
    assert limit == keys.sort().values[size]
    for backend in BACKENDS:
        bits = fk.sample_coalitions(1, 1, players, seed=seed, offset=index, backend=backend)
        present = fk.unpack_bits(bits, players)[0, 0]
        assert int(present.sum()) == size
        assert present[keys < limit].all()
        assert present[keys == limit].tolist() == [True, False]


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("sizes", ["shapley", "uniform"])
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("players", [3, 16, 33, 196, 1025])
def test_sizes_follow_their_law(players, paired, sizes):
    draws = min(20000, 4_000_000 // players) // FEWER
    bits = fk.sample_coalitions(draws, 2 if paired else 1, players, seed=players, paired=paired, sizes=sizes)
    present = fk.unpack_bits(bits, players).sum(-1)
    for member in present.unbind(1):  # complements follow the same law, each on its own
        observed = torch.bincount(member, minlength=players + 1).tolist()
        assert observed[0] == observed[players] == 0
        assert chi_square(observed[1:players], exact_sizes(players, sizes)) > 1e-3


@pytest.mark.usefixtures("large_programs")
def test_subsets_are_uniform_given_their_size():
    players = 6
    bits = fk.sample_coalitions(60000 // FEWER, 1, players, seed=5, sizes="uniform")
    observed = torch.bincount(bits.flatten(), minlength=2**players).tolist()
    for size in range(1, players):
        subsets = [sum(1 << player for player in chosen) for chosen in combinations(range(players), size)]
        assert len(subsets) == comb(players, size)
        assert chisquare([observed[subset] for subset in subsets]).pvalue > 1e-3


@pytest.mark.usefixtures("large_programs")
def test_players_are_drawn_alike_in_a_large_game():
    """Each player, and each pair of neighbours (which share neither lane nor block), is present equally often."""
    players, draws = 196, 40000 // FEWER
    present = fk.unpack_bits(fk.sample_coalitions(draws, 1, players, seed=8), players)[:, 0]
    size = present.sum(-1).double()
    # Given the sizes, a player's count has mean Σ s/P and variance Σ s/P (1 − s/P).
    share = size / players
    deviation = (present.sum(0) - share.sum()) / (share * (1 - share)).sum().sqrt()
    assert deviation.abs().max() < 4.5
    together = size * (size - 1) / (players * (players - 1))
    spread = (together * (1 - together)).sum().sqrt()
    for distance in (1, 32, 128):
        both = (present[:, :-distance] & present[:, distance:]).sum(0)
        assert ((both - together.sum()) / spread).abs().max() < 4.5


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("players", PLAYERS)
def test_neither_empty_nor_full(players):
    bits = fk.sample_coalitions(200 // FEWER, 5, players, seed=1)
    sizes = fk.unpack_bits(bits, players).sum(-1)
    assert int(sizes.min()) >= 1
    assert int(sizes.max()) <= players - 1
    assert torch.equal(fk.pack_bits(fk.unpack_bits(bits, players)), bits)  # the unused high bits are 0


@pytest.mark.usefixtures("large_programs")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [2, 32, 33, 196])
def test_pairs_are_complements_drawn_by_the_even_member(players, backend):
    arguments = {"seed": 6, "offset": 9, "backend": backend}
    paired = fk.unpack_bits(fk.sample_coalitions(4, 7, players, **arguments), players)
    assert torch.equal(paired[:, 1::2], ~paired[:, 0:6:2])
    alone = fk.unpack_bits(fk.sample_coalitions(4, 7, players, paired=False, **arguments), players)
    assert torch.equal(paired[:, ::2], alone[:, ::2])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize("coalitions", [1, 4, 5])
def test_a_split_batch_gives_the_same_bits(coalitions, paired, backend):
    offset = 2**32 - 2 * coalitions  # the split batch crosses the 32-bit border

    def sample(batch, offset):
        return fk.sample_coalitions(batch, coalitions, 70, seed=4, offset=offset, paired=paired, backend=backend)

    split = torch.cat([sample(3, offset), sample(0, offset), sample(5, offset + 3 * coalitions)])
    assert torch.equal(sample(8, offset), split)


@pytest.mark.usefixtures("large_programs")
def test_threads_do_not_change_the_bits():
    def sample():
        return fk.sample_coalitions(2500 // FEWER, 2, 1024, seed=2)  # large enough for more than one thread

    bits = sample()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(sample(), bits)
    finally:
        torch.set_num_threads(threads)


def test_seeds_and_offsets_give_distinct_draws():
    seeds = (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    draws = [fk.sample_coalitions(1, 64, 196, seed=seed) for seed in seeds]
    assert len({tuple(bits.flatten().tolist()) for bits in draws}) == len(seeds)
    offsets = (0, 64, 2**32, 2**33, 2**62)
    draws = [fk.sample_coalitions(1, 64, 196, seed=0, offset=offset) for offset in offsets]
    assert len({tuple(bits.flatten().tolist()) for bits in draws}) == len(offsets)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("batch", "coalitions"), [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("paired", [True, False])
def test_empty(batch, coalitions, paired, backend):
    bits = fk.sample_coalitions(batch, coalitions, 40, seed=0, paired=paired, backend=backend)
    assert bits.shape == (batch, coalitions, 2)


def test_opcheck():
    thresholds = torch.tensor(reference.size_thresholds(40, "shapley"))
    for paired in (True, False):
        arguments = (thresholds, 3, 5, 40, -1, 2**40, paired)
        torch.library.opcheck(KERNELS.sample_coalitions.default, arguments)


@pytest.mark.parametrize(("backend", "steps"), [("reference", 1), (BACKEND, 3)])
def test_compiles_without_graph_breaks(backend, steps):
    def sample(offset):
        return fk.sample_coalitions(3, 5, 41, seed=2**63 + 1, offset=offset, backend=backend) + 1

    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager")
    for step in range(steps):  # a training loop's counter moves on
        assert torch.equal(compiled(15 * step), sample(15 * step))


def test_exports_and_leaves_no_trace():
    class Sampler(torch.nn.Module):
        def forward(self, x):
            return x + fk.sample_coalitions(2, 3, 44, seed=0)

    zeros = torch.zeros(2, 3, 2, dtype=torch.int32)
    exported = torch.export.export(Sampler(), (zeros,), strict=False).module()(zeros)
    assert torch.equal(exported, fk.sample_coalitions(2, 3, 44, seed=0))


def test_the_table_outlives_inference_mode():
    with torch.inference_mode():
        first = fk.sample_coalitions(1, 2, 43, seed=0, backend="reference")
    assert torch.equal(fk.sample_coalitions(1, 2, 43, seed=0, backend="reference"), first)


def test_devices():
    backend = None if BACKEND == "cpu" else "reference"  # FASTSHAP_BACKEND never falls back
    assert fk.sample_coalitions(2, 3, 40, seed=0, device="meta", backend=backend).shape == (2, 3, 2)
    with torch.device("meta"):
        assert fk.sample_coalitions(2, 3, 40, seed=0, backend=backend).device.type == "meta"
    assert fk.sample_coalitions(2, 3, 40, seed=0, device=torch.device("cpu")).device.type == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": -1}, "`batch`"),
        ({"coalitions": 2.0}, "`coalitions`"),
        ({"players": 1}, "`players`.*needs two players"),
        ({"players": 4097}, "`players` must be a whole number from 2 to 4096"),
        ({"seed": -1}, "`seed`"),
        ({"seed": 2**64}, "`seed`"),
        ({"seed": None}, "`seed`"),
        ({"offset": -1}, "`offset`"),
        ({"offset": 2**63 - 15}, "`offset`.*another seed"),
        ({"paired": 1}, "`paired`"),
        ({"sizes": "kernel"}, "`sizes` must be one of shapley, uniform"),
        ({"device": "gpu"}, "`device`"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"batch": 3, "coalitions": 5, "players": 40, "seed": 0}
    with pytest.raises(ValueError, match=f"sample_coalitions.*{message}"):
        fk.sample_coalitions(**(arguments | change))


def test_an_explicit_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=f"sample_coalitions: the backend {BACKEND!r} can't serve"):
        fk.sample_coalitions(2, 3, 40, seed=0, device="meta", backend=BACKEND)
