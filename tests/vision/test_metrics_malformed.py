"""Malformed calls of metrics and reference values: refused by a short message that names the argument."""

import math

import numpy as np
import pytest
import torch
from metric_games import linear_game
from torch import nn

import fastshap_vision as fv
from fastshap_vision import metrics

PLAYERS, BATCH, CLASSES = 6, 2, 3


@pytest.fixture(scope="module")
def game():
    game = linear_game(torch.randn(PLAYERS, CLASSES, generator=torch.Generator().manual_seed(0)))
    game.shapley_values = lambda images: (fv.exact_values(game, images).phi, None)
    return game


def images():
    return torch.ones(BATCH, 1, 1, PLAYERS, dtype=torch.float64)


def attributions():
    return torch.arange(float(PLAYERS)).expand(BATCH, -1)


BIG = np.zeros((300, 300))
#: What no argument that takes tensors may be, made from one that it may be.
NOT_TENSORS = {
    "a number": lambda good: 1.5,
    "a string": lambda good: "images",
    "nothing": lambda good: None,
    "a list": lambda good: good.tolist(),
    "an array": lambda good: good.numpy(),
    "whole numbers": lambda good: good.long(),
    "complex numbers": lambda good: good + 0j,
    "float8": lambda good: good.to(torch.float8_e4m3fn),
    "NaN": lambda good: good.float() * math.nan,
    "infinity": lambda good: good.float() + math.inf,
    "no images": lambda good: good[:0],
    "one dimension less": lambda good: good[0],
    "one dimension more": lambda good: good.unsqueeze(0),
    "sparse": lambda good: good.to_sparse(),
    "nested": lambda good: torch.nested.nested_tensor(list(good.float()), layout=torch.jagged),
    "meta": lambda good: good.to("meta"),
}
#: None, a class or B classes are allowed.
NOT_TARGETS = [
    *(
        "cat",
        True,
        1.0,
        -1,
        CLASSES,
        2**63,
        -(2**63) - 1,
        10**30,
        {},
        object(),
        [0],
        [0, 1, 2],
        [[0], [1]],
        [[0], [1, 2]],
    ),
    *(np.float32(1), np.array([0.0, 1.0]), np.array([True, False]), np.uint64(2**63), np.array(["a", "b"]), BIG),
    *(torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.tensor([[0], [1]]), torch.tensor([0, CLASSES])),
    *(torch.tensor([0, 1j]), torch.tensor([0, 1]).to_sparse(), torch.tensor([0, 1], device="meta"), BIG.astype(int)),
]
NOT_COUNTS = [0, -1, 1.0, math.nan, "1", None, True, [1], BIG, 2**64, np.float64(1)]
NOT_SEEDS = [-1, 2**64, 1.0, "1", None, True, BIG]
NOT_CHOICES = ["best", None, 1, True, ["most"], BIG, {}]
NOT_FLAGS = [1, 0, "no", None, [True], BIG]
NOT_LEVELS = [(), (-0.1, 1), (0, 1.1), (0, math.nan), (0, math.inf), 0.5, "01", ("a", 1), (True, False), ([0], 1), BIG]
NOT_SIZES = [(), (0,), (PLAYERS,), (-1,), (1.0,), (True,), 3, "3", ("3",), (2**70,), BIG, None]
NOT_GAMES = [None, "vit", nn.Linear(2, 3), object(), torch.zeros(3)]

REMOVALS = ("removal_curve", "insertion", "deletion", "aopc", "log_odds", "perturbation_test")


def calls():
    """(function, argument, keyword arguments that are good, what the argument may not be)."""
    image_like = {"images": images(), "attributions": attributions()}
    for name in (*REMOVALS, "sensitivity_n"):
        function = getattr(metrics, name)
        good = image_like | ({"sizes": (2,), "subsets": 4} if name == "sensitivity_n" else {})
        for argument, tensor in image_like.items():
            yield from ((function, argument, good, change(tensor)) for change in NOT_TENSORS.values())
        target = "labels" if name == "perturbation_test" else "target"
        yield from ((function, target, good, value) for value in NOT_TARGETS)
        yield from ((function, "game", good, value) for value in NOT_GAMES)
    for name in ("removal_curve", "insertion", "deletion"):
        yield from ((getattr(metrics, name), "levels", image_like, value) for value in NOT_LEVELS)
    yield from ((metrics.removal_curve, "order", image_like, value) for value in NOT_CHOICES)
    for function, flag in (
        (metrics.removal_curve, "keep"),
        (metrics.aopc, "signed"),
        (metrics.perturbation_test, "positive"),
    ):
        yield from ((function, flag, image_like, value) for value in NOT_FLAGS)
    good = image_like | {"sizes": (2,), "subsets": 4}
    yield from ((metrics.sensitivity_n, "form", good, value) for value in NOT_CHOICES)
    yield from ((metrics.sensitivity_n, "sizes", good, value) for value in NOT_SIZES)
    yield from ((metrics.sensitivity_n, "subsets", good, value) for value in NOT_COUNTS)
    yield from ((metrics.sensitivity_n, "seed", good, value) for value in NOT_SEEDS)
    for function in (fv.exact_values, fv.kernel_shap_values, fv.fidelity):
        good = {"images": images()}
        yield from ((function, "images", good, change(images())) for change in NOT_TENSORS.values())
        yield from ((function, "model", good, value) for value in NOT_GAMES)
        yield from ((function, "batch", good, value) for value in NOT_COUNTS)
    for function in (fv.kernel_shap_values,):
        yield from ((function, "coalitions", {"images": images()}, value) for value in NOT_COUNTS)
        yield from ((function, "seed", {"images": images()}, value) for value in NOT_SEEDS)
    bad = [0, -1.0, math.nan, math.inf, "0.1", True, [0.1], BIG, 1j]
    yield from ((fv.kernel_shap_values, "relative_error", {"images": images()}, value) for value in bad)
    yield from (
        (fv.kernel_shap_values, "most", {"images": images(), "relative_error": 0.1}, value) for value in NOT_COUNTS
    )
    yield from ((fv.fidelity, "reference", {"images": images()}, value) for value in ["all", None, 1, BIG, (1, 2)])
    maps, masks = torch.rand(BATCH, 4, 5), torch.rand(BATCH, 4, 5) > 0.5
    for function in (metrics.pointing_game, metrics.segmentation):
        good = {"maps": maps, "masks": masks}
        yield from ((function, "maps", good, change(maps)) for change in NOT_TENSORS.values())
        bad = [
            None,
            "mask",
            masks.numpy(),
            masks.int(),
            masks[0],
            masks[:1],
            masks.to_sparse(),
            masks.to("meta"),
            BIG > 0,
        ]
        yield from ((function, "masks", good, value) for value in bad)
    bad = [-1, 4097, 1.5, "1", None, True, BIG]
    yield from ((metrics.pointing_game, "tolerance", {"maps": maps, "masks": masks}, value) for value in bad)


def pixel_games():
    """As `calls`, of MaskedImageGame's constructor."""
    flat = nn.Flatten()
    for argument, values in {
        "model": [None, 3, "vit"],
        "grid": [4, (4,), (0, 1), (1.0, 1), (True, 1), "ab", (1, 2, 3), None, BIG, (1, 5000)],
        "baseline": ["grey", None, 0.0, [0.0], np.zeros(1), torch.zeros(1, dtype=torch.long), torch.zeros(1, 2), BIG],
        "batch": NOT_COUNTS,
        "link": ["odds", None, 1, BIG],
        "mean": [None, 0.5, "a", ["a"], [[0.5]], [math.nan], [math.inf], [0.5, 0.5], BIG],
        "std": [None, 0.5, "a", [0.0], [-1.0], [math.nan], [1.0, 1.0], BIG],
    }.items():
        good = {"model": flat, "grid": (1, 2), "mean": [0.5], "std": [0.2]}
        if argument in ("mean", "std"):
            good["baseline"] = "black"
        yield from ((fv.MaskedImageGame, argument, good, value) for value in values)


def test_every_malformed_call_names_its_argument_in_a_short_message(game):
    faults = []
    number = 0
    for function, argument, good, value in (*calls(), *pixel_games()):
        arguments = dict(good)
        if function in (fv.exact_values, fv.kernel_shap_values, fv.fidelity):
            arguments = {"model": game} | arguments
        elif function not in (fv.MaskedImageGame, metrics.pointing_game, metrics.segmentation):
            arguments = {"game": game} | arguments
        what = f"{function.__name__}({argument}={str(value)[:40]} {type(value).__name__})"
        # `labels` are another's `target`; of `mean` and `std` either may be the one that does not fit the other.
        names = {"labels": ("labels", "target"), "mean": ("mean", "std"), "std": ("mean", "std")}.get(
            argument, [argument]
        )
        number += 1
        try:
            function(**arguments | {argument: value})
        except (ValueError, TypeError) as error:
            message = str(error)
            if len(message) > 500 or not any(f"`{name}`" in message for name in names):
                faults.append(f"{what}: {message[:500]}")
        except Exception as error:
            faults.append(f"{what}: {type(error).__name__}: {error}")
        else:
            faults.append(f"{what} was accepted")
    assert not faults, "\n".join(faults)
    assert number > 700


@pytest.mark.parametrize("seed", [2**32, 2**63, 2**64 - 1])
def test_large_seeds_are_seeds_like_any_other(game, seed):
    for function in (fv.kernel_shap_values,):
        function(game, images(), coalitions=40, seed=0)
        small = game.asked[-1]
        function(game, images(), coalitions=40, seed=seed)
        assert not torch.equal(game.asked[-1], small)


def test_seeds_that_would_draw_the_subsets_of_another_are_refused(game):
    """PyTorch's generator reads 32 bits of a seed: 2^32 used to draw what 0 draws."""
    x, a = images(), attributions()
    with pytest.raises(ValueError, match="argument `seed` must be a whole number from 0 to 4294967295"):
        metrics.sensitivity_n(game, x, a, sizes=(2,), subsets=6, seed=2**32)
    metrics.sensitivity_n(game, x, a, sizes=(2,), subsets=6, seed=2**32 - 1)


@pytest.mark.parametrize(
    "number", [np.int64, np.int32, np.uint8, lambda value: np.array([value] * BATCH), torch.tensor]
)
def test_numbers_of_numpy_and_torch_are_classes(game, number):
    expected = metrics.deletion(game, images(), attributions(), 1)
    assert torch.equal(metrics.deletion(game, images(), attributions(), number(1)).values, expected.values)


def test_counts_of_numpy_are_counts(game):
    x, a = images(), attributions()
    expected = metrics.sensitivity_n(game, x, a, sizes=[2], subsets=6).correlation
    found = metrics.sensitivity_n(game, x, a, sizes=np.array([2]), subsets=np.int64(6), seed=np.int64(0)).correlation
    assert torch.equal(found, expected)
    levels = metrics.insertion(game, x, a, levels=np.linspace(0, 1, 3)).values
    assert torch.equal(levels, metrics.insertion(game, x, a, levels=torch.linspace(0, 1, 3)).values)
    assert fv.kernel_shap_values(game, x, np.int64(40), np.int64(3), batch=np.int64(7)).evaluations == BATCH * 42
