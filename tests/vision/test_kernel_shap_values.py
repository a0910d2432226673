import math

import pytest
import torch
from metric_games import SetGame, linear_game

from fastshap_vision import SelfExplainingClassifier, exact_values, fidelity, kernel_shap_values

PLAYERS = 9


def cubic_logits(present, images):
    """Σ_p a_p + ½ x_0 · (Σ_p a_p)³ over the present: the larger x_0 is, the harder to estimate."""
    weights = torch.randn(PLAYERS, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    total = present.double() @ weights
    return total + 0.5 * images.flatten(1)[:, :1, None] * total**3


@pytest.fixture
def game():
    return SetGame(PLAYERS, cubic_logits)


@pytest.fixture
def images():
    """An easy one between two hard ones."""
    x = torch.zeros(3, 1, 1, PLAYERS, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.tensor([1.0, 0.0, 0.5])
    return x


def relative(errors, phi):
    """(B,) root of the mean square over the spread."""
    spread = (phi - phi.mean((1, 2), keepdim=True)).square().mean((1, 2))
    return (errors.square().mean((1, 2)) / spread).sqrt()


@pytest.mark.parametrize("limit", [0.05, 0.02])
def test_every_image_is_as_exact_as_asked_and_no_more(game, images, limit):
    hard = images[:1].expand(30, -1, -1, -1)
    found = kernel_shap_values(game, hard, relative_error=limit, coalitions=40)
    assert found.converged.tolist() == [True] * 30
    noise = relative(found.standard_error, found.phi)
    assert (noise <= limit).all()
    assert noise.mean() > 0.8 * limit
    exact = exact_values(game, images[:1])
    errors = relative(found.phi - exact.phi, exact.phi.expand(30, -1, -1))
    assert 0.7 * limit < errors.square().mean().sqrt() < 1.15 * limit
    assert torch.equal(found.grand, exact.grand.expand(30, -1))
    assert torch.equal(found.null, exact.null.expand(30, -1))


def test_each_image_only_as_long_as_it_needs(game, images):
    alone = [kernel_shap_values(game, x, relative_error=0.02, coalitions=40).evaluations for x in images.split(1)]
    assert alone[1] == 42
    assert alone[0] > alone[2] > 1000
    game.asked.clear()
    assert kernel_shap_values(game, images, relative_error=0.02, coalitions=40).evaluations == sum(
        part.shape[1] for part in game.asked
    )


def test_fidelity_takes_them(game, images):
    found = kernel_shap_values(game, images, relative_error=0.05, coalitions=100)
    game.shapley_values = lambda part: (exact_values(game, part).phi, None)
    score = fidelity(game, images, found)
    assert 0 < score.reference_noise <= 0.05
    assert score.r2 > 0.99
    assert score.evaluations == found.evaluations


def test_coalitions_are_kept_and_are_those_of_kernel_shap(game, images):
    found = kernel_shap_values(game, images[:1], relative_error=1e-5, coalitions=70, most=600, seed=3)
    assert found.converged.tolist() == [False]
    assert found.evaluations == 602
    asked = [present[0] for present in game.asked]
    assert sum(map(len, asked)) == 602
    assert len(asked) > 2
    at_once = kernel_shap_values(game, images[:1], 600, seed=3)
    assert torch.equal(torch.cat(asked[1:]), game.asked[-1][0, 2:])
    assert torch.allclose(found.phi, at_once.phi, rtol=1e-12)
    assert torch.allclose(found.standard_error, at_once.standard_error, rtol=1e-9)


def test_images_do_not_depend_on_each_other_or_on_the_batch(game, images):
    together = kernel_shap_values(game, images, relative_error=0.05, coalitions=100, batch=33)
    alone = kernel_shap_values(game, images[:1], relative_error=0.05, coalitions=100)
    assert torch.allclose(together.phi[:1], alone.phi, rtol=1e-10)
    assert together.evaluations == sum(present.shape[1] for present in game.asked) - alone.evaluations
    twice = kernel_shap_values(game, images[[0, 0]], relative_error=0.05, coalitions=100)
    assert not torch.allclose(twice.phi[0], twice.phi[1], rtol=1e-4)  # each its own coalitions
    other = kernel_shap_values(game, images[:1], relative_error=0.05, coalitions=100, seed=1)
    assert not torch.allclose(alone.phi, other.phi, rtol=1e-4)


def test_a_game_without_spread_has_converged():
    def constant(present, images):
        return 3 + 1e-7 * torch.rand(*present.shape[:2], 2, generator=torch.Generator().manual_seed(0)).double()

    found = kernel_shap_values(
        SetGame(PLAYERS, constant), torch.ones(1, 1, 1, PLAYERS), relative_error=0.02, coalitions=100
    )
    assert found.converged.tolist() == [True]
    assert found.evaluations == 102


def test_too_few_for_an_error_are_followed_by_more():
    """Two pairs determine three values that sum to a known one, and leave nothing to tell their error by."""
    game, image = linear_game(torch.randn(3, 2)), torch.ones(1, 1, 1, 3)
    assert kernel_shap_values(game, image, 4, seed=0).standard_error.isinf().all()
    found = kernel_shap_values(game, image, relative_error=0.02, coalitions=4, seed=0)
    assert found.converged.tolist() == [True]
    assert 6 < found.evaluations < 100
    assert found.standard_error.isfinite().all()


def test_a_real_model():
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = SelfExplainingClassifier("vit_tiny_patch16_224", 3, img_size=12, model_kwargs=kwargs)
    images = torch.randn(2, 1, 12, 12)
    found, exact = kernel_shap_values(model, images, relative_error=0.05, coalitions=256), exact_values(model, images)
    assert found.converged.all()
    assert (relative(found.standard_error, found.phi) <= 0.05).all()
    assert (relative(found.phi - exact.phi, exact.phi) < 0.075).all()
    assert fidelity(model, images, found).reference == "kernel_shap"


def test_progress_bar(game, images, capsys):
    kernel_shap_values(game, images, relative_error=0.2, coalitions=100, progress=True)
    assert "KernelSHAP" in capsys.readouterr().err
    kernel_shap_values(game, images, relative_error=0.2, coalitions=100)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 1, 1, PLAYERS)}, "kernel_shap_values: argument `images`"),
        ({"relative_error": 0}, "argument `relative_error` must be a number above 0"),
        ({"relative_error": math.nan}, "argument `relative_error`"),
        ({"coalitions": 101}, "argument `coalitions` must be even"),
        ({"coalitions": 0}, "argument `coalitions`"),
        ({"most": 98}, "argument `most` must be a whole number from 100"),
        ({"most": 201}, "argument `most` must be even"),
        ({"batch": 0}, "argument `batch`"),
        ({"coalitions": 4}, "coalitions that determine 9 Shapley values"),
    ],
)
def test_bad_input_is_named(game, images, change, message):
    with pytest.raises(ValueError, match=message):
        kernel_shap_values(game, **{"images": images, "coalitions": 100, "relative_error": 0.02} | change)


def test_values_that_are_not_finite_are_named(images):
    game = linear_game(torch.full((PLAYERS, 2), math.inf))
    with pytest.raises(ValueError, match=r"kernel_shap_values: v\(S\) is not always finite"):
        kernel_shap_values(game, images + 1, relative_error=0.02, coalitions=100)
