import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import nn
from torch.nn import functional

from fastshap_kernels import pack_bits
from fastshap_vision import Coalitions, MaskedImageGame, exact_values

GRID, CLASSES = (2, 3), 4
MEAN, STD = (0.5, 0.4), (0.2, 0.25)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(5 * 8 * 18, CLASSES)
    ).double()


@pytest.fixture
def images(generator):
    return torch.randn(3, 2, 8, 18, generator=generator, dtype=torch.float64)


@pytest.fixture
def present(generator):
    return torch.rand(3, 5, 6, generator=generator) < 0.5


def by_hand(model, images, present, baselines):
    """One image and one patch at a time."""
    values = torch.empty(*present.shape[:2], CLASSES, dtype=torch.float64)
    for b, m in ((b, m) for b in range(3) for m in range(5)):
        masked = images[b].clone()
        for p in range(6):
            if not present[b, m, p]:
                rows, columns = slice(4 * (p // 3), 4 * (p // 3) + 4), slice(6 * (p % 3), 6 * (p % 3) + 6)
                masked[:, rows, columns] = baselines[b][:, rows, columns]
        values[b, m] = model(masked.unsqueeze(0))[0]
    return values


def rise_blur(images):
    """As the authors of RISE make it: the dot that a Gaussian filter has spread over 11 x 11 pixels."""
    dot = torch.zeros(11, 11, dtype=torch.float64)
    dot[5, 5] = 1
    kernel = torch.from_numpy(gaussian_filter(dot.numpy(), 5))
    return functional.conv2d(images.flatten(0, 1).unsqueeze(1), kernel[None, None], padding=5).reshape(images.shape)


COLOUR = torch.tensor([0.7, -1.2], dtype=torch.float64)
PICTURES = torch.linspace(-2, 2, 3 * 2 * 8 * 18, dtype=torch.float64).reshape(3, 2, 8, 18)
BASELINES = {
    "mean": ("mean", lambda images: torch.zeros_like(images)),
    "black": ("black", lambda images: torch.tensor([-2.5, -1.6]).double().view(1, 2, 1, 1).expand_as(images)),
    "blur": ("blur", rise_blur),
    "colour": (COLOUR, lambda images: COLOUR.view(1, 2, 1, 1).expand_as(images)),
    "one picture": (PICTURES[:1], lambda images: PICTURES[:1].expand_as(images)),
    "a picture each": (PICTURES, lambda images: PICTURES),
}


@pytest.mark.parametrize("name", BASELINES)
def test_absent_patches_become_the_baseline(model, images, present, name):
    baseline, expected = BASELINES[name]
    game = MaskedImageGame(model, GRID, baseline, mean=MEAN, std=STD)
    assert (game.players, game.grid) == (6, GRID)
    values = game.coalition_values(images, pack_bits(present))
    assert torch.allclose(values, by_hand(model, images, present, expected(images)), atol=1e-12)
    assert torch.allclose(game(images), model(images))


@pytest.mark.parametrize("name", ["mean", "blur", "a picture each"])
@pytest.mark.parametrize("batch", [1, 4, 7])
def test_chunks_change_nothing(model, images, present, name, batch):
    seen = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    whole = MaskedImageGame(model, GRID, BASELINES[name][0]).coalition_values(images, pack_bits(present))
    assert seen == [15]
    seen.clear()
    parts = MaskedImageGame(model, GRID, BASELINES[name][0], batch=batch).coalition_values(images, pack_bits(present))
    assert max(seen) == batch
    assert torch.allclose(whole, parts, atol=1e-12)


def test_coalitions_and_their_bits_are_the_same(model, images, present):
    game, bits = MaskedImageGame(model, GRID), pack_bits(present)
    assert torch.equal(
        game.coalition_values(images, Coalitions(bits, game.players)), game.coalition_values(images, bits)
    )
    with pytest.raises(ValueError, match=f"`coalitions` must be of the game's {game.players} players"):
        game.coalition_values(images, Coalitions(bits, game.players + 1))


def test_any_callable_will_do():
    game = MaskedImageGame(lambda images: images.sum((2, 3)), (1, 2))
    values = game.coalition_values(torch.ones(1, 2, 3, 4), pack_bits(torch.tensor([[[True, False], [True, True]]])))
    assert values.tolist() == [[[6, 6], [12, 12]]]


def test_exact_values_take_any_classifier(model, images):
    exact = exact_values(MaskedImageGame(model, GRID, "blur"), images[:1])
    assert torch.allclose(exact.phi.sum(1), exact.grand - exact.null)
    assert torch.allclose(exact.grand, model(images[:1]))


def test_modes_and_state_are_the_models(model):
    game = MaskedImageGame(model, GRID, COLOUR)
    assert set(game.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    assert not game.eval().model.training
    assert game.half().fixed.dtype == torch.float16


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: MaskedImageGame(m, 4), "argument `grid`"),
        (lambda m: MaskedImageGame(m, (0, 4)), "argument `grid`"),
        (
            lambda m: MaskedImageGame(m, GRID, "grey"),
            "argument `baseline` must be one of 'mean', 'black', 'blur' or a tensor",
        ),
        (
            lambda m: MaskedImageGame(m, GRID, torch.zeros(2, 8, 18)),
            "argument `baseline` must be a floating-point tensor",
        ),
        (
            lambda m: MaskedImageGame(m, GRID, torch.zeros(2, dtype=torch.long)),
            "argument `baseline` must be a floating-point tensor",
        ),
        (lambda m: MaskedImageGame(m, GRID, "black"), "argument `mean` must be given"),
        (lambda m: MaskedImageGame(m, GRID, "black", mean=MEAN), "argument `mean` must be given, and `std`"),
        (lambda m: MaskedImageGame(m, GRID, "black", mean=MEAN, std=(1.0,)), "argument `std`"),
        (lambda m: MaskedImageGame(m, GRID, "black", mean=MEAN, std=(1.0, 0.0)), "argument `std`"),
        (lambda m: MaskedImageGame(m, GRID, batch=0), "argument `batch`"),
    ],
)
def test_bad_constructor_is_named(model, make, message):
    with pytest.raises(ValueError, match=f"MaskedImageGame: {message}"):
        make(model)


@pytest.mark.parametrize(
    ("game", "change", "message"),
    [
        ({}, lambda x, b: (x[0], b), "argument `images`"),
        ({}, lambda x, b: (x.long(), b), "argument `images`"),
        ({}, lambda x, b: (x, b[:2]), "argument `coalitions`"),
        ({}, lambda x, b: (x, b[:, :0]), "argument `coalitions` must be .*at least one coalition"),
        ({}, lambda x, b: (x, b.long()), "argument `coalitions`"),
        ({"baseline": torch.zeros(3)}, lambda x, b: (x, b), "argument `baseline` must be for 2 channels"),
        ({"baseline": PICTURES}, lambda x, b: (x[:1], b[:1]), "argument `baseline`"),
        ({"grid": (4, 4)}, lambda x, b: (x, b), "argument `grid` must be a divisor"),
    ],
)
def test_bad_call_is_named(model, images, present, game, change, message):
    game = MaskedImageGame(model, **{"grid": GRID} | game)
    with pytest.raises(ValueError, match=message):
        game.coalition_values(*change(images, pack_bits(present)))


def test_a_model_without_logits_is_named(images, present):
    game = MaskedImageGame(lambda images: images, GRID)
    with pytest.raises(ValueError, match="argument `model` must be a function from 15 images to logits"):
        game.coalition_values(images, pack_bits(present))
