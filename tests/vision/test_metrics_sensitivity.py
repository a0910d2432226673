import math

import pytest
import torch
from metric_games import SetGame, linear_game
from scipy.stats import pearsonr, spearmanr

from fastshap_vision import SelfExplainingClassifier
from fastshap_vision.metrics import sensitivity_n

FORMS = ("ancona", "vit-shapley")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def weights():
    return draw(12, 3)


@pytest.fixture
def images():
    return draw(4, 1, 1, 12, seed=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_a_linear_game_scores_one(weights, images, form, dtype):
    game = linear_game(weights, null=draw(3, seed=2).to(dtype), dtype=dtype)
    attributions = images.flatten(1) * weights[:, 1]
    result = sensitivity_n(game, images, attributions, 1, sizes=(1, 3, 6, 11), form=form)
    assert result.correlation.shape == (4, 4)
    assert (result.correlation - 1).abs().max() < 1e-3
    assert result.score().mean == pytest.approx(1, abs=1e-3)
    opposite = sensitivity_n(game, images, -attributions, 1, sizes=(1, 3, 6, 11), form=form)
    assert (opposite.correlation + 1).abs().max() < 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_unrelated_attributions_score_little(form):
    game, images = linear_game(draw(40, 2)), torch.ones(20, 1, 1, 40, dtype=torch.float64)
    result = sensitivity_n(game, images, draw(20, 40, seed=3), sizes=(10, 20), form=form)
    assert (result.mean.abs() < 4 * result.standard_error).all()
    assert (result.standard_error < 0.1).all()


def test_outputs_that_differ_by_rounding_are_ties():
    weights = draw(12, 2).round(decimals=1)
    game = linear_game(weights, null=3.0, dtype=torch.float32)
    attributions = weights[:, 0].expand(4, -1)
    images = torch.ones(4, 1, 1, 12)
    result = sensitivity_n(game, images, attributions, 0, sizes=(2, 4, 6), form="vit-shapley")
    # Ties broken by rounding leave several times that.
    assert (1 - result.correlation).mean() < 1e-4


def cubic(present, images):
    total = present @ draw(12, 2)
    return total + 0.5 * total**3


@pytest.mark.parametrize("form", FORMS)
def test_against_a_loop(images, form):
    """What was asked of the game, with scipy's correlations."""
    game = SetGame(12, lambda present, images: cubic(present.double(), images))
    attributions = draw(4, 12, seed=5).round(decimals=1)  # many sums are equal but for rounding
    result = sensitivity_n(game, images, attributions, sizes=(2, 7), subsets=30, form=form)
    asked = game.asked[0]
    assert asked.shape == (4, 61, 12)
    full = cubic(torch.ones(12, dtype=torch.float64), None)
    target = int(full.argmax())
    for b in range(4):
        for i, size in enumerate((2, 7)):
            present = asked[b, 1 + 30 * i : 31 + 30 * i]
            outputs = cubic(present.double(), None)[:, target]
            if form == "ancona":
                assert (present.sum(1) == 12 - size).all()
                x, y = (~present).double() @ attributions[b], full[target] - outputs
                expected = pearsonr(x.numpy(), y.numpy()).statistic
            else:
                assert (present.sum(1) == size).all()
                x, y = present.double() @ attributions[b], outputs
                # Equal subsets may differ by rounding: they are ties.
                expected = spearmanr(x.numpy().round(9), y.numpy().round(9)).statistic
            assert result.correlation[b, i].item() == pytest.approx(expected, abs=1e-6)
    assert result.mean.tolist() == pytest.approx(result.correlation.mean(0).tolist())
    assert result.standard_error.tolist() == pytest.approx((result.correlation.std(0) / 2).tolist())
    assert result.score().values.tolist() == pytest.approx(result.correlation.mean(1).tolist())


def test_subsets_are_uniform_and_follow_from_the_seed():
    game = linear_game(draw(8, 2))

    def asked(seed, batch):
        images = torch.ones(batch, 1, 1, 8, dtype=torch.float64)
        sensitivity_n(game, images, torch.ones(batch, 8), sizes=(3,), subsets=4000, seed=seed, form="vit-shapley")
        return game.asked[-1][:, 1:]

    first = asked(0, 2)
    assert (first.double().mean((0, 1)) - 3 / 8).abs().max() < 0.03  # 4.5 standard deviations
    assert len(first[0].unique(dim=0)) == math.comb(8, 3)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(asked(0, 1)[0], first[0])
    assert not torch.equal(asked(1, 1)[0], first[0])


@pytest.mark.parametrize("form", FORMS)
def test_what_does_not_vary(form):
    weights = draw(9, 2).float()
    game = linear_game(weights, null=3.0, dtype=torch.float32)
    images = torch.ones(3, 1, 1, 9)
    images[1] = 1e-7  # the output changes by rounding only
    attributions = weights[:, 0].repeat(3, 1)
    attributions[2] = 0.1  # all sums of a size are the same, up to rounding
    result = sensitivity_n(game, images, attributions, 0, sizes=(4,), form=form)
    assert result.correlation[0].item() == pytest.approx(1, abs=1e-3)
    assert result.correlation[1].isnan()
    assert result.correlation[2].item() == 0
    assert result.mean.item() == pytest.approx(0.5, abs=1e-3)
    assert result.score().mean == pytest.approx(0.5, abs=1e-3)


def test_a_real_model():
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = SelfExplainingClassifier("vit_tiny_patch16_224", 3, img_size=12, model_kwargs=kwargs)
    images = torch.randn(2, 1, 12, 12)
    explanation = model.explain(images)
    result = sensitivity_n(model, images, explanation.values + torch.randn(2, 9), sizes=[3, 6], subsets=20)
    assert result.correlation.isfinite().all()
    assert result.correlation.abs().max() <= 1
    assert repr(result).startswith("SensitivityN(sizes=[3, 6], mean=[")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": ()}, "argument `sizes` must be a sequence of at least one"),
        ({"sizes": (0,)}, "argument `sizes` must be a whole number from 1 to 11"),
        ({"sizes": (3, 12)}, "argument `sizes` must be a whole number from 1 to 11"),
        ({"subsets": 1}, "argument `subsets`"),
        ({"seed": -1}, "argument `seed`"),
        ({"form": "pearson"}, "Argument `form` must be one of 'ancona', 'vit-shapley'"),
        ({"target": 3}, "sensitivity_n: argument `target`"),
        ({"attributions": torch.zeros(4, 11)}, "sensitivity_n: argument `attributions`"),
    ],
)
def test_bad_input_is_named(weights, images, change, message):
    arguments = {"attributions": torch.zeros(4, 12), "sizes": (3,)} | change
    with pytest.raises(ValueError, match=message):
        sensitivity_n(linear_game(weights), images, **arguments)
