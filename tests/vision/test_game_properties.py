"""What holds for every game: v(S) depends on the image and on S alone, and Shapley's axioms.

HYPOTHESIS_PROFILE=long tries many more images, coalitions and splits than a default run.
"""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metric_games import SetGame
from vision_transformers import fused_attention, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv

CLASSES = 5
#: Nine patches of four pixels a side.
SMALL = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
SWIN = {"img_size": 16, "patch_size": 2, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2}
#: timm name, its arguments, those of `convert`.
KINDS = {
    "class token": ("vit_tiny_patch16_224", SMALL, {}),
    "registers, no class token in the embedding": (
        "vit_tiny_patch16_224",
        SMALL | {"reg_tokens": 2, "no_embed_class": True},
        {},
    ),
    "average pooling": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "class_token": False}, {}),
    "attention pooling": ("vit_base_patch16_siglip_224", SMALL, {}),
    "masked images": ("vit_tiny_patch16_224", SMALL, {"removal": "pixel"}),
    "Eva": ("eva02_tiny_patch14_224", SMALL, {}),
    "Eva, average pooling": ("eva02_tiny_patch14_224", SMALL | {"global_pool": "avg"}, {}),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN, {}),
    "ResNet": ("test_resnet", {}, {"img_size": 64}),
    "ResNet, masked features": ("test_resnet", {}, {"img_size": 64, "removal": "stem"}),
    "ConvNeXt": ("test_convnext", {}, {"img_size": 64}),
}
ATTEND = tuple(name for name in KINDS if not name.startswith(("ResNet", "ConvNeXt")))
MODELS = [(kind, True) for kind in KINDS] + [(kind, False) for kind in ATTEND]
SEEDS = st.integers(0, 2**31)

few = settings(max_examples=settings.default.max_examples // 12)
models = pytest.mark.parametrize(
    ("kind", "fused"), MODELS, ids=[f"{kind}{'' if fused else ', unfused'}" for kind, fused in MODELS]
)


@functools.cache
def model(kind, fused):
    """With weights far from their initialisation, shares included."""
    name, options, arguments = KINDS[kind]
    with fused_attention(fused):
        backbone = network(name, CLASSES, 0.1, **options)
    return with_shares(fv.convert(backbone, **arguments), std=0.2)


def draw_game(data, kind, fused):
    """A model, 1 to 3 images for it, 1 to 7 coalitions for each image (empty and full ones too)."""
    game = model(kind, fused)
    generator = torch.Generator().manual_seed(data.draw(SEEDS))
    images = torch.randn(data.draw(st.integers(1, 3)), *game.game.input_size, generator=generator)
    share = data.draw(st.sampled_from([0.1, 0.5, 0.9]))
    present = torch.rand(len(images), data.draw(st.integers(1, 7)), game.players, generator=generator) < share
    if data.draw(st.booleans()):
        present[:, 0] = data.draw(st.booleans())
    return game, images, present


@torch.no_grad()
def values(game, images, present, paired=False, **options):
    return game.coalition_values(images, fv.Coalitions(fk.pack_bits(present), game.players, paired), **options)


def assert_same(found, expected):
    """Up to the rounding of sums in another order, relative to the largest value."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max().clamp_min(1)


@models
@few
@given(data=st.data())
def test_a_value_depends_on_its_image_and_its_coalition_alone(kind, fused, data):
    """Not on the other images, on the coalitions beside it, on their order, or on how they are cut in chunks."""
    game, images, present = draw_game(data, kind, fused)
    together = values(game, images, present)
    order = torch.tensor(data.draw(st.permutations(range(present.shape[1]))))
    assert_same(values(game, images, present[:, order]), together[:, order])
    b, m = (data.draw(st.integers(0, size - 1)) for size in present.shape[:2])
    assert_same(values(game, images[b : b + 1], present[b : b + 1, m : m + 1]), together[b : b + 1, m : m + 1])
    rows = data.draw(st.integers(1, 3 * present.numel()))
    assert_same(values(game, images, present, max_rows=rows), together)
    pairs = torch.stack([present, ~present], 2).flatten(1, 2)
    both = values(game, images, pairs)
    assert_same(both[:, ::2], together)
    assert_same(values(game, images, pairs, paired=True), both)
    assert_same(values(game, images, pairs, paired=True, max_rows=rows), both)


@models
@few
@given(data=st.data())
def test_nothing_of_an_absent_patch_is_in_a_value(kind, fused, data):
    game, images, present = draw_game(data, kind, fused)
    one = present[:, :1]
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(data.draw(SEEDS))).to(images)
    bits = fk.pack_bits(one)
    absent = fk.mask_patches(torch.ones_like(images), bits, game.grid) == 0
    if kind == "ResNet, masked features":  # whose stem looks beyond the borders of a patch
        absent &= ~one.any(2).view(-1, 1, 1, 1)
    assert_same(values(game, images.where(~absent, 10 * noise), one), values(game, images, one))


@models
@few
@given(data=st.data())
def test_explanations_are_efficient_and_the_ends_of_the_game_are_the_models(kind, fused, data):
    game, images, _ = draw_game(data, kind, fused)
    explanation = game.explain(images, "all")
    ends = torch.tensor([False, True]).view(1, 2, 1).expand(len(images), 2, game.players)
    found = values(game, images, ends)
    with torch.no_grad():
        logits = game(images)
    assert_same(explanation.logits, logits)
    assert_same(found[:, 1], logits)
    assert_same(found[:, 0], explanation.null.expand_as(logits))
    assert_same(explanation.values.sum(1), logits - explanation.null)


@models
@few
@given(seed=SEEDS)
def test_a_call_leaves_nothing_behind(kind, fused, seed):
    """The same call again gives the same bits, whatever was evaluated between."""
    game = model(kind, fused)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(2, *game.game.input_size, generator=generator)
    present = torch.rand(2, 4, game.players, generator=generator) < 0.5
    before = values(game, images, present)
    game.explain(images)
    values(game, images.flip(0), ~present)
    assert torch.equal(values(game, images, present), before)


# -- Shapley's axioms, on games given as tables ------------------------------------------------------------


@st.composite
def tables(draw, largest=5):
    """P and the values of two classes for every coalition, float64 (2^P, 2)."""
    players = draw(st.integers(1, largest))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    scale = draw(st.sampled_from([1e-6, 1.0, 1e6]))
    return players, scale * torch.randn(2**players, 2, generator=generator, dtype=torch.float64)


def table_game(players, table):
    places = 2 ** torch.arange(players)
    return SetGame(players, lambda present, images: table[(present * places).sum(2)])


def exact(players, table):
    return fv.exact_values(table_game(players, table), torch.ones(1, 1, 1, players))


def assert_close(found, expected, table):
    assert (found - expected).abs().max() <= 1e-12 * table.abs().max()


@given(tables(), tables())
def test_exact_values_are_efficient_and_linear(one, other):
    players, table = one
    found = exact(players, table)
    assert_close(found.phi.sum(1), table[-1:] - table[:1], table)
    assert torch.equal(found.null, table[:1])
    assert torch.equal(found.grand, table[-1:])
    second = other[1][:1].expand_as(table) * torch.arange(len(table)).unsqueeze(1).double().sin()
    both = 2 * table - 3 * second
    assert_close(exact(players, both).phi, 2 * found.phi - 3 * exact(players, second).phi, both.abs() + table.abs())


@given(tables(), st.data())
def test_a_dummy_gets_what_it_adds_and_equals_get_the_same(game, data):
    players, table = game
    dummy = data.draw(st.integers(0, players - 1))
    numbers = torch.arange(2**players)
    without = numbers & ~(1 << dummy)
    adds = 0.25 * table.abs().max()
    dumb = table[without] + adds * (numbers >> dummy & 1).unsqueeze(1)
    assert_close(exact(players, dumb).phi[0, dummy], adds.expand(2), dumb)
    other = data.draw(st.integers(0, players - 1))
    first, second = numbers >> dummy & 1, numbers >> other & 1
    swapped = numbers & ~(1 << dummy) & ~(1 << other) | first << other | second << dummy
    phi = exact(players, table + table[swapped]).phi[0]
    assert_close(phi[dummy], phi[other], table)


@given(tables())
def test_kernel_shap_of_all_coalitions_is_exact(game):
    players, table = game
    if players < 2:
        return
    numbers = torch.arange(1, 2**players - 1)
    present = (numbers.unsqueeze(1) >> torch.arange(players) & 1).bool().unsqueeze(0)
    sizes = present.sum(2)
    chances = torch.tensor([1 / (math.comb(players, s) * s * (players - s)) for s in sizes[0].tolist()])
    estimate = fk.kernel_shap(
        fk.pack_bits(present), table[numbers].unsqueeze(0), table[0], table[-1:], players=players, weights=chances[None]
    )
    assert (estimate.phi - exact(players, table).phi).abs().max() <= 1e-6 * table.abs().max()


@given(tables(), st.integers(2, 40), SEEDS)
def test_kernel_shap_is_exact_for_pairs_of_an_additive_game(game, pairs, seed):
    """And efficient for any: as many pairs as determine it."""
    players, table = game
    if players < 2:
        return
    singles = table[2 ** torch.arange(players)]
    present = torch.arange(2**players).unsqueeze(1) >> torch.arange(players) & 1
    additive = present.double() @ singles
    images = torch.ones(1, 1, 1, players)
    for values_of_all, is_exact in ((additive, True), (table, False)):
        found = fv.kernel_shap_values(table_game(players, values_of_all), images, 16 * players + 2 * pairs, seed)
        scale = values_of_all.abs().max()
        assert (found.phi.sum(1) - found.grand + found.null).abs().max() <= 1e-9 * scale
        if is_exact:
            assert (found.phi - singles).abs().max() <= 1e-9 * scale
