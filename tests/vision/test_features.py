"""The shares read the features of every stage of the encoder."""

import pytest
import timm
import torch

import fastshap_kernels as fk
import fastshap_vision as fv

VIT = {"model_name": "vit_tiny_patch16_224", "model_kwargs": {"embed_dim": 32, "depth": 3, "num_heads": 2}}
MODELS = {
    "class token": VIT,
    "average pooling": {
        **VIT,
        "model_kwargs": VIT["model_kwargs"] | {"class_token": False, "global_pool": "avg", "fc_norm": False},
    },
    "rotary": {
        "model_name": "eva02_tiny_patch14_224",
        "model_kwargs": {"patch_size": 16, "embed_dim": 32, "depth": 3, "num_heads": 2},
    },
    "masked attention": {**VIT, "model_kwargs": VIT["model_kwargs"] | {"attn_drop_rate": 0.1}},
    "windows": {
        "model_name": "swin_tiny_patch4_window7_224",
        "model_kwargs": {"embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4},
    },
    "convolutional": {"model_name": "resnet10t", "model_kwargs": {}},
}
WIDTHS = {"windows": [16], "convolutional": [64, 64, 128, 256]}


def build(name, **options):
    torch.manual_seed(0)
    made = fv.SelfExplainingClassifier(num_classes=5, img_size=64, intermediates=True, **MODELS[name], **options)
    torch.nn.init.normal_(made.head.shares.weight)
    return made.eval()


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def images_of(generator, count=3):
    return torch.randn(count, 3, 64, 64, generator=generator)


def test_the_features_of_every_stage_are_given(name, generator):
    model, x = build(name), images_of(generator)
    features, logits = model.game.features_and_logits(x)
    assert model.game.intermediate_widths == WIDTHS.get(name, [32, 32])
    widths = [stage.shape for stage in features.earlier]
    assert widths == [(3, model.players, width) for width in model.game.intermediate_widths]
    plain = fv.convert(model.backbone, img_size=64)
    expected, expected_logits = plain.game.features_and_logits(x)
    torch.testing.assert_close(features.last, expected.last, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-5)


def test_they_are_what_timm_says(generator):
    model, x = build("class token"), images_of(generator)
    features, _ = model.game.features_and_logits(x)
    stages = model.backbone.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
    for found, stage in zip(features.earlier, stages[:-1], strict=True):
        torch.testing.assert_close(found, stage)


def test_maps_finer_than_the_grid_are_averaged_to_it(generator):
    model, x = build("convolutional"), images_of(generator)
    features, _ = model.game.features_and_logits(x)
    stem = model.backbone.forward_intermediates(x, intermediates_only=True)[0]
    assert stem.shape[2:] == (32, 32)
    assert model.grid == (2, 2)
    torch.testing.assert_close(features.earlier[0][:, 1], stem[:, :, :16, 16:].mean((2, 3)))


def test_the_joint_pass_gives_the_same(name, generator):
    model, x = build(name), images_of(generator)
    bits = fk.sample_coalitions(3, 2, model.players, seed=0)
    with torch.no_grad():
        features, logits, values, _ = model.joint(x, bits)
        expected, expected_logits = model.game.features_and_logits(x)
        torch.testing.assert_close(features, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(logits, expected_logits, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(values, model.coalition_values(x, bits), rtol=1e-3, atol=1e-4)


def test_shares_still_add_up(name, generator):
    model, x = build(name), images_of(generator)
    with torch.no_grad():
        phi, logits = model.shapley_values(x)
        torch.testing.assert_close(phi.sum(1), logits - model.null_value(), rtol=1e-4, atol=1e-4)


def test_the_regression_moves_every_stage(name, generator):
    model, x = build(name).train(), images_of(generator, 4)
    objective = fv.JointObjective(coalitions=2, regression_weight=1.0, regression_ramp=(0.0, 0.0))
    terms = objective(model, x, torch.arange(4))
    terms.loss.backward()
    merged = model.head.explainer
    assert merged.linear.weight.grad.abs().sum(0).gt(0).all()
    before = [parameter.clone() for parameter in merged.parameters()]
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert all(not torch.equal(old, new) for old, new in zip(before, merged.parameters(), strict=True))


def test_the_loss_is_that_of_the_shapley_values(generator):
    model, x = build("average pooling"), images_of(generator)
    bits = torch.randint(0, 2**16, (3, 4, 1), generator=generator, dtype=torch.int32)
    with torch.no_grad():
        features, logits, values, _ = model.joint(x, bits)
        found = model.regression_loss(features, logits, bits, values, model.null_value())
        phi, _ = model.shapley_values(x)
        present = (bits.long() >> torch.arange(16)) & 1
        expected = (values - present.float() @ phi).square().mean()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_saved_model_comes_back(tmp_path, generator):
    model, x = build("rotary"), images_of(generator)
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path).eval()
    assert torch.equal(again.explain(x).values, model.explain(x).values)


def test_checkpointing_changes_nothing(generator):
    model, x = build("class token").train(), images_of(generator)
    bits = torch.randint(0, 2**16, (3, 2, 1), generator=generator, dtype=torch.int32)
    expected = model.joint(x, bits).features
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.joint(x, bits).features, expected)


def test_removal_of_features_is_refused():
    with pytest.raises(ValueError, match="`intermediates` can't be True with removal='stem'"):
        build("convolutional", removal="stem")


def test_one_stage_has_none_before_it():
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=32, depth=1, num_heads=2)
    with pytest.raises(fv.UnsupportedModelError, match=r"one stage.*intermediates=False"):
        fv.convert(backbone, intermediates=True)
