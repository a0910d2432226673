import pytest
import torch
from accuracy import DTYPES, all_coalitions, check_gradients, normal, random_bits
from scipy.linalg import lstsq

import fastshap_kernels as fk


def sample(batch, coalitions, players, generator, paired):
    """bits (B, M, W) from the Shapley kernel, new ones at each call."""
    seed = int(torch.randint(2**31, (), generator=generator))
    return fk.sample_coalitions(batch, coalitions, players, seed=seed, paired=paired)


def random_game(players, classes, generator):
    """Values of all coalitions (2^P, K): an additive part and noise of its size."""
    present = all_coalitions(players).double()
    additive = present @ normal(generator, players, classes)
    return additive + normal(generator, 2**players, classes)


def estimate(game, bits, players, dtype=torch.float64, **options):
    """The estimate for a game given as a table (2^P, K)."""
    values = game[bits.squeeze(-1).long()].to(dtype)
    null, grand = game[0].to(dtype), game[-1].to(dtype).expand(bits.shape[0], -1)
    return fk.kernel_shap(bits, values, null, grand, players=players, **options)


@pytest.mark.parametrize("players", [1, 3, 5, 32, 33, 64])
def test_an_additive_game_is_recovered_with_no_error(generator, players):
    phi = normal(generator, 2, players, 3)
    bits = (
        sample(2, 6 * players + 4, players, generator, paired=True) if players > 1 else random_bits(2, 3, 1, generator)
    )
    null = normal(generator, 2, 3)
    values = fk.unpack_bits(bits, players).double() @ phi + null.unsqueeze(1)
    result = fk.kernel_shap(bits, values, null, null + phi.sum(1), players=players)
    assert (result.phi - phi).abs().max() <= 1e-10
    assert result.standard_error.max() <= 1e-10


def test_definition(generator):
    """The stationarity conditions of the constrained problem: equal slopes for every player, and the exact sum."""
    players, bits = 7, random_bits(3, 40, 7, generator)
    values = normal(generator, 3, 40, 2)
    null, grand = normal(generator, 2, 3, 2)
    weights = torch.rand(3, 40, generator=generator, dtype=torch.float64)
    phi = fk.kernel_shap(bits, values, null, grand, players=players, weights=weights).phi
    assert (phi.sum(1) - (grand - null)).abs().max() <= 1e-12
    present = fk.unpack_bits(bits, players).double()
    residuals = values - null.unsqueeze(1) - present @ phi
    slopes = present.mT @ (weights.unsqueeze(-1) * residuals)
    assert (slopes - slopes.mean(1, keepdim=True)).abs().max() <= 1e-11


@pytest.mark.parametrize("paired", [True, False])
def test_it_is_scipys_weighted_least_squares(generator, paired):
    """The last player's share is what the others leave of v(N) − v(∅): the rest is a plain least-squares problem."""
    players, bits = 40, sample(2, 200, 40, generator, paired)
    values, (null, grand) = normal(generator, 2, 200, 3), normal(generator, 2, 2, 3)
    weights = torch.rand(2, 200, generator=generator, dtype=torch.float64)
    phi = fk.kernel_shap(bits, values, null, grand, players=players, weights=weights).phi
    present = fk.unpack_bits(bits, players).double()
    for b in range(2):
        root, last = weights[b].sqrt().unsqueeze(1), present[b, :, -1:]
        rest = values[b] - null[b] - last * (grand[b] - null[b])
        expected = lstsq(root * (present[b, :, :-1] - last), root * rest)[0]
        torch.testing.assert_close(phi[b, :-1], torch.from_numpy(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("paired", [True, False])
def test_more_coalitions_bring_it_closer_to_the_exact_values(generator, paired):
    game = random_game(8, 4, generator)
    exact = fk.exact_shapley(game)
    errors = [
        (estimate(game, sample(40, coalitions, 8, generator, paired), 8).phi - exact).square().mean().sqrt()
        for coalitions in (64, 256, 1024)
    ]
    assert errors[1] < 0.65 * errors[0]
    assert errors[2] < 0.65 * errors[1]


@pytest.mark.parametrize("paired", [True, False])
@pytest.mark.parametrize(("players", "coalitions"), [(8, 64), (6, 256), (9, 201), (12, 200)])
def test_standard_errors_are_calibrated(generator, players, coalitions, paired):
    """Over repeated samples of a game that is not additive, (estimate − exact) / error has a mean square near 1."""
    game = random_game(players, 3, generator)
    result = estimate(game, sample(400, coalitions, players, generator, paired), players)
    squared = (result.phi - fk.exact_shapley(game)).square()
    assert 0.8 <= (squared / result.standard_error.square()).mean() <= 1.25
    within = (squared <= (1.96 * result.standard_error) ** 2).double().mean()
    assert 0.93 <= within <= 0.97


def quadratic_game(players, generator):
    quadratic = normal(generator, players, players)
    present = all_coalitions(players).double()
    return torch.einsum("sp,pq,sq->s", present, quadratic, present).unsqueeze(1)


def test_a_pair_counts_as_one_draw(generator):
    """Most of this game cancels in a pair: errors that took its coalitions as independent would be far too large."""
    game = 3 * quadratic_game(8, generator) + random_game(8, 1, generator)
    bits = sample(400, 128, 8, generator, paired=True)
    paired = estimate(game, bits, 8)
    shuffled = estimate(game, bits[:, torch.randperm(128, generator=generator)], 8)
    assert (paired.phi - shuffled.phi).abs().max() <= 1e-10
    squared = (paired.phi - fk.exact_shapley(game)).square()
    assert 0.8 <= (squared / paired.standard_error.square()).mean() <= 1.25
    assert (squared / shuffled.standard_error.square()).mean() <= 0.1


def test_pairs_recover_a_quadratic_game_exactly(generator):
    """v(S) − v(N without S) is additive there, so pairs leave no error, and the standard errors say so."""
    game = quadratic_game(10, generator)
    result = estimate(game, sample(5, 80, 10, generator, paired=True), 10)
    assert (result.phi - fk.exact_shapley(game)).abs().max() <= 1e-10
    assert result.standard_error.max() <= 1e-10


def test_weights_correct_for_another_distribution_of_sizes(generator):
    """Sizes drawn alike, weighted by the Shapley kernel over that: the exact values within calibrated errors."""
    players, game = 7, random_game(7, 2, generator)
    bits = fk.sample_coalitions(500, 128, players, seed=0, sizes="uniform")
    sizes = fk.unpack_bits(bits, players).sum(-1)
    result = estimate(game, bits, players, weights=1.0 / (sizes * (players - sizes)))
    squared = (result.phi - fk.exact_shapley(game)).square()
    assert 0.8 <= (squared / result.standard_error.square()).mean() <= 1.25


def test_scaled_weights_and_zero_weights_change_nothing(generator):
    game, bits = random_game(6, 2, generator), sample(3, 60, 6, generator, paired=False)
    plain = estimate(game, bits, 6)
    scaled = estimate(game, bits, 6, weights=torch.full((3, 60), 1e-30))
    more = torch.cat([bits, sample(3, 20, 6, generator, paired=False)], 1)
    ignored = estimate(game, more, 6, weights=torch.cat([torch.ones(3, 60), torch.zeros(3, 20)], 1))
    for other in (scaled, ignored):
        assert (other.phi - plain.phi).abs().max() <= 1e-12
        assert (other.standard_error - plain.standard_error).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
def test_solved_in_float64_whatever_the_dtype(generator, dtype):
    game = random_game(6, 2, generator).to(dtype).double()
    bits = sample(3, 60, 6, generator, paired=True)
    ours, exact = estimate(game, bits, 6, dtype), estimate(game, bits, 6)
    assert ours.phi.dtype == ours.standard_error.dtype == dtype
    assert torch.equal(ours.phi, exact.phi.to(dtype))
    assert torch.equal(ours.standard_error, exact.standard_error.to(dtype))


def test_shapes_of_null_and_strided_inputs(generator):
    game, bits = random_game(6, 2, generator), sample(3, 60, 6, generator, paired=True)
    plain = estimate(game, bits, 6)
    values = game[bits.squeeze(-1).long()].mT.contiguous().mT
    shared = fk.kernel_shap(bits, values, game[0].expand(3, -1), game[-1].expand(3, -1), players=6)
    assert (shared.phi - plain.phi).abs().max() <= 1e-12
    assert (shared.standard_error - plain.standard_error).abs().max() <= 1e-12


@pytest.mark.parametrize(("batch", "classes"), [(0, 3), (2, 0)])
def test_empty(generator, batch, classes):
    bits = sample(2, 40, 6, generator, paired=True)[:batch]
    result = fk.kernel_shap(
        bits, torch.zeros(batch, 40, classes), torch.zeros(classes), torch.zeros(batch, classes), players=6
    )
    assert result.phi.shape == result.standard_error.shape == (batch, 6, classes)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("paired", [True, False])
def test_what_nothing_can_replace_leaves_the_error_unknown(generator, paired, copies):
    """Four coalitions, or pairs, determine five players, and leave nothing to judge them by, however often drawn."""
    present = torch.eye(5, dtype=torch.bool)[:4]
    if paired:
        present = torch.stack([present, ~present], 1).flatten(0, 1)
    bits = fk.pack_bits(present).repeat(copies, 1).unsqueeze(0)
    game = random_game(5, 2, generator)
    result = estimate(game, bits, 5)
    assert result.phi.isfinite().all()
    assert torch.equal(result.standard_error, torch.full((1, 5, 2), torch.inf, dtype=torch.float64))
    more = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 0, 0], [0, 1, 0, 1, 0]]).bool()
    more = fk.pack_bits(torch.stack([more, ~more], 1).flatten(0, 1)).unsqueeze(0)
    assert estimate(game, torch.cat([bits, more], 1), 5).standard_error.isfinite().all()


def test_too_few_coalitions_are_counted(generator):
    game, good = random_game(6, 2, generator), sample(2, 8, 6, generator, paired=False)
    alone = fk.pack_bits(torch.eye(6, dtype=torch.bool))
    good[0, :6], good[1] = alone, alone[0]
    with pytest.raises(ValueError, match=r"kernel_shap: argument `bits`.*image 1 leave 4 directions open.*\(8 if they"):
        estimate(game, good, 6)
    with pytest.raises(ValueError, match="image 0 leave 5 directions open"):
        estimate(game, good[:, :0], 6)
    with pytest.raises(ValueError, match="image 0 leave 1 directions open"):
        estimate(game, good[:1, :4], 6)


def test_gradcheck(generator):
    bits = sample(2, 8, 3, generator, paired=False)
    shapes = ((2, 8, 2), (2,), (2, 2), (2, 8))  # values, null, grand, weights
    inputs = [torch.rand(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]

    def phi(values, null, grand, weights):
        return fk.kernel_shap(bits, values, null, grand, players=3, weights=weights).phi

    check_gradients(phi, inputs)


def test_compiles_without_graph_breaks(generator):
    game, bits = random_game(6, 2, generator), sample(3, 40, 6, generator, paired=True)
    bits[1] = bits[1, 0]
    values = game[bits.squeeze(-1).long()]

    def solve(bits, values):
        return fk.kernel_shap(bits, values, game[0], game[-1].expand(3, -1), players=6)

    result = torch.compile(solve, fullgraph=True, backend="aot_eager")(bits, values)
    assert result.phi[1].isnan().all()
    assert result.standard_error[1].isnan().all()
    kept = torch.tensor([0, 2])
    plain = estimate(game, bits[kept], 6)
    assert (result.phi[kept] - plain.phi).abs().max() <= 1e-12
    assert (result.standard_error[kept] - plain.standard_error).abs().max() <= 1e-12


def test_five_runs_give_the_same_bits(generator):
    game, bits = random_game(8, 5, generator), sample(4, 100, 8, generator, paired=True)
    first = estimate(game, bits, 8)
    for _ in range(4):
        again = estimate(game, bits, 8)
        assert torch.equal(again.phi, first.phi)
        assert torch.equal(again.standard_error, first.standard_error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": torch.zeros(2, 9, 1)}, "`bits` must be int32"),
        ({"bits": torch.zeros(2, 7, 1, dtype=torch.int32)}, "`bits` must be of M = 9 coalitions"),
        ({"bits": torch.zeros(3, 9, 1, dtype=torch.int32)}, "B = 2"),
        ({"values": torch.zeros(2, 9)}, "`values`"),
        ({"values": torch.zeros(2, 9, 4, dtype=torch.int64)}, "`values`"),
        ({"null": torch.zeros(2)}, r"`null` must be a floating-point tensor \(4,\) or \(2, 4\)"),
        ({"null": 0.0}, "`null` must be a tensor"),
        ({"grand": torch.zeros(4)}, "`grand`"),
        ({"grand": torch.zeros(2, 3)}, r"`grand` must be \(2, 4\)"),
        ({"grand": torch.zeros(2, 4, device="meta")}, "on cpu like the other arguments"),
        ({"players": 0}, "`players`"),
        ({"players": 40}, "`bits` must be int32"),
        ({"weights": torch.ones(2, 8)}, r"`weights` must be \(2, 9\)"),
        ({"weights": -torch.ones(2, 9)}, "`weights` must be finite and not negative.*values from -1.0 to -1.0"),
        ({"weights": torch.full((2, 9), torch.nan)}, "`weights` must be finite and not negative"),
        ({"backend": "cpu"}, "has no such backend"),
        ({"backend": "gpu"}, "Choose one of"),
    ],
)
def test_bad_input_is_named(generator, change, message):
    arguments = {
        "bits": sample(2, 9, 4, generator, paired=False),
        "values": torch.zeros(2, 9, 4),
        "null": torch.zeros(4),
        "grand": torch.zeros(2, 4),
        "players": 4,
    }
    with pytest.raises((ValueError, TypeError, RuntimeError), match=f"kernel_shap.*{message}"):
        fk.kernel_shap(**(arguments | change))
