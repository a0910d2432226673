import copy
import json

import pytest
import timm
import torch
from vision_transformers import CONVOLUTIONAL, SMALL, VISION_TRANSFORMERS, VOTING, create, images

import fastshap_kernels as fk
import fastshap_vision as fv

KINDS = (*VISION_TRANSFORMERS, *CONVOLUTIONAL)


def size(kind):
    return 32 if kind in VISION_TRANSFORMERS else 64


def trained(kind, **options):
    """A converted model whose shares are not zero."""
    model = fv.convert(create(kind), img_size=size(kind), **options).eval()
    if hasattr(model, "shares"):
        torch.nn.init.normal_(model.shares.weight, std=0.1)
    return model


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_efficiency(kind, head):
    """Shapley values add up to the logits less v of nobody, in one forward pass and in the coalition pass."""
    model, x = trained(kind, head=head), images(size=size(kind))
    phi, logits = model.shapley_values(x)
    gap = phi.sum(1) - (logits - model.null_value())
    assert gap.abs().max() <= 1e-5 * logits.abs().max()
    everybody = fk.pack_bits(torch.ones(3, 1, model.players, dtype=torch.bool))
    assert (model.coalition_values(x, everybody)[:, 0] - logits).abs().max() <= 1e-5 * logits.abs().max()
    if head == "votes":
        assert torch.equal(model.null_value(), torch.zeros(7))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_shares_leave_the_logits_bit_identical(kind):
    backbone, x = create(kind), images(size=size(kind))
    before = backbone(x)
    model = fv.convert(backbone, img_size=size(kind)).eval()
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
    backbone, x = create(kind), images(size=size(kind))
    before = backbone(x)
    model = fv.convert(backbone, img_size=size(kind), head="votes").eval()
    assert model.is_exact_conversion is exact
    assert torch.allclose(model(x), before, atol=1e-5) is exact


@pytest.mark.parametrize("kind", ["resnet18", "convnext_atto"])
@torch.no_grad()
def test_pixel_removal_plays_the_defined_game(kind):
    model, x = trained(kind), images(size=64)
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
    model, x = trained(kind, **options), images(size=size(kind))
    bits = fk.sample_coalitions(3, 4, model.players, seed=0)
    values, null = torch.randn(3, 4, 7), model.null_value().detach()
    features, logits = model.game.features_and_logits(x)
    pooled = model.regression_loss(features, logits, bits, values, null)
    phi = model._phi(features, logits if options["head"] == "votes" else logits.detach(), null)
    explicit = fk.shapley_regression_loss(phi, bits, values, null)
    assert torch.allclose(pooled, explicit, rtol=1e-5)
    parameter = model.shares.weight if options["head"] == "shares" else model.backbone.get_classifier().weight
    ours, theirs = (torch.autograd.grad(loss, parameter, retain_graph=True)[0] for loss in (pooled, explicit))
    assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["class token", "average pooling", "resnet18"])
def test_shares_regression_never_moves_the_classifier(kind):
    """Logits and base are detached, and backbone_gradient = 0 keeps the regression out of the encoder."""
    for gamma in (0.0, 1.0):
        model, x = trained(kind, backbone_gradient=gamma), images(size=size(kind))
        bits = fk.sample_coalitions(3, 4, model.players, seed=0)
        features, logits = model.game.features_and_logits(x)
        model.regression_loss(features, logits, bits, torch.randn(3, 4, 7), model.null_value().detach()).backward()
        assert model.shares.weight.grad.abs().sum() > 0
        assert model.backbone.get_classifier().weight.grad is None
        moved = sum(float(p.grad.abs().sum()) for p in model.backbone.parameters() if p.grad is not None)
        assert (moved > 0) == (gamma > 0)


def test_explain_targets():
    model, x = trained("class token"), images()
    everything = model.explain(x, "all")
    assert everything.values.shape == (3, 16, 7)
    assert everything.target is None
    predicted = model.explain(x)
    assert torch.equal(predicted.target, everything.logits.argmax(1))
    for b, k in enumerate(predicted.target):
        assert torch.equal(predicted.values[b], everything.values[b, :, k])
    assert torch.equal(model.explain(x, 2).values, everything.values[..., 2])
    assert torch.equal(model.explain(x, torch.tensor([0, 1, 2])).values[1], everything.values[1, :, 1])


def test_explain_gives_each_module_its_own_mode_back():
    model = trained("resnet18").train()
    model.backbone.layer1.eval()
    before = copy.deepcopy(model.state_dict())
    model.explain(images(size=64))
    assert model.training
    assert not model.backbone.layer1.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@torch.no_grad()
def test_coalition_values_do_not_depend_on_chunks():
    model, x = trained("class token"), images()
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
    model, x = trained(kind, **options), images(size=size(kind))
    model.save_pretrained(tmp_path / "model")
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(again.explain(x, "all").values, model.explain(x, "all").values)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("kind", "options"), [("class token", {}), ("resnet18", {}), ("resnet18", {"removal": "feature"})]
)
def test_a_checkpoint_keeps_its_removal(tmp_path, kind, options):
    """What was chosen is written down; checkpoints from before there was a choice play what was played then."""
    model = trained(kind, **options)
    expected = options.get("removal", "drop" if kind == "class token" else "pixel")
    assert model.removal == model.config["removal"] == expected
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path).eval()
    assert again.removal == expected
    x = images(size=size(kind))
    bits = fk.sample_coalitions(3, 2, model.players, seed=0)
    assert torch.equal(again.coalition_values(x, bits), model.coalition_values(x, bits))
    config = json.loads((tmp_path / "config.json").read_text())
    del config["removal"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert older.removal == ("drop" if kind == "class token" else "pixel")


@pytest.mark.parametrize("damage", ["truncated", "missing", "other shape"])
def test_unreadable_checkpoint(tmp_path, damage):
    folder = tmp_path / "model"
    trained("class token").save_pretrained(folder)
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
    model = trained("class token")
    assert model.no_weight_decay() >= {"backbone.pos_embed", "backbone.cls_token"}
    assert model.no_weight_decay() & dict(model.named_parameters()).keys()
    assert trained("resnet18").no_weight_decay() == set()


def test_deep_copies_are_independent():
    """As an exponential moving average makes them."""
    model = trained("class token")
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
            "global averaging.*Supported: timm",
        ),
        (lambda: fv.convert(timm.create_model("pit_ti_224", num_classes=7)), r"1 token\(s\).*no grid.*Supported: timm"),
        (lambda: fv.convert(timm.create_model("crossvit_9_240", num_classes=7)), "neither in a.*Supported: timm"),
        (lambda: fv.convert(timm.create_model("resnet18", in_chans=4), img_size=(64, 0)), "computes no features"),
        (lambda: trained("class token", head="vote"), "`head` must be one of 'shares', 'votes'"),
        (lambda: trained("class token", base="votes"), "`base` can be 'votes'"),
        (lambda: trained("class token", removal="blur"), "`removal` must be one of 'drop', 'pixel', 'feature'"),
        (lambda: trained("class token", removal="feature"), "`removal` can be 'feature' for convolutional networks"),
        (lambda: trained("resnet18", removal="drop"), "ResNet can't play by token dropping.*removal='pixel'"),
        (lambda: trained("class token", head_depth=3), "`head_depth` must be one of 0, 1, 2"),
        (lambda: trained("class token", backbone_gradient=2.0), "`backbone_gradient`"),
        (lambda: fv.convert(create("resnet18"), img_size=65), "does not divide the image size"),
        (lambda: trained("class token").explain(images(size=16)), r"`images` must be a tensor \(B, 3, 32, 32\)"),
        (lambda: trained("class token").explain(images() * float("nan")), "NaN"),
        (lambda: trained("class token").explain(images().to("meta")), r"`images`.*device, cpu.*meta.*to\('cpu'\)"),
        (lambda: trained("class token").explain(images().double()), r"`images` must be torch.float32.*float64"),
        (lambda: trained("class token").explain(images(), 7), "`target`"),
        (lambda: trained("class token").explain(images(), "best"), "`target`"),
        (lambda: trained("class token").coalition_values(images(), torch.zeros(3, 2, 2, dtype=torch.int32)), "`bits`"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
