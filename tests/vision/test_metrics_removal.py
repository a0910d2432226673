import itertools
import math

import numpy as np
import pytest
import torch
from metric_games import SetGame, linear_game, two_class_game

from fastshap_vision import MaskedImageGame, SelfExplainingClassifier, exact_values, metrics
from fastshap_vision.metrics.removal import NINE_LEVELS, TEN_LEVELS, removal_curve

# Of the number of players present, not of who they are: P = 10.
BY_SIZE = torch.tensor([0.05, 0.1, 0.2, 0.3, 0.35, 0.45, 0.6, 0.7, 0.8, 0.85, 0.95], dtype=torch.float64)


@pytest.fixture
def by_size():
    return SetGame(10, two_class_game(lambda present: BY_SIZE[present.sum(2)]))


def descending(players, batch=1):
    return torch.arange(players, 0, -1.0).expand(batch, -1)


def images_for(players, batch=1):
    return torch.ones(batch, 1, 1, players, dtype=torch.float64)


def test_areas_by_hand(by_size):
    x, a = images_for(10), descending(10)
    area = (sum(BY_SIZE.tolist()) - 0.05 / 2 - 0.95 / 2) / 10  # 0.485
    deletion = metrics.deletion(by_size, x, a)
    assert deletion.mean == pytest.approx(area) == pytest.approx(0.485)
    assert torch.allclose(deletion.curve.probability[0], BY_SIZE.flip(0))
    assert deletion.curve.counts.tolist() == list(range(11))
    insertion = metrics.insertion(by_size, x, a)
    assert insertion.mean == pytest.approx(area)
    assert torch.allclose(insertion.curve.probability[0], BY_SIZE)
    halves = metrics.insertion(by_size, x, a, levels=(0, 0.5, 1))
    assert halves.mean == pytest.approx((0.05 / 2 + 0.45 + 0.95 / 2) / 2)
    # Of the other class.
    assert metrics.deletion(by_size, x, a, target=1).mean == pytest.approx(1 - area)


def test_aopc_and_log_odds_by_hand(by_size):
    x, a = images_for(10), descending(10)
    after = [0.85, 0.8, 0.7, 0.6, 0.45, 0.35, 0.3, 0.2, 0.1]
    assert metrics.aopc(by_size, x, a).mean == pytest.approx(sum(0.95 - p for p in after) / 9)
    assert metrics.log_odds(by_size, x, a).mean == pytest.approx(sum(math.log(p / 0.95) for p in after) / 9)
    # Class 1 only rises, from 0.05: what counts as a fall there depends on the sign.
    assert metrics.aopc(by_size, x, a, 1).mean == pytest.approx(-sum(0.95 - p for p in after) / 9)
    assert metrics.aopc(by_size, x, a, 1, signed=False).mean == pytest.approx(sum(0.95 - p for p in after) / 9)


def test_perturbation_test_by_hand(by_size):
    x, a = images_for(10, 3), descending(10, 3)
    # Class 0 leads while more than five are present: after removing 0, 1, 2, 3, 4 of 10.
    score = metrics.perturbation_test(by_size, x, a)
    assert score.curve.hit[0].tolist() == [True] * 5 + [False] * 5
    assert score.values.tolist() == pytest.approx([4.5 / 9] * 3)
    labelled = metrics.perturbation_test(by_size, x, a, torch.tensor([0, 1, 0]))
    assert labelled.values.tolist() == pytest.approx([4.5 / 9, 4.5 / 9, 4.5 / 9])
    assert labelled.curve.hit[1].tolist() == [False] * 5 + [True] * 5
    assert labelled.curve.counts.tolist() == list(range(10))


def test_perturbation_test_removes_in_both_orders():
    # Player 0 alone makes class 0.
    game = SetGame(10, two_class_game(lambda present: 0.1 + 0.8 * present[..., 0]))
    x, a = images_for(10), descending(10)
    assert metrics.perturbation_test(game, x, a).values.item() == pytest.approx(0.5 / 9)
    assert metrics.perturbation_test(game, x, a, positive=False).values.item() == pytest.approx(1)


@pytest.mark.parametrize("order", ["most", "least"])
@pytest.mark.parametrize("keep", [False, True])
def test_who_is_removed_when(order, keep):
    attributions = torch.tensor([[0.1, 3.0, -2.0, 0.1], [5.0, 1.0, 2.0, 4.0]])
    game = linear_game(torch.randn(4, 2))
    removal_curve(game, images_for(4, 2), attributions, order=order, keep=keep)
    sequences = {"most": [[1, 0, 3, 2], [0, 3, 2, 1]], "least": [[2, 0, 3, 1], [1, 2, 3, 0]]}[order]
    asked = game.asked[0]
    assert asked.shape == (2, 6, 4)
    assert asked[:, 0].all()  # the whole image
    for image, sequence in zip(asked[:, 1:], sequences, strict=True):
        for count, present in enumerate(image):
            chosen = set(sequence[:count])
            assert set(present.nonzero().flatten().tolist()) == (chosen if keep else set(range(4)) - chosen)


@pytest.mark.parametrize("order", ["most", "least"])
def test_equal_attributions_go_by_number(order):
    game = linear_game(torch.randn(40, 2))
    removal_curve(game, images_for(40), torch.zeros(1, 40), order=order, keep=True)
    expected = torch.ones(41, 40).tril(-1).bool()
    assert torch.equal(game.asked[0][0, 1:], expected)


@pytest.mark.parametrize(
    ("players", "levels", "counts"),
    [
        (5, NINE_LEVELS, [1, 1, 2, 2, 3, 3, 4, 4, 5]),  # 0.5, 1.5, 2.5, … go up
        (64, TEN_LEVELS, [0, 6, 13, 19, 26, 32, 38, 45, 51, 58]),
        (50, (0.29, 0.57, 1), [15, 29, 50]),  # 14.499999999999998 and 28.499999999999996 as computed
    ],
)
def test_levels_are_rounded_half_away(players, levels, counts):
    curve = removal_curve(linear_game(torch.randn(players, 2)), images_for(players), descending(players), levels=levels)
    assert curve.counts.tolist() == counts


def test_true_order_is_the_best_and_its_reverse_the_worst():
    """Of all 120 orders, for a game that is linear in the log-odds of two classes, with contributions of both signs."""
    contributions = torch.tensor([1.3, -0.4, 0.7, 0.2, -0.9], dtype=torch.float64)
    game = linear_game(torch.stack([contributions, torch.zeros(5)], 1))
    orders = torch.tensor(list(itertools.permutations(range(5))))
    attributions = torch.zeros(120, 5).scatter(1, orders, torch.arange(5, 0, -1.0).expand(120, -1))
    x = images_for(5, 120)
    best = int((orders == contributions.argsort(descending=True)).all(1).nonzero())
    worst = int((orders == contributions.argsort()).all(1).nonzero())
    ways = {
        "insertion": (metrics.insertion, 1),
        "deletion": (metrics.deletion, -1),
        "aopc": (metrics.aopc, 1),
        "log odds": (metrics.log_odds, -1),
    }
    for name, (metric, sign) in ways.items():
        values = sign * metric(game, x, attributions, 0).values
        assert int(values.argmax()) == best, name
        assert int(values.argmin()) == worst, name
        assert len(values.round(decimals=9).unique()) > 100, name
        exact = sign * metric(game, x[:1], contributions.unsqueeze(0), 0).values
        assert exact.item() == pytest.approx(values.max().item()), name
    for positive, sign in ((True, -1), (False, 1)):
        values = sign * metrics.perturbation_test(game, x, attributions, 0, positive).values
        assert values[best] == values.max() > values.median()
        assert values[worst] == values.min() < values.median()


def test_one_curve_serves_several_metrics(by_size):
    x, a = images_for(10, 2), descending(10, 2)
    curve = removal_curve(by_size, x, a)
    asked = len(by_size.asked)
    assert curve.area().mean == metrics.deletion(by_size, x, a).mean
    assert curve.at(NINE_LEVELS).aopc().mean == pytest.approx(metrics.aopc(by_size, x, a).mean)
    assert curve.at(NINE_LEVELS).log_odds().mean == pytest.approx(metrics.log_odds(by_size, x, a).mean)
    assert curve.at(TEN_LEVELS).hit_area().mean == metrics.perturbation_test(by_size, x, a).mean
    assert len(by_size.asked) == asked + 4
    few = curve.at((0.8, 0.2))
    assert few.counts.tolist() == [8, 2]
    assert few.hit.tolist() == [[False, True]] * 2
    some = removal_curve(by_size, x, a, levels=(0, 0.5))
    with pytest.raises(ValueError, match=r"RemovalCurve\.at: argument `levels` must be of \[0, 5\] players"):
        some.at((0.3,))


def test_target_and_images_are_each_its_own():
    weights = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(4, 1, 1, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    game = linear_game(weights)
    contributions = x.flatten(1).unsqueeze(2) * weights
    predicted = contributions.sum(1).argmax(1)
    assert len(predicted.unique()) > 1
    attributions = contributions[torch.arange(4), :, predicted]
    together = removal_curve(game, x, attributions)
    assert torch.equal(together.target, predicted)
    assert torch.equal(removal_curve(game, x, attributions, predicted).probability, together.probability)
    assert together.hit[:, 0].all()
    assert torch.allclose(together.probability[:, 0], together.full_log_probability.exp())
    for b in range(4):
        alone = removal_curve(game, x[b : b + 1], attributions[b : b + 1], int(predicted[b]))
        assert torch.allclose(alone.probability[0], together.probability[b])
    # By hand: the third level of the second image.
    kept = contributions[1][attributions[1].argsort(descending=True)[2:]].sum(0)
    assert torch.allclose(together.probability[1, 2], kept.softmax(0)[predicted[1]])


def test_probabilities_that_vanish_keep_their_log_odds():
    game = linear_game(torch.tensor([[2000.0, 0.0], [1.0, 0.0]]), null=torch.tensor([0.0, 1000.0]))
    score = metrics.log_odds(game, images_for(2), torch.tensor([[2.0, 1.0]]))
    # Player 0 goes at the levels 30 … 90 % of two, rounded: 1 or 2 removed; none at 10 and 20 %.
    expected = [0, 0] + [-999.0] * 5 + [-1000.0] * 2
    assert score.mean == pytest.approx(sum(expected) / 9)


def test_score_says_mean_and_standard_error(by_size):
    values = torch.tensor([0.2, 0.5, 0.8, math.nan], dtype=torch.float64)
    score = metrics.Score(values)
    assert score.mean == pytest.approx(0.5)
    assert score.standard_error == pytest.approx(0.3 / math.sqrt(3))
    assert repr(score) == "Score(0.5000 ± 0.1732, 3 of 4 images)"
    assert math.isnan(metrics.Score(values[:1]).standard_error)
    difference = score - metrics.Score(values - 0.1)
    assert (difference.mean, difference.standard_error) == pytest.approx((0.1, 0), abs=1e-9)
    with pytest.raises(ValueError, match="there are 4 and 3"):
        score - metrics.Score(values[:3])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(0, 1, 1, 10)}, "removal_curve: argument `images`"),
        ({"attributions": torch.zeros(2, 10, 2)}, r"argument `attributions` must be .*\(B, P\) = \(2, 10\)"),
        ({"attributions": torch.zeros(1, 10)}, "argument `attributions`.*explanation.values_for"),
        ({"attributions": torch.zeros(2, 10, dtype=torch.long)}, "argument `attributions`"),
        ({"attributions": torch.full((2, 10), math.nan)}, "argument `attributions` must be finite"),
        ({"target": 2}, "argument `target` must be None, a class from 0 to 1, or 2 of them.* but it is 2"),
        ({"target": torch.tensor([0, -1])}, "argument `target` must be .* a class from 0 to 1.* but it holds -1 to 0"),
        ({"target": torch.tensor([0, 1, 1])}, "argument `target` must be None, a class from 0 to 1, or 2 of them"),
        ({"target": torch.tensor([[0], [1]])}, "argument `target`"),
        ({"target": [[0], [1]]}, "argument `target`"),
        ({"target": [[0], [1, 1]]}, "argument `target`"),
        ({"target": "cat"}, "argument `target`"),
        ({"target": True}, "argument `target`"),
        ({"target": 2**63}, "argument `target`"),
        ({"target": np.uint64(2**63)}, "argument `target`"),
        ({"target": torch.tensor([0, 1j])}, "argument `target`"),
        ({"target": torch.tensor([0, 1]).to_sparse()}, "argument `target`"),
        ({"target": torch.tensor([0, 1], device="meta")}, "argument `target`"),
        ({"target": torch.tensor([0.0, 1.0])}, "argument `target`"),
        ({"order": "best"}, "Argument `order`"),
        ({"levels": ()}, "argument `levels`"),
        ({"levels": (0.5, 1.1)}, "argument `levels`"),
        ({"levels": (0.5, math.nan)}, "argument `levels`"),
    ],
)
def test_bad_input_is_named(by_size, change, message):
    arguments = {"images": images_for(10, 2), "attributions": descending(10, 2)} | change
    with pytest.raises(ValueError, match=message):
        removal_curve(by_size, **arguments)


def linked(game, link):
    game.link = link
    return game


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 3])
def test_scores_do_not_depend_on_what_the_game_gives(classes, dtype):
    """Of one game as logits, as probabilities (by hand) and as their logarithms; one class has the sigmoid."""
    weights = torch.randn(6, classes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = linear_game(weights, null=0.3).logits
    full = 0.3 + weights.sum(0)
    target = int(full.argmax())

    def probability(present, images):
        values = logits(present, images).exp()
        return values / (1 + values if classes == 1 else values.sum(2, keepdim=True))

    games = {
        "logit": SetGame(6, lambda *given: logits(*given).to(dtype)),
        "probability": linked(SetGame(6, lambda *given: probability(*given).to(dtype)), "probability"),
        "log_probability": linked(SetGame(6, lambda *given: probability(*given).log().to(dtype)), "log_probability"),
    }
    attributions = weights[:, target].unsqueeze(0)
    kept = torch.ones(7, 6).tril(-1).bool()[None, :, attributions[0].argsort(descending=True).argsort()]
    expected = probability(kept, images_for(6))[0, :, target]
    by_hand = float((expected.sum() - expected[0] / 2 - expected[-1] / 2) / 6)
    for name, game in games.items():
        assert metrics.insertion(game, images_for(6), attributions).mean == pytest.approx(by_hand, rel=1e-5), name
        curve = metrics.deletion(game, images_for(6), attributions).curve
        assert curve.full_log_probability.exp().item() == pytest.approx(expected[-1].item(), rel=1e-5), name
        removed = probability(~kept, images_for(6))[0, :, target]
        assert torch.allclose(curve.probability[0].double(), removed, rtol=1e-5), name
        falls, odds = expected[-1] - removed, (removed / expected[-1]).log()
        assert curve.aopc().mean == pytest.approx(falls.mean().item(), rel=1e-4), name
        assert curve.log_odds().mean == pytest.approx(odds.mean().item(), rel=1e-4), name
    exact = exact_values(games["probability"], images_for(6)).phi[:, :, target]
    # Sensitivity follows the game's own unit: a probability's.
    result = metrics.sensitivity_n(games["probability"], images_for(6), exact, sizes=(1,), subsets=50)
    falls = probability(~torch.eye(6).bool()[None], images_for(6))[0, :, target]
    chosen = games["probability"].asked[-1][0, 1:].logical_not().int().argmax(1)
    pairs = torch.stack([exact[0, chosen], -falls[chosen]])
    assert result.correlation.item() == pytest.approx(torch.corrcoef(pairs)[0, 1].item(), rel=1e-3)


def test_a_probability_of_zero_is_small_and_not_nothing():
    game = linked(SetGame(2, lambda present, images: present[..., :1].double().expand(-1, -1, 2)), "probability")
    curve = metrics.deletion(game, images_for(2), descending(2)).curve
    assert curve.probability[0].tolist() == pytest.approx([1, 0, 0])
    assert curve.log_odds().values.isfinite().all()


def test_one_logit_has_the_sigmoid_and_no_hits():
    """Any map used to score insertion 1, deletion 1, AOPC 0."""
    game = linear_game(torch.tensor([[2.0], [-1.0], [0.5]]), null=-0.5)
    x, best = images_for(3), torch.tensor([[2.0, -1.0, 0.5]])
    height = torch.tensor([-0.5, 1.5, 2.0, 1.0]).sigmoid()  # nobody, then players 0, 2 and 1
    insertion = metrics.insertion(game, x, best)
    assert insertion.mean == pytest.approx(float(height.sum() - height[0] / 2 - height[-1] / 2) / 3, rel=1e-6)
    assert insertion.mean > metrics.insertion(game, x, -best).mean + 0.2
    assert metrics.deletion(game, x, best).mean < metrics.deletion(game, x, -best).mean - 0.2
    assert metrics.aopc(game, x, best).mean > metrics.aopc(game, x, -best).mean + 0.2
    assert insertion.curve.hit.tolist() == [[False, True, True, True]]
    assert insertion.curve.target.tolist() == [0]
    with pytest.raises(ValueError, match=r"hits need a game of at least two classes.*Take insertion, deletion or aopc"):
        metrics.perturbation_test(game, x, best)


@pytest.mark.parametrize(
    ("link", "values", "message"),
    [
        ("odds", 0.5, "removal_curve: argument `game.link` must be one of 'probability', 'logit', 'log_probability'"),
        ("probability", 1.5, "argument `game.link` must be 'probability' for values from 0 to 1.* reach from 1.5 to"),
        ("probability", -0.5, "argument `game.link`"),
        ("log_probability", 0.5, "argument `game.link` must be 'log_probability' for values from -inf to 0"),
    ],
)
def test_values_that_a_link_denies_are_named(link, values, message):
    game = linked(SetGame(3, lambda present, images: torch.full((*present.shape[:2], 2), values)), link)
    with pytest.raises(ValueError, match=message):
        removal_curve(game, images_for(3), descending(3))


def test_areas_of_levels_that_are_not_evenly_spaced(by_size):
    """By hand, from trapezoids as wide as the levels are apart: the mean height, in any order of the levels."""
    x, a = images_for(10), descending(10)
    p = BY_SIZE.tolist()
    expected = (0.1 * (p[0] + p[1]) / 2 + 0.5 * (p[1] + p[6]) / 2 + 0.4 * (p[6] + p[10]) / 2) / 1.0
    for levels in ((0, 0.1, 0.6, 1), (0.6, 1, 0, 0.1), (0, 0, 0.1, 0.6, 0.6, 1)):
        assert metrics.insertion(by_size, x, a, levels=levels).mean == pytest.approx(expected), levels
    # Rounding makes 0, 0.15, 0.3 of ten the counts 0, 2, 3: the second step is half as wide as the first.
    uneven = metrics.insertion(by_size, x, a, levels=(0, 0.15, 0.3)).mean
    assert uneven == pytest.approx((2 * (p[0] + p[2]) / 2 + (p[2] + p[3]) / 2) / 3)
    hits = metrics.removal_curve(by_size, x, a, levels=(0, 0.4, 0.5, 1)).hit_area().mean
    assert hits == pytest.approx(0.4 * 1 + 0.1 * 0.5 + 0.5 * 0)
    with pytest.raises(ValueError, match=r"at least two different numbers of players.*mean 3 of 10 players"):
        metrics.insertion(by_size, x, a, levels=(0.28, 0.3))


def test_a_game_of_one_player():
    game = SetGame(1, two_class_game(lambda present: 0.25 + 0.5 * present[..., 0]))
    x, a = images_for(1), torch.ones(1, 1)
    assert metrics.insertion(game, x, a).mean == pytest.approx(0.5)
    assert metrics.deletion(game, x, a).mean == pytest.approx(0.5)
    assert metrics.aopc(game, x, a).mean == pytest.approx(5 / 9 * 0.5)  # 50 % of one patch is one


def test_an_area_needs_two_levels_and_finite_values(by_size):
    with pytest.raises(ValueError, match="argument `levels` must be at least two different numbers of players"):
        metrics.deletion(by_size, images_for(10), descending(10), levels=(0.5,))
    broken = linear_game(torch.full((3, 2), math.inf))
    with pytest.raises(ValueError, match=r"removal_curve: v\(S\) is not always finite"):
        metrics.deletion(broken, images_for(3), descending(3))


def test_a_game_need_not_be_a_module(by_size):
    class Plain:
        players = 10

        def coalition_values(self, images, bits):
            assert not torch.is_grad_enabled()
            return by_size.eval().coalition_values(images, bits)

    assert metrics.deletion(Plain(), images_for(10), descending(10)).mean == pytest.approx(0.485)


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = SelfExplainingClassifier("vit_tiny_patch16_224", 3, img_size=12, model_kwargs=kwargs)
    torch.nn.init.normal_(model.backbone.head.weight)
    return model.train()


def test_a_real_model_and_its_protocols(transformer):
    images = torch.randn(4, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    attributions = torch.randn(4, 9, generator=torch.Generator().manual_seed(4))
    own = metrics.protocol_scores(transformer, images, attributions, protocol="vit-shapley")
    assert own["insertion"].mean == metrics.insertion(transformer, images, attributions).mean
    assert own["deletion"].mean == metrics.deletion(transformer, images, attributions).mean
    gap = own["insertion_minus_deletion"]
    assert gap.mean == pytest.approx(own["insertion"].mean - own["deletion"].mean)
    assert own["insertion"].curve.probability.shape == (4, 10)
    with torch.no_grad():
        probability = transformer.eval()(images).softmax(1).amax(1)
        transformer.train()
    assert torch.allclose(own["insertion"].curve.probability[:, -1], probability, atol=1e-5)
    assert torch.allclose(own["deletion"].curve.probability[:, 0], probability, atol=1e-5)

    rise = metrics.protocol_scores(transformer, images, attributions, protocol="rise")
    removed, inserted = MaskedImageGame(transformer, (3, 3), "mean"), MaskedImageGame(transformer, (3, 3), "blur")
    assert rise["deletion"].mean == metrics.deletion(removed, images, attributions).mean
    assert rise["insertion"].mean == metrics.insertion(inserted, images, attributions).mean
    assert rise["insertion"].mean != own["insertion"].mean

    labels = torch.tensor([0, 1, 2, 0])
    black = MaskedImageGame(transformer, (3, 3), "black", mean=[0.4], std=[0.2])
    chefer = metrics.protocol_scores(
        transformer.backbone, images, attributions, labels, protocol="chefer2021", grid=(3, 3), mean=[0.4], std=[0.2]
    )
    assert set(chefer) == {"positive", "negative"}
    for name, score in chefer.items():
        expected = metrics.perturbation_test(black, images, attributions, labels, positive=name == "positive")
        assert torch.equal(score.values, expected.values)
        assert torch.equal(score.curve.log_probability, expected.curve.log_probability)
    assert transformer.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "road"}, "Argument `protocol` must be one of 'rise', 'chefer2021', 'vit-shapley'"),
        ({"protocol": "vit-shapley"}, "argument `model` must be a game"),
        ({"protocol": "rise"}, "argument `grid`"),
        (
            {"protocol": "chefer2021", "grid": (3, 3)},
            'argument `mean` must be given, and `std` too, for baseline="black"',
        ),
    ],
)
def test_what_a_protocol_lacks_is_named(transformer, change, message):
    with pytest.raises(ValueError, match=message):
        metrics.protocol_scores(transformer.backbone, torch.zeros(1, 1, 12, 12), torch.zeros(1, 9), **change)
