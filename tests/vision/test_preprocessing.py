"""Pictures become what timm makes of them for its models, to the bit."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config

import fastshap_vision as fv
from fastshap_vision.images.preprocessing import Preprocessing

#: timm's own: crops of 0.9 to 1.15, bicubic and bilinear, centre, squash and border, ImageNet's mean and Inception's.
MODELS = (
    "resnet50.a1_in1k",
    "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "convnext_tiny.fb_in1k",
    "inception_v3.tf_in1k",
    "convnext_base.fb_in22k_ft_in1k_384",
    "volo_d4_448.sail_in1k",
    "resnet18.tv_in1k",
    "test_vit.r160_in1k",
)


def pictures():
    generator = np.random.default_rng(0)
    for height, width in ((375, 500), (500, 375), (64, 300), (224, 224)):
        coarse = generator.integers(0, 256, (height // 16, width // 16, 3), dtype=np.uint8)
        yield Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def of_timm(name, **options):
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(name).to_dict(), **options)
    return create_transform(**config, is_training=False)


@pytest.mark.parametrize("name", MODELS)
def test_pictures_are_prepared_as_timm_prepares_them(name):
    ours, theirs = Preprocessing.of_model(name).transform(), of_timm(name)
    for picture in pictures():
        assert torch.equal(ours(picture), theirs(picture))


def test_the_models_have_every_kind_of_preprocessing():
    found = [Preprocessing.of_model(name) for name in MODELS]
    assert {one.crop_mode for one in found} == {"center", "squash"}
    assert {one.interpolation for one in found} == {"bicubic", "bilinear"}
    assert {one.crop_pct for one in found} >= {0.9, 0.95, 1.0, 1.15}
    assert {one.mean[0] for one in found} == {0.485, 0.5}


@pytest.mark.parametrize(("crop_mode", "interpolation"), [("border", "bicubic"), ("squash", "lanczos")])
def test_other_configurations_are_timms_too(crop_mode, interpolation):
    model = timm.create_model("test_vit", pretrained_cfg_overlay={"crop_mode": crop_mode, "crop_pct": 0.9})
    model.pretrained_cfg["interpolation"] = interpolation
    ours = Preprocessing.of_model(model)
    assert (ours.crop_mode, ours.interpolation, ours.crop_pct) == (crop_mode, interpolation, 0.9)
    theirs = create_transform(**resolve_data_config(model=model), is_training=False)
    for picture in pictures():
        assert torch.equal(ours.transform()(picture), theirs(picture))


def test_at_the_size_that_timm_tests_with_the_crop_is_that_of_the_test():
    ours, theirs = Preprocessing.of_model("resnet50.a1_in1k", 288), of_timm("resnet50.a1_in1k", use_test_size=True)
    assert (ours.input_size, ours.crop_pct) == ((3, 288, 288), 1.0)
    picture = next(pictures())
    assert torch.equal(ours.transform()(picture), theirs(picture))
    assert Preprocessing.of_model("resnet50.a1_in1k", (256, 224)).crop_pct == 0.95


def test_it_travels_with_the_model(tmp_path):
    """From timm's configuration through conversion and a saved folder to `explain`."""
    backbone = timm.create_model("test_vit", num_classes=3, pretrained_cfg_overlay={"crop_mode": "border"})
    model = fv.convert(backbone)
    theirs = create_transform(**resolve_data_config(model=backbone), is_training=False)
    model.save_pretrained(tmp_path)
    loaded = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert loaded.preprocessing == model.preprocessing == Preprocessing.of_model(backbone)
    for picture in pictures():
        assert torch.equal(loaded.preprocess(picture)[0], theirs(picture))
    with torch.no_grad():
        logits = backbone.eval()(theirs(picture)[None])
    assert torch.allclose(loaded.explain(picture).logits, logits, atol=1e-6)


def test_statistics_fit_the_channels():
    grey = Preprocessing.of_model("inception_v3.tf_in1k", in_chans=1)
    assert (grey.input_size, grey.mean, grey.std) == ((1, 299, 299), (0.5,), (0.5,))
    picture = Image.fromarray(np.full((40, 60), 128, np.uint8))
    bordered = Preprocessing((1, 32, 32), (0.5,), (0.5,), crop_mode="border").transform()(picture)
    assert bordered.shape == (1, 32, 32)
    assert bordered.abs().max() < 0.01


@pytest.mark.parametrize("model", ["resnet5000", "resnet50.no_such_weights", torch.nn.Linear(2, 2), 5])
def test_what_timm_does_not_know_is_refused(model):
    with pytest.raises(ValueError, match=r"of_model: argument `model` must be a timm model, or the name of one"):
        Preprocessing.of_model(model)
