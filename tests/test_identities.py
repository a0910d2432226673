"""The mathematics of Shapley values, in float64 to 1e-10."""

from math import comb

import pytest
import torch
from accuracy import BACKENDS, all_coalitions, normal

import fastshap_kernels as fk

TOLERANCE = 1e-10


def random_game(players, generator, classes=3):
    return normal(generator, 2**players, classes)


def distance(actual, expected):
    return float((actual - expected).abs().max())


@pytest.mark.parametrize("players", [2, 3, 5, 8, 11])
def test_regression_on_all_coalitions_with_kernel_weights_gives_the_exact_values(generator, players):
    games = torch.stack([random_game(players, generator) for _ in range(2)])
    present = all_coalitions(players)[1:-1]
    bits = fk.pack_bits(present).expand(2, -1, -1)
    sizes = present.sum(1)
    kernel = [1 / (comb(players, s) * s * (players - s)) for s in range(1, players)]
    weights = torch.tensor(kernel, dtype=torch.float64)[sizes - 1].expand(2, -1)
    estimate = fk.kernel_shap(bits, games[:, 1:-1], games[:, 0], games[:, -1], players=players, weights=weights)
    assert distance(estimate.phi, fk.exact_shapley(games)) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [1, 2, 7, 12, 16])
def test_efficiency(generator, players, backend):
    game = random_game(players, generator)
    total = fk.exact_shapley(game, backend=backend).sum(0)
    assert distance(total, game[-1] - game[0]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("swapped", [(0, 1), (2, 9), (0, 9)])
def test_symmetry(generator, swapped, backend):
    """Renaming two players renames their values; where that changes no coalition's value, theirs are equal."""
    players, game = 10, random_game(10, generator)
    order = torch.arange(players)
    order[list(swapped)] = order[list(swapped)].flip(0)
    renamed = game[(all_coalitions(players)[:, order].long() << torch.arange(players)).sum(1)]
    phi = fk.exact_shapley(game, backend=backend)
    assert distance(fk.exact_shapley(renamed, backend=backend), phi[order]) <= TOLERANCE
    same = fk.exact_shapley(game + renamed, backend=backend)
    assert distance(same[swapped[0]], same[swapped[1]]) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dummy", [0, 4, 8])
def test_dummy(generator, dummy, backend):
    """A player that adds the same to every coalition gets just that, and the others as if it were not there."""
    players, game = 9, random_game(9, generator)
    without = torch.arange(2**players) & ~(1 << dummy)
    present = all_coalitions(players)[:, dummy].unsqueeze(1)
    phi = fk.exact_shapley(game[without] + 0.7 * present.double(), backend=backend)
    assert distance(phi[dummy], torch.full((3,), 0.7, dtype=torch.float64)) <= TOLERANCE
    rest = torch.arange(players) != dummy
    smaller = game[~present.squeeze(1)]
    assert distance(phi[rest], fk.exact_shapley(smaller, backend=backend)) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_linearity(generator, backend):
    one, other = random_game(10, generator), random_game(10, generator)
    both = fk.exact_shapley(2.0 * one - 0.3 * other, backend=backend)
    apart = 2.0 * fk.exact_shapley(one, backend=backend) - 0.3 * fk.exact_shapley(other, backend=backend)
    assert distance(both, apart) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("team", [(0,), (3, 5), (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 4, 8, 9)])
def test_unanimity_game(team, backend):
    """A prize of 1 that takes the whole team is shared by the team."""
    wins = all_coalitions(10)[:, list(team)].all(1).double().unsqueeze(1)
    share = torch.zeros(10, 1, dtype=torch.float64)
    share[list(team)] = 1 / len(team)
    assert distance(fk.exact_shapley(wins, backend=backend), share) <= TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("players", [1, 2, 9, 14])
def test_quadratic_game(generator, players, backend):
    """v = zᵀ Q z gives φ_i = Q_ii + ½ Σ_{j ≠ i} (Q_ij + Q_ji)."""
    quadratic = normal(generator, players, players)
    present = all_coalitions(players).double()
    game = ((present @ quadratic) * present).sum(1, keepdim=True)
    # Counting Q_ii as one of the j adds it once in all.
    expected = (0.5 * (quadratic.sum(0) + quadratic.sum(1))).unsqueeze(1)
    assert distance(fk.exact_shapley(game, backend=backend), expected) <= TOLERANCE
