"""The heads: as wide as an explanation may cost, and of any width that is asked for."""

import pytest
import timm
import torch
from vision_transformers import converted, create, images

import fastshap_vision as fv
from fastshap_vision.models.head import Explainer

#: Of models at 224 pixels: the width that is chosen. An explanation adds at most 20 % to their parameters.
WIDTHS = {"vit_tiny_patch16_224": 96, "vit_small_patch16_224": 224, "resnet50": 256, "efficientnet_lite0": 128}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_recipes_head_stays_small_beside_the_model(name):
    model = fv.convert(timm.create_model(name), **fv.recipe.MODEL)
    assert model.head.explainer.width == model.config["head_width"] == WIDTHS[name]
    count = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("head", "backbone")}
    assert count["head"] <= 0.2 * count["backbone"]


@pytest.mark.parametrize("width", [24, 48, 64])
@pytest.mark.parametrize("intermediates", [False, True])
@pytest.mark.parametrize("kind", ["class token", "average pooling", "resnet18"])
def test_any_width_explains(kind, intermediates, width, tmp_path):
    options = {"head_depth": 1, "head_width": width, "intermediates": intermediates}
    model = converted(kind, **options)
    assert model.head.shares.in_features == width
    x = images(size=model.game.input_size[1])
    with torch.no_grad():
        phi, logits = model.shapley_values(x)
        torch.testing.assert_close(phi.sum(1), logits - model.null_value(), rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert torch.equal(again.explain(x, "all").values, model.explain(x, "all").values)


def test_without_blocks_and_earlier_features_the_shares_read_the_features():
    game = fv.convert(create("class token")).game
    explainer = Explainer(game, depth=0, width=8)
    features, _ = game.features_and_logits(images())
    assert explainer(features) is features.last


@pytest.mark.parametrize("width", [0, -1, 1.5, "wide", True])
def test_bad_widths_are_named(width):
    with pytest.raises(ValueError, match="argument `head_width` must be"):
        fv.convert(create("class token"), head_width=width)
