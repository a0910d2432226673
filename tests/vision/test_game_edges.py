"""No images, one patch, other precisions, and refusals whose remedy works."""

import pytest
import timm
import torch
from vision_transformers import images, network

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games.readout import vote

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
KINDS = {
    "packed": ("vit_tiny_patch16_224", SMALL, {}),
    "packed, votes": ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg", "fc_norm": False}, {}),
    "rotary": ("eva02_tiny_patch14_224", SMALL, {}),
    "masked": ("vit_tiny_patch16_224", SMALL | {"attn_drop_rate": 0.1}, {}),
    "windows": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
        {},
    ),
    "cells": ("efficientvit_m0", {"img_size": 96}, {}),
    "stem": ("test_resnet", {}, {"img_size": 64, "removal": "stem"}),
    "tokens, earlier features": ("test_vit", {"img_size": 48}, {"intermediates": True}),
    "whole image": ("test_convnext", {}, {"img_size": 64, "removal": "pixel"}),
}


def create(kind, dtype=torch.float32):
    name, options, conversion = KINDS[kind]
    backbone = network(name, 5, 0.1, **options)
    return fv.convert(backbone.to(dtype), **conversion).to(dtype).eval()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_no_images(kind):
    """timm's own layers refuse them in many families."""
    model = create(kind)
    nothing = torch.zeros(0, *model.game.input_size)
    bits = torch.zeros(0, 2, (model.players + 31) // 32, dtype=torch.int32)
    explanation = model.explain(nothing, "all")
    assert explanation.values.shape == (0, model.players, 5)
    assert explanation.logits.shape == (0, 5)
    assert model.explain(nothing).values.shape == (0, model.players)
    assert model.coalition_values(nothing, bits).shape == (0, 2, 5)
    joint = model.joint(nothing, bits)
    assert joint.features.last.shape == (0, model.players, model.game.feature_width)
    assert joint.logits.shape == (0, 5)
    assert joint.values.shape == (0, 2, 5)


@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224"])
def test_one_patch_is_refused(name):
    """It was said to lower the patch size, which a convolutional network has none of."""
    options = {} if name == "resnet10t" else {"img_size": 32, "patch_size": 32, "depth": 1}
    with pytest.raises(fv.UnsupportedModelError, match=r"\(32, 32\) pixels as one patch.*img_size=64"):
        fv.convert(timm.create_model(name, num_classes=5, **options), img_size=32)
    again = timm.create_model(name, num_classes=5, **(options | ({"img_size": 64} if options else {})))
    assert fv.convert(again, img_size=64).players == 4


def test_a_remedy_is_named_where_it_works():
    pooled = timm.create_model("test_resnet", num_classes=5, global_pool="max")
    with pytest.raises(fv.UnsupportedModelError, match=r"pools by 'max'.*global_pool='avg'"):
        fv.convert(pooled, img_size=64)
    fv.convert(timm.create_model("test_resnet", num_classes=5, global_pool="avg"), img_size=64)
    with pytest.raises(fv.UnsupportedModelError, match="does not just average") as refusal:
        fv.convert(timm.create_model("lowformer_b0", num_classes=5), img_size=64)
    assert "global_pool" not in str(refusal.value)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_double_precision(kind):
    """v(N) = f and the empty coalition to the rounding of float64."""
    model = create(kind, torch.float64)
    x = images(2, model.game.input_size[1]).double()
    present = torch.zeros(2, 2, model.players, dtype=torch.bool)
    present[:, 0] = True
    values, logits = model.coalition_values(x, fk.pack_bits(present)), model.backbone(x)
    assert values.dtype == logits.dtype == torch.float64
    tolerance = 1e-12 * (1 + logits.abs().max())
    assert (values[:, 0] - logits).abs().max() <= tolerance
    assert (values[:, 1] - model.null_value()).abs().max() <= tolerance


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "stem"])
@torch.no_grad()
def test_half_precision(kind):
    """A bfloat16 model converts, and its coalitions have near its float32 self's values, in its own dtype."""
    full, half = create(kind), create(kind, torch.bfloat16)
    x, bits = images(2, full.game.input_size[1]), fk.sample_coalitions(2, 2, full.players, seed=0)
    expected, found = full.coalition_values(x, bits), half.coalition_values(x.bfloat16(), bits)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() <= 0.05 * expected.norm()
    nobody = fk.pack_bits(torch.zeros(2, 1, full.players, dtype=torch.bool))
    if half.game.patches_vote:
        assert not half.coalition_values(x.bfloat16(), nobody).any()


@pytest.mark.parametrize("is_autocast", [False, True])
@torch.no_grad()
def test_votes_add_up(is_autocast):
    """Under autocast, products in bfloat16 made them miss their sum by 1e-3 of it."""
    backbone = create("packed, votes").backbone
    features = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        everybody = vote(backbone, features.mean(0, keepdim=True))
        each = vote(backbone, features / 9, torch.ones(9, 1, dtype=torch.int64), 9)
    assert (each.sum(0) - everybody[0]).abs().max() <= 1e-5 * everybody.abs().max()


@torch.no_grad()
def test_a_share_of_the_bias_in_double_precision():
    backbone = create("packed, votes", torch.float64).backbone
    one = torch.ones(1, 1, dtype=torch.int64)
    found = vote(backbone, torch.zeros(1, 32, dtype=torch.float64), one, 9)
    assert torch.equal(found[0], backbone.head.bias * (torch.ones((), dtype=torch.float64) / 9))
