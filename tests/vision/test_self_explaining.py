import copy
import json
import pickle
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from vision_transformers import (
    CONVOLUTIONAL,
    SMALL,
    VISION_TRANSFORMERS,
    VOTING,
    converted,
    create,
    image_size,
    images,
    network,
    with_shares,
)

import fastshap_kernels as fk
import fastshap_vision as fv

KINDS = (*VISION_TRANSFORMERS, *CONVOLUTIONAL)


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_efficiency(kind, head):
    """Shapley values add up to the logits less v of nobody, in one forward pass and in the coalition pass."""
    model, x = converted(kind, head=head), images(size=image_size(kind))
    phi, logits = model.shapley_values(x)
    gap = phi.sum(1) - (logits - model.null_value())
    assert gap.abs().max() <= 1e-5 * logits.abs().max()
    everybody = fk.pack_bits(torch.ones(3, 1, model.players, dtype=torch.bool))
    assert (model.coalition_values(x, everybody)[:, 0] - logits).abs().max() <= 1e-5 * logits.abs().max()
    if head == "votes":
        assert torch.equal(model.null_value(), torch.zeros(7))


@pytest.mark.parametrize("dtype", ["autocast", torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("class token", {}),
        ("class token", {"head": "votes"}),
        ("average pooling", {"base": "votes"}),
        ("convnext_atto", {}),
    ],
)
@torch.no_grad()
def test_efficiency_in_every_precision(kind, options, dtype):
    """Values are float32 at least, and so near the logits and null that come with them."""
    model, x = converted(kind, **options), images(size=image_size(kind))
    if dtype != "autocast":
        model, x = model.to(dtype), x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        explanation = model.explain(x, "all")
    values, grand, null = explanation.values, explanation.logits.double(), explanation.null.double()
    assert values.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    gap = (values.double().sum(1) + null - grand).abs()
    scale = values.double().abs().sum(1) + grand.abs() + null.abs()
    assert (gap <= 8 * torch.finfo(values.dtype).eps * scale).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["class token", "convolutional", "rotary"])
@torch.no_grad()
def test_the_head_takes_the_dtype_of_the_backbone_and_a_file_keeps_it(kind, dtype, tmp_path):
    if kind == "rotary":
        options = {"img_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
        backbone = timm.create_model("eva02_tiny_patch14_224", num_classes=7, **options)
    else:
        backbone = create(kind) if kind == "class token" else narrow_resnet()
    model = with_shares(fv.convert(backbone.to(dtype), img_size=64 if kind == "convolutional" else None))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    x = images(size=model.game.input_size[1]).to(dtype)
    explanation = model.explain(x, "all")
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == {
        name: tensor.dtype for name, tensor in model.state_dict().items()
    }
    assert torch.equal(again.explain(x, "all").values, explanation.values)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shares_leave_the_logits_bit_identical(kind):
    backbone, x = create(kind), images(size=image_size(kind))
    before = backbone(x)
    model = fv.convert(backbone, img_size=image_size(kind)).eval()
    assert model.is_exact_conversion
    assert torch.equal(model(x), before)
    assert torch.equal(model.shapley_values(x)[1], before)
    assert torch.equal(model.explain(x).logits, before)


@pytest.mark.parametrize(
    ("kind", "exact"),
    [("resnet18", True), ("convnext_atto", False), ("mobilenetv3_small_050", False), ("class token", False)]
    + [(kind, True) for kind in VOTING],
)
@torch.no_grad()
def test_votes_are_exact_where_patches_are_averaged_linearly(kind, exact):
    backbone, x = create(kind), images(size=image_size(kind))
    before = backbone(x)
    model = fv.convert(backbone, img_size=image_size(kind), head="votes").eval()
    assert model.is_exact_conversion is exact
    assert torch.allclose(model(x), before, atol=1e-5) is exact


@pytest.mark.parametrize("kind", ["resnet18", "convnext_atto"])
@torch.no_grad()
def test_pixel_removal_plays_the_defined_game(kind):
    model, x = converted(kind), images(size=64)
    bits = fk.sample_coalitions(3, 4, model.players, seed=0)
    values = model.coalition_values(x, bits)
    backbone, present = model.backbone, fk.unpack_bits(bits, model.players)
    for b in range(3):
        for m in range(4):
            pixels = present[b, m].view(model.grid).repeat_interleave(32, 0).repeat_interleave(32, 1)
            cells = backbone.forward_features(torch.where(pixels, x[b], 0.0)[None]).flatten(2)[0]
            pooled = cells[:, present[b, m]].sum(1) / model.players
            classifier = backbone.get_classifier()
            if kind == "resnet18":
                expected = classifier.weight @ pooled + classifier.bias * present[b, m].sum() / model.players
            else:
                expected = backbone.forward_head(pooled[None, :, None, None])[0]
            assert torch.allclose(values[b, m], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("class token", {"head": "shares"}),
        ("class token", {"head": "shares", "head_depth": 0}),
        ("average pooling", {"head": "shares", "base": "even", "head_depth": 2}),
        ("class token", {"head": "votes"}),
        ("average pooling", {"head": "shares", "base": "votes"}),
        ("resnet18", {"head": "shares", "base": "votes"}),
        ("convnext_atto", {"head": "votes"}),
    ],
)
def test_regression_loss_is_that_of_the_shapley_values(kind, options):
    """Pooling before the head gives the loss that explicit values per patch give, and the same gradient."""
    model, x = converted(kind, **options), images(size=image_size(kind))
    bits = fk.sample_coalitions(3, 4, model.players, seed=0)
    values, null = torch.randn(3, 4, 7), model.null_value().detach()
    features, logits = model.game.features_and_logits(x)
    pooled = model.regression_loss(features, logits, bits, values, null)
    phi = model.head(features, logits if options["head"] == "votes" else logits.detach(), null)
    explicit = fk.shapley_regression_loss(phi, bits, values, null)
    assert torch.allclose(pooled, explicit, rtol=1e-4)
    parameter = model.head.shares.weight if options["head"] == "shares" else model.backbone.get_classifier().weight
    ours, theirs = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (pooled, explicit))
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["class token", "average pooling", "resnet18"])
def test_shares_regression_never_moves_the_classifier(kind):
    """Logits and base are detached, and backbone_gradient = 0 keeps the regression out of the encoder."""
    for gamma in (0.0, 1.0):
        model, x = converted(kind, backbone_gradient=gamma), images(size=image_size(kind))
        bits = fk.sample_coalitions(3, 4, model.players, seed=0)
        features, logits = model.game.features_and_logits(x)
        model.regression_loss(features, logits, bits, torch.randn(3, 4, 7), model.null_value().detach()).backward()
        assert model.head.shares.weight.grad.abs().sum() > 0
        assert model.backbone.get_classifier().weight.grad is None
        moved = sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None)
        assert (moved > 0) == (gamma > 0)


def test_explain_targets():
    model, x = converted("class token"), images()
    everything = model.explain(x, "all")
    assert everything.values.shape == (3, 16, 7)
    assert everything.target is None
    predicted = model.explain(x)
    assert torch.equal(predicted.target, everything.logits.argmax(1))
    for b, k in enumerate(predicted.target):
        assert torch.allclose(predicted.values[b], everything.values[b, :, k], atol=1e-6)
    assert torch.allclose(model.explain(x, 2).values, everything.values[..., 2], atol=1e-6)
    assert torch.allclose(model.explain(x, torch.tensor([0, 1, 2])).values[1], everything.values[1, :, 1], atol=1e-6)


def test_explain_gives_each_module_its_own_mode_back():
    model = converted("resnet18").train()
    model.backbone.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    model.explain(images(size=64))
    assert model.training
    assert not model.backbone.layer1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_coalition_values_do_not_depend_on_chunks():
    model, x = converted("class token"), images()
    bits = fk.sample_coalitions(3, 7, model.players, seed=0)
    whole = model.coalition_values(x, bits)
    for max_rows in (1, 16 * 3, 16 * 8):
        assert torch.allclose(model.coalition_values(x, bits, max_rows=max_rows), whole, atol=1e-5)
    assert model.coalition_values(x[:0], bits[:0]).shape == (0, 7, 7)
    assert model.coalition_values(x, bits[:, :0]).shape == (3, 0, 7)


@pytest.mark.parametrize(
    ("kind", "options"), [("class token", {}), ("resnet18", {"base": "votes"}), ("SigLIP", {"head": "votes"})]
)
def test_saves_and_loads_offline(tmp_path, kind, options, capsys):
    model, x = converted(kind, **options), images(size=image_size(kind))
    model.save_pretrained(tmp_path / "model")
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(again.explain(x, "all").values, model.explain(x, "all").values)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "options"), [("class token", {}), ("resnet18", {}), ("resnet18", {"removal": "stem"})]
)
def test_a_checkpoint_keeps_its_removal(tmp_path, kind, options):
    """What was chosen is written down; checkpoints from before there was a choice have the game of then."""
    model = converted(kind, **options)
    expected = options.get("removal", "token" if kind == "class token" else "cell")
    assert model.removal == model.config["removal"] == expected
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path).eval()
    assert again.removal == expected
    x = images(size=image_size(kind))
    bits = fk.sample_coalitions(3, 2, model.players, seed=0)
    assert torch.equal(again.coalition_values(x, bits), model.coalition_values(x, bits))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["removal"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert older.removal == ("token" if kind == "class token" else "cell")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other shape"])
def test_unreadable_checkpoint(tmp_path, damage):
    folder = tmp_path / "model"
    converted("class token").save_pretrained(folder)
    weights = folder / "model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "missing":
        weights.unlink()
    else:
        timm_model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **SMALL)
        other = fv.convert(timm_model)
        other.save_pretrained(tmp_path / "other")
        weights.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"(?s)can't be read.*save_pretrained"):
        fv.SelfExplainingClassifier.from_pretrained(folder)


def test_positions_are_not_decayed():
    model = converted("class token")
    assert model.no_weight_decay() >= {"backbone.pos_embed", "backbone.cls_token"}
    assert model.no_weight_decay() & dict(model.named_parameters()).keys()
    assert converted("resnet18").no_weight_decay() == set()


def test_deep_copies_are_independent():
    """As an exponential moving average makes them."""
    model = converted("class token")
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    x = images()
    assert model.coalition_values(x, fk.sample_coalitions(3, 2, 16, seed=0)).abs().sum() > 0
    assert twin.coalition_values(x, fk.sample_coalitions(3, 2, 16, seed=0)).abs().sum() == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fv.SelfExplainingClassifier("vit_nonsense"), "`model_name` must be a timm model.*Close: "),
        (lambda: fv.convert(torch.nn.Linear(2, 2)), "made by timm.create_model"),
        (
            lambda: fv.convert(timm.create_model("resnet18", num_classes=7, global_pool="max")),
            "global averaging.*global_pool='avg'",
        ),
        (lambda: fv.convert(timm.create_model("pit_ti_224", num_classes=7)), r"1 token\(s\).*no grid.*Supported: timm"),
        (lambda: fv.convert(timm.create_model("crossvit_9_240", num_classes=7)), "neither in a.*Supported: timm"),
        (lambda: fv.convert(timm.create_model("resnet18", in_chans=4), img_size=(64, 0)), r"`img_size`.*\(64, 0\)"),
        (lambda: converted("class token", head="vote"), "`head` must be one of 'shares', 'votes'"),
        (lambda: converted("class token", base="votes"), "`base` can be 'votes'"),
        (lambda: converted("class token", removal="blur"), "`removal` must be one of 'token', 'cell', 'stem'"),
        (lambda: converted("class token", removal="stem"), "`removal` can be 'stem' for convolutional networks"),
        (lambda: converted("resnet18", removal="token"), "ResNet can't drop tokens.*removal='cell'"),
        (lambda: converted("class token", head_depth=3), "`head_depth` must be one of 0, 1, 2"),
        (lambda: converted("class token", backbone_gradient=2.0), "`backbone_gradient`"),
        (lambda: fv.convert(create("resnet18"), img_size=65), "does not divide the image size"),
        (lambda: converted("class token").explain(images(size=16)), r"`images` must be a tensor \(B, 3, 32, 32\)"),
        (lambda: converted("class token").explain(images() * float("nan")), "NaN"),
        (lambda: converted("class token").explain(images().to("meta")), r"`images`.*device, cpu.*meta.*to\('cpu'\)"),
        (lambda: converted("class token").explain(images().double()), r"`images` must be torch.float32.*float64"),
        (lambda: converted("class token").explain(images(), 7), "`target`"),
        (lambda: converted("class token").explain(images(), "best"), "`target`"),
        (
            lambda: converted("class token").coalition_values(images(), torch.zeros(3, 2, 2, dtype=torch.int32)),
            "`coalitions`",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- images of every kind ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def explains():
    return converted("class token")


def test_pictures_are_prepared_as_the_model_says(explains, picture):
    """By its mean, standard deviation and crop; PIL images, arrays and tensors of pixels alike."""
    wanted = explains.preprocessing.transform()(picture)[None]
    expected = explains.explain(wanted, "all")
    pixels = np.array(picture)
    first = torch.from_numpy(pixels).permute(2, 0, 1)
    for one in (picture, pixels, first, [picture], [pixels], wanted[0], wanted.numpy(), wanted[0].numpy().astype("f8")):
        assert torch.equal(explains.explain(one, "all").values, expected.values)
    many = explains.explain([picture, pixels, first, wanted[0]])
    assert torch.allclose(many.logits, expected.logits, rtol=0, atol=1e-5 * float(expected.logits.abs().max()))
    assert torch.equal(explains.preprocess(np.stack([pixels, pixels])), wanted.expand(2, -1, -1, -1))
    assert torch.equal(explains.preprocess(torch.stack([first, first])), wanted.expand(2, -1, -1, -1))


def test_preprocessing_is_timms_unless_told_and_is_saved(tmp_path, picture):
    backbone = create("class token")
    config = timm.data.resolve_model_data_config(backbone)
    model = fv.convert(backbone)
    assert model.preprocessing.input_size == (3, 32, 32)
    assert (model.preprocessing.mean, model.preprocessing.std) == (config["mean"], config["std"])
    model.preprocessing = fv.Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert again.preprocessing == model.preprocessing
    assert torch.equal(again.preprocess(picture), model.preprocess(picture))
    with pytest.raises(ValueError, match=r"`preprocessing` must have the model's input_size \(3, 32, 32\)"):
        model.preprocessing = fv.Preprocessing((3, 64, 64), (0.1,) * 3, (0.4,) * 3)
    grey = fv.convert(timm.create_model("vit_tiny_patch16_224", num_classes=7, in_chans=1, **SMALL))
    assert grey.preprocess(picture).shape == (1, 1, 32, 32)
    four = fv.convert(timm.create_model("vit_tiny_patch16_224", num_classes=7, in_chans=4, **SMALL))
    with pytest.raises(ValueError, match="greyscale or RGB"):
        four.explain(picture)


@pytest.mark.parametrize("kind", ["class token", "resnet18", "mobilenetv3_small_050"])
def test_no_images_are_explained_too(kind):
    model = converted(kind)
    for none in (torch.zeros(0, *model.game.input_size), []):
        everything = model.explain(none, "all")
        assert everything.values.shape == (0, model.players, 7)
        assert everything.logits.shape == (0, 7)
        assert len(model.explain(none)) == 0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("a.png", r"normalised floats \(B, C, H, W\).*'a.png'"),
        (None, "NoneType"),
        (np.zeros((2, 3, 32, 32), int), "array of int64"),
        (np.zeros((3, 32, 32), np.uint8), r"uint8 pixels \(H, W, C\).*\(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "normalised torch.float32.*int64.*preprocess"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.bfloat16), r"torch.float32.*bfloat16.*images.to"),
        (torch.zeros(2, 3, 32, 32).to_sparse(), "not sparse_coo.*to_dense"),
        (torch.nested.nested_tensor([torch.zeros(3, 32, 32)], layout=torch.jagged), "not nested.*torch.stack"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8, device="meta"), "device, cpu"),
        (torch.zeros(32, 32), r"\(B, 3, 32, 32\), but it is \(32, 32\)"),
        ([torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)], "images of one size"),
        ([torch.zeros(2, 3, 32, 32)], "torch.cat"),
        ([[]], "list of single images"),
        (Image.new("I", (9, 9)), "no known range"),
    ],
)
def test_other_images_are_named(explains, bad, message):
    with pytest.raises((ValueError, TypeError), match=f"`images`.*{message}") as error:
        explains.explain(bad)
    assert len(str(error.value)) < 500


def test_autocast_takes_no_float64(explains):
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match=r"`images`.*float64.*images.to"):
        explains.explain(images().double())


def test_a_target_is_the_callers_to_change(explains):
    target = torch.tensor([4, 0, 2])
    explanation = explains.explain(images(), target)
    target[0] = 1
    assert explanation.target.tolist() == [4, 0, 2]


def test_a_backbone_in_the_place_of_another_is_noticed(explains):
    model = copy.deepcopy(explains)
    model.backbone = copy.deepcopy(model.backbone)
    with pytest.raises(ValueError, match=r"another module.*Change it first and then convert it"):
        model.explain(images())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_loss_and_the_explanation_see_the_same_shares(explains, dtype):
    """Whatever hangs on them."""
    model, x = copy.deepcopy(explains).to(dtype), images().to(dtype)
    model.head.shares.register_forward_hook(lambda module, inputs, output: 3 * output)
    coalitions = fv.Coalitions(fk.sample_coalitions(len(x), 8, model.players, seed=0), model.players, paired=True)
    joint = model.joint(x, coalitions)
    null = model.null_value()
    loss = model.regression_loss(joint.features, joint.logits, coalitions, joint.values, null)
    present = fk.unpack_bits(coalitions.bits, model.players).to(dtype)
    left = joint.values - null - present @ model.explain(x, "all").values
    torch.testing.assert_close(loss, left.square().mean(), rtol=1e-4, atol=1e-5)


def test_targets_of_every_kind(explains):
    everything = explains.explain(images(), "all").values
    for target in ([4, 0, 2], (4, 0, 2), np.array([4, 0, 2]), torch.tensor([4, 0, 2], dtype=torch.int16)):
        assert torch.allclose(explains.explain(images(), target).values[0], everything[0, :, 4], atol=1e-6)
    assert torch.allclose(explains.explain(images(), np.int64(3)).values, everything[..., 3], atol=1e-6)


@pytest.mark.parametrize("target", [2**63, -1, 1.5, True, [1, 2], list(range(9999)), torch.zeros(9999), {}])
def test_other_targets_are_named(explains, target):
    with pytest.raises(ValueError, match=r"`target` must be None, 'all', a class from 0 to 6, or 3 of them") as error:
        explains.explain(images(), target)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("change", ["reset_classifier(3)", "reset_classifier(7, 'avg')", "head", "set_input_size"])
def test_a_backbone_that_changed_is_named(change):
    model = converted("class token")
    if change == "head":
        model.backbone.head = nn.Linear(48, 3)
    elif change == "set_input_size":
        model.backbone.set_input_size((64, 64))
    elif change == "reset_classifier(3)":
        model.backbone.reset_classifier(3)
    else:
        model.backbone.reset_classifier(7, "avg")
    with pytest.raises(ValueError, match=r"changed after its conversion.*convert\(model.backbone\)"):
        model.explain(images())
    again = fv.convert(model.backbone)
    again.explain(images(size=again.game.input_size[1]))


def test_what_was_never_trained_says_so(caplog, tmp_path):
    model = fv.convert(create("class token")).eval()
    for _ in range(2):
        assert "untrained explainer" in repr(model.explain(images()))
    assert caplog.text.count("never trained to explain") == 1
    model.save_pretrained(tmp_path)
    assert fv.SelfExplainingClassifier.from_pretrained(tmp_path).is_untrained
    torch.nn.init.normal_(model.head.shares.weight)
    assert not model.is_untrained
    assert "untrained" not in repr(model.explain(images()))


# -- checkpoints of models that are not what they seem -----------------------------------------------------


def reset_to_average():
    backbone = create("class token")
    backbone.reset_classifier(10, "avg")
    return backbone


def narrow_resnet(**options):
    """A ResNet-18 that is made and saved in no time."""
    return network("resnet18", channels=(8, 8, 16, 16), **options)


#: A Swin of two small stages on images of 32 pixels.
SWIN = {"img_size": 32, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}


def with_another_head():
    backbone = narrow_resnet()
    backbone.fc = nn.Linear(16, 9)
    return backbone


@pytest.mark.parametrize(
    "make",
    [
        reset_to_average,
        with_another_head,
        lambda: narrow_resnet(act_layer=nn.SiLU),
        lambda: narrow_resnet(act_layer="silu", drop_rate=0.1),
        lambda: narrow_resnet(norm_layer=nn.BatchNorm2d),
        # These compute with their weights as they are made.
        lambda: timm.create_model("swin_s3_tiny_224", num_classes=7, **SWIN),
        lambda: timm.create_model("swinv2_cr_tiny_ns_224", num_classes=7, **SWIN),
    ],
)
@torch.no_grad()
def test_what_timm_records_is_what_is_loaded(make, tmp_path):
    backbone = make()
    side = 32 if hasattr(backbone, "patch_embed") else 64
    model, x = fv.convert(backbone, img_size=side).eval(), images(size=side)
    model.save_pretrained(tmp_path)
    assert torch.equal(fv.SelfExplainingClassifier.from_pretrained(tmp_path)(x), model(x))


@pytest.mark.parametrize("layer", [partial(nn.BatchNorm2d, eps=0.1), nn.SyncBatchNorm])
def test_what_json_can_not_hold_is_refused_on_conversion(layer):
    with pytest.raises(ValueError, match=r"JSON.*norm_layer=.*timm's name"):
        fv.convert(timm.create_model("resnet18", norm_layer=layer))
    with pytest.raises(ValueError, match=r"JSON.*norm_layer=.*timm's name"):
        fv.SelfExplainingClassifier("resnet18", model_kwargs={"norm_layer": layer})


def replace_activation(backbone):
    backbone.act1 = nn.SiLU()


def remove_a_block(backbone):
    backbone.layer4 = backbone.layer4[:1]


def double_the_logits(backbone):
    backbone.fc.register_forward_hook(lambda module, inputs, output: 2 * output)


@pytest.mark.parametrize(
    ("operate", "reason"),
    [
        (replace_activation, r"'act1' is SiLU\(\), and would be loaded as ReLU"),
        (remove_a_block, "'layer4' is Sequential|'layer4.1' is absent"),
        (double_the_logits, "logits are others"),
    ],
)
@pytest.mark.parametrize("moment", ["before conversion", "after"])
def test_a_model_that_its_arguments_do_not_describe_is_not_saved(operate, reason, moment, tmp_path):
    fv.convert(narrow_resnet(), img_size=64).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    backbone = narrow_resnet()
    if moment == "before conversion":
        operate(backbone)
    model = fv.convert(backbone, img_size=64)
    if moment == "after":
        operate(model.backbone)
    with pytest.raises(ValueError, match=rf"can't be saved.*({reason})"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


class Digits(torch.utils.data.Dataset):
    """Images that say how they were prepared."""

    preprocessing = fv.Preprocessing((3, 64, 64), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def __len__(self):
        return 4

    def __getitem__(self, row):
        return images(1, 64)[0], row


def test_training_keeps_the_preprocessing_and_refuses_what_it_could_not_save(tmp_path):
    model = fv.convert(narrow_resnet(), img_size=64)
    options = {"objective": fv.TaskObjective(), "epochs": 1, "batch_size": 2, "output": tmp_path, "progress": False}
    fv.fit(model, Digits(), **options)
    assert fv.SelfExplainingClassifier.from_pretrained(tmp_path).preprocessing == Digits.preprocessing
    replace_activation(model.backbone)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="can't be saved"):
        fv.fit(model, Digits(), **options | {"output": tmp_path / "another"})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_saving_copies_no_weight_and_draws_no_number():
    model = converted("class token")
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    model.check_saveable()
    assert torch.equal(torch.rand(3), expected)


def changed(folder, **change):
    """A checkpoint with other entries in its configuration."""
    config = json.loads((folder / "config.json").read_text())
    kwargs = change.pop("kwargs", None)
    config |= change
    if kwargs is not None:
        config["model_kwargs"] |= kwargs
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def folder(tmp_path):
    converted("class token").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_another_model_with_weights_of_the_same_shapes_is_refused(folder):
    """Which no shape tells: the model with another activation."""
    changed(folder, kwargs={"act_layer": "relu"})
    with pytest.raises(ValueError, match="answers other features"):
        fv.SelfExplainingClassifier.from_pretrained(folder)


def test_other_weights_than_were_saved_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    with_probe = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(with_probe[:8], "little")
    metadata = json.loads(with_probe[8 : 8 + length])["__metadata__"]
    weights["head.shares.weight"] *= 2
    save_file(weights, folder / "model.safetensors", metadata)
    with pytest.raises(ValueError, match="answers other values"):
        fv.SelfExplainingClassifier.from_pretrained(folder)
    save_file(weights, folder / "model.safetensors")  # as other programs write them, and older versions did
    fv.SelfExplainingClassifier.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kwargs": {"embed_dim": 10**9}}, "embed_dim=1000000000"),
        ({"kwargs": {"embed_dim": 3 * 2**14}}, "more weights than the file holds"),
        ({"kwargs": {"depth": 2**14}}, "more weights than the file holds"),
        ({"kwargs": {"depth": 0}}, "no block"),
        ({"kwargs": {"depth": "a"}}, "timm can't make"),
        ({"kwargs": {"nonsense": 1}}, "timm can't make.*nonsense"),
        ({"kwargs": {"checkpoint_path": "x.pth"}}, "`model_kwargs`.*checkpoint_path"),
        ({"kwargs": {"pretrained_cfg": {"file": "x.pth"}}}, "`model_kwargs`.*pretrained_cfg"),
        ({"img_size": 64}, r"pos_embed` is \(1, 17, 48\) in the file"),
        ({"model_kwargs": 5}, "`model_kwargs` must be a dict"),
        ({"model_name": None}, "`model_name` must be a timm model"),
        ({"model_name": "hf-hub:someone/resnet18"}, "`model_name` must be a timm model"),
        ({"num_classes": "7"}, "`num_classes` must be a whole number"),
        ({"num_classes": 10**9}, "`num_classes` must be a whole number"),
        ({"num_classes": 8}, r"backbone.head.weight` is \(7, 48\) in the file, but \(8, 48\)"),
        ({"img_size": [1, 2, 3]}, "`img_size`"),
        ({"img_size": 10**6}, "`img_size`"),
        ({"head": ["shares"]}, "`head` must be one of"),
        ({"head_depth": 2}, "Missing key"),
        ({"intermediates": "yes"}, "`intermediates` must be one of"),
        ({"backbone_gradient": "a"}, "`backbone_gradient`"),
        ({"removal": 3}, "`removal`"),
        ({"pretrained": True}, "`pretrained`"),
        ({"backbone": "x"}, "`backbone`"),
        ({"preprocessing": {"mean": 3}}, "Preprocessing"),
    ],
)
def test_a_configuration_that_does_not_fit_is_named(folder, change, message, monkeypatch):
    """And nothing is built for those that want too much."""
    if "weights" in message or "file" in message or "0000" in message:
        monkeypatch.setattr("fastshap_vision.models.self_explaining.create_backbone", None)
    with pytest.raises(ValueError, match=rf"(?s)model' can't be read.*{message}"):
        fv.SelfExplainingClassifier.from_pretrained(changed(folder, **change))


def test_a_configuration_that_makes_any_error_is_named(folder, monkeypatch):
    """A KeyError of a model is no missing name."""
    monkeypatch.setattr("fastshap_vision.models.self_explaining.create_backbone", lambda *_: {}["stage"])
    with pytest.raises(ValueError, match=r"config\.json describes no model of these weights: 'stage'"):
        fv.SelfExplainingClassifier.from_pretrained(folder)


def test_weights_of_another_model_are_refused_in_few_words(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {f"other.{i}": torch.zeros(1) for i in range(500)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"Unexpected key.*save_pretrained") as refused:
        fv.SelfExplainingClassifier.from_pretrained(folder)
    assert len(str(refused.value)) < 1000


def test_a_transformer_without_blocks_is_refused():
    with pytest.raises(fv.UnsupportedModelError, match=r"no block \(depth 0\).*depth=1"):
        fv.convert(timm.create_model("vit_tiny_patch16_224", depth=0, img_size=32, embed_dim=48, num_heads=3))


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b"", b"[" * 10**5])
def test_a_configuration_that_is_no_json_object_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"model' can't be read: config\.json"):
        fv.SelfExplainingClassifier.from_pretrained(folder)


@pytest.mark.parametrize("name", ["/nowhere/at all", "a/b/c"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(ValueError, match=rf"The checkpoint '{name}' can't be read: there is no such folder"):
        fv.SelfExplainingClassifier.from_pretrained(name)


def test_a_hub_out_of_reach_is_named(monkeypatch):
    def download(**options):
        raise LocalEntryNotFoundError("check your connection")

    monkeypatch.setattr("fastshap_vision.models.file.hf_hub_download", download)
    with pytest.raises(ValueError, match=r"there is no such folder, and the Hub can't give it: check your connection"):
        fv.SelfExplainingClassifier.from_pretrained("someone/model")


class Mark:
    """Leaves a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("place", ["folder", "Hub"])
def test_no_pickle_is_loaded(folder, tmp_path, place, monkeypatch):
    mark = tmp_path / "mark"
    for name in ("pytorch_model.bin", "model.safetensors", "model.pkl"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(pickle.dumps(Mark(mark)))
    monkeypatch.setattr("fastshap_vision.models.file.hf_hub_download", hub(folder))
    with pytest.raises(ValueError, match="can't be read"):
        fv.SelfExplainingClassifier.from_pretrained(folder if place == "folder" else "someone/model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no model\.safetensors \(pickles.*never loaded\)"):
        fv.SelfExplainingClassifier.from_pretrained(folder if place == "folder" else "someone/model")
    assert not mark.exists()


def hub(folder):
    """The Hub, which has one model."""

    def download(repo_id, filename, **options):
        assert repo_id == "someone/model"
        if not (folder / filename).is_file():
            raise EntryNotFoundError(filename)
        return str(folder / filename)

    return download


def test_what_is_pushed_to_the_hub_is_loaded_from_it(folder, tmp_path, monkeypatch):
    model, pushed = fv.SelfExplainingClassifier.from_pretrained(folder), tmp_path / "pushed"

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **options):
            return SimpleNamespace(repo_id=repo_id)

        def upload_folder(self, folder_path, **options):
            shutil.copytree(folder_path, pushed)

    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", Api)
    model.push_to_hub("someone/model")
    assert {path.name for path in pushed.iterdir()} == {"README.md", "config.json", "model.safetensors"}
    monkeypatch.setattr("fastshap_vision.models.file.hf_hub_download", hub(pushed))
    again = fv.SelfExplainingClassifier.from_pretrained("someone/model")
    assert torch.equal(again.explain(images()).values, model.explain(images()).values)


def test_the_hub_is_told_which_version(folder, monkeypatch):
    monkeypatch.setattr("fastshap_vision.models.file.hf_hub_download", hub(folder))
    found = fv.SelfExplainingClassifier.from_pretrained("someone/model", revision="main", token=False)
    assert found.players == 16
    with pytest.raises(TypeError, match="no argument `colour`"):
        fv.SelfExplainingClassifier.from_pretrained("someone/model", colour="red")


@pytest.mark.parametrize("img_size", [16, -1, 0, "", True, (32,), (32, 16), 10**9, 2.5])
@pytest.mark.parametrize("options", [{}, {"dynamic_img_size": True}])
def test_an_image_size_that_the_model_has_not_is_refused(img_size, options):
    backbone = timm.create_model("vit_tiny_patch16_224", num_classes=7, **SMALL, **options)
    with pytest.raises(ValueError, match="Argument `img_size` must be"):
        fv.convert(backbone, img_size=img_size)


def test_the_remedy_for_another_image_size_works(tmp_path):
    backbone = create("class token")
    with pytest.raises(ValueError, match=r"set_input_size\(img_size=\(64, 64\)\)"):
        fv.convert(backbone, img_size=64)
    backbone.set_input_size(img_size=(64, 64))
    for size_given in (None, 64, np.int64(64), (64, 64)):
        assert fv.convert(backbone, img_size=size_given).game.input_size == (3, 64, 64)
    fv.convert(backbone).save_pretrained(tmp_path)
    assert fv.SelfExplainingClassifier.from_pretrained(tmp_path).game.input_size == (3, 64, 64)


def test_a_distilled_model_is_trained_as_one_classifier():
    backbone = create("distilled DeiT")
    model = fv.convert(backbone)
    backbone.set_distilled_training(True)
    model.train()
    for call in (model, model.shapley_values, lambda x: fv.TaskObjective()(model, x, torch.tensor([0, 1, 2]))):
        with pytest.raises(ValueError, match=r"set_distilled_training\(False\)"):
            call(images())
    assert len(model.explain(images())) == 3  # in evaluation mode there is one
    backbone.set_distilled_training(False)
    assert fv.TaskObjective()(model, images(), torch.tensor([0, 1, 2])).loss > 0


def test_a_frozen_backbone_is_explained():
    model = fv.convert(create("class token").requires_grad_(False))
    before = copy.deepcopy(model.backbone.state_dict())
    objective = fv.JointObjective(coalitions=4)
    objective(model, images(), torch.tensor([0, 1, 2])).loss.backward()
    assert model.head.shares.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())


def test_a_name_is_told_what_to_use():
    with pytest.raises(fv.UnsupportedModelError, match=r"fv\.SelfExplainingClassifier\('resnet18'\)"):
        fv.convert("resnet18")


@pytest.mark.parametrize("method", ["coalition_values", "joint"])
def test_coalitions_of_other_players_are_refused(method):
    """As many words hold the bits of 9 players and of 16."""
    model, bits = converted("class token"), fk.sample_coalitions(3, 2, 9, seed=0)
    with pytest.raises(ValueError, match=r"`coalitions` must be of the game's 16 players, but they are of 9"):
        getattr(model, method)(images(), fv.Coalitions(bits, 9))
