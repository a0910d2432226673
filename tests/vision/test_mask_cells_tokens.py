"""Models whose tokens can't be dropped lose the pixels of cells, and say so once."""

import logging

import pytest
import torch
from vision_transformers import images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision import _log
from fastshap_vision.games.mask_cells_tokens import TokenCellRemoval

VIT = {"img_size": 32, "patch_size": 8, "num_heads": 2, "depth": 2, "embed_dim": 32}
AT_64 = {"img_size": 64, "depth": 2, "embed_dim": 32}
STAGES = (1, 1, 1, 1)
#: name: options, image size, players, and what v(S) is: votes, the classifier on the average, or the model's output.
FAMILIES = {
    "swin_tiny_patch4_window7_224": (
        {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": STAGES},
        64,
        4,
        "votes",
    ),
    "mambaout_femto": ({"depths": STAGES, "dims": (8, 8, 16, 16)}, 64, 4, "average"),
    "vit_tiny_r_s16_p8_224": (AT_64 | {"patch_size": 4, "num_heads": 2}, 64, 16, "model"),
    "vit_relpos_small_patch16_224": (VIT, 32, 16, "average"),
    "beit_base_patch16_224": (VIT, 32, 16, "average"),
    "cait_xxs24_224": (VIT, 32, 16, "model"),
    "xcit_nano_12_p16_224": (AT_64 | {"num_heads": 2}, 64, 16, "model"),
    "convit_tiny": (VIT | {"local_up_to_layer": 1}, 32, 16, "model"),
    "mixer_s32_224": ({"img_size": 64}, 64, 4, "votes"),
    "hiera_tiny_224": ({"img_size": 64, "embed_dim": 8, "stages": STAGES}, 64, 4, "average"),
    "twins_svt_small": ({"img_size": 64, "embed_dims": (8, 16, 16, 32), "depths": STAGES}, 64, 4, "votes"),
    "tnt_s_legacy_patch16_224": (AT_64 | {"num_heads_outer": 2}, 64, 16, "model"),
    "vit_base_patch16_gap_224": (VIT | {"global_pool": "max"}, 32, 16, "model"),
}


def create(name):
    return network(name, **FAMILIES[name][0])


def cells(output):
    """Tokens of the players, of any kind of output."""
    if output.ndim == 4:
        return output.flatten(1, 2)
    return output[:, output.shape[1] % 2 :]  # a class token makes the number odd


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_family_plays_the_defined_game(name, caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    _, size, players, reads = FAMILIES[name]
    backbone, x = create(name), images(size=size)
    with caplog.at_level(logging.INFO, "fastshap_vision"):
        model = fv.convert(backbone, img_size=size).eval()
        fv.convert(backbone, img_size=size)
    (record,) = caplog.records  # said once
    assert record.levelno == logging.WARNING
    assert type(backbone).__name__ in record.message
    assert "cells are removed" in record.message
    assert type(model.game) is TokenCellRemoval
    assert (model.removal, model.players) == ("cell", players)
    bits = fk.sample_coalitions(3, 2, players, seed=0)
    present = fk.unpack_bits(bits, players).flatten(0, 1)
    patch = size // model.grid[0]
    pixels = present.view(-1, 1, *model.grid).repeat_interleave(patch, 2).repeat_interleave(patch, 3)
    output = backbone.forward_features(x.repeat_interleave(2, 0) * pixels)
    pooled = (cells(output) * present.unsqueeze(2)).sum(1) / players
    if reads == "model":
        expected, null = backbone.forward_head(output), backbone(torch.zeros_like(x))[0]
    elif reads == "votes":
        classifier = backbone.get_classifier()
        expected, null = pooled @ classifier.weight.T, torch.zeros(7)
        expected = expected + classifier.bias * present.sum(1, keepdim=True) / players
    else:  # a norm follows: what the head makes of P tokens that are all the average
        equal = pooled.unsqueeze(1).expand(-1, players, -1)
        nothing = torch.zeros_like(equal)
        if output.ndim == 4:
            equal, nothing = equal.unflatten(1, model.grid), nothing.unflatten(1, model.grid)
        else:
            prefix = output[:, : output.shape[1] % 2]
            equal, nothing = torch.cat([prefix, equal], 1), torch.cat([prefix, nothing], 1)
        expected, null = backbone.forward_head(equal), backbone.forward_head(nothing)[0]
    assert torch.allclose(model.coalition_values(x, bits).flatten(0, 1), expected, atol=1e-5)
    assert torch.allclose(model.null_value(), null, atol=1e-5)


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_joint_pass_efficiency_and_removed_content(name, head):
    _, size, players, _ = FAMILIES[name]
    x, bits = images(size=size), fk.sample_coalitions(3, 2, players, seed=0)
    model = with_shares(fv.convert(create(name), img_size=size, head=head))
    nobody, everybody = (fk.pack_bits(torch.full((3, 1, players), present)) for present in (False, True))
    null, values = model.null_value(), model.coalition_values(x, bits)
    phi, logits = model.shapley_values(x)
    if head == "shares":
        assert torch.equal(logits, model.backbone(x))
    assert (phi.sum(1) - (logits - null)).abs().max() <= 1e-5
    assert (model.coalition_values(x, everybody)[:, 0] - logits).abs().max() <= 1e-5
    assert (model.coalition_values(x, nobody)[:, 0] - null).abs().max() <= 1e-5
    for found, expected in zip(model.joint(x, bits)[1:3], (logits, values), strict=True):
        assert (found - expected).abs().max() <= 1e-5
    one = bits[:, :1].contiguous()
    spoiled = fk.mask_patches(x, one, model.grid, torch.full(x.shape[1:], float("nan")))
    assert torch.allclose(model.coalition_values(spoiled, one)[:, 0], values[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
@torch.no_grad()
def test_pixel_removal_can_be_asked_for(name, tmp_path, caplog):
    """Of a model that could drop tokens; said by nobody, and kept by a checkpoint."""
    model = fv.SelfExplainingClassifier(
        name, 7, img_size=32, removal="cell", model_kwargs=dict(VIT, img_size=32)
    ).eval()
    assert type(model.game) is TokenCellRemoval
    assert not caplog.records
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path).eval()
    assert again.removal == again.config["removal"] == "cell"
    x, bits = images(), fk.sample_coalitions(3, 2, 16, seed=0)
    values = model.coalition_values(x, bits)
    assert torch.equal(again.coalition_values(x, bits), values)
    masked = fk.mask_patches(x, bits, model.grid)
    assert torch.allclose(values.flatten(0, 1), model(masked), atol=1e-5)


def test_null_value_spares_running_statistics():
    """An image of zeros is no image: batch norm must not learn from it, in training either."""
    model = fv.convert(create("xcit_nano_12_p16_224"), img_size=64).train()
    model.backbone.blocks[0].eval()
    before = {key: value.clone() for key, value in model.backbone.named_buffers()}
    model.null_value().sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.named_buffers())
    assert model.backbone.training
    assert not model.backbone.blocks[0].training
