"""An image tower's scores of texts: against the formula, other transformers' masks, brute force and other texts."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize
from vision_transformers import images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games.mask_attention import MaskedAttention

SMALL = {"img_size": 24, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
WIDTH = 12
TOWERS = {
    "CLIP": ("vit_base_patch16_clip_quickgelu_224", WIDTH, SMALL),
    "SigLIP": ("vit_base_patch16_siglip_224", 0, SMALL),
    "SigLIP, averaged": ("vit_base_patch16_siglip_gap_224", 0, SMALL),
    "EVA-02 CLIP": ("eva02_base_patch16_clip_224", WIDTH, SMALL),
    "ConvNeXt CLIP": ("convnext_atto", WIDTH, {}),
}
SCALE, BIAS = 2.5, -1.5


def tower(kind):
    name, width, options = TOWERS[kind]
    return network(name, width, **options)


def size(kind):
    return 96 if kind == "ConvNeXt CLIP" else 24


def texts(number, width, seed=0):
    return 3 * torch.randn(number, width, generator=torch.Generator().manual_seed(seed))


def scores(embedding, texts):
    """As CLIP and SigLIP write them."""
    image, text = (x / x.norm(p=2, dim=-1, keepdim=True) for x in (embedding, texts))
    return image @ text.T * math.exp(SCALE) + BIAS


@pytest.fixture(scope="module", params=TOWERS)
def pair(request):
    """A tower as it was, and what explains it, its shares not 0."""
    backbone = tower(request.param)
    width = backbone.num_classes or backbone.num_features
    model = fv.convert(
        copy.deepcopy(backbone),
        texts=texts(3, width),
        logit_scale=torch.tensor(SCALE),
        logit_bias=BIAS,
        img_size=size(request.param) if request.param == "ConvNeXt CLIP" else None,
    )
    return backbone, with_shares(model)


@pytest.fixture
def pictures(pair):
    return images(2, pair[1].game.input_size[1])


def width_of(model):
    return model.texts.shape[1]


@torch.no_grad()
def test_logits_are_the_formula_of_clip_and_siglip(pair, pictures):
    backbone, model = pair
    expected = scores(backbone(pictures), texts(3, width_of(model)))
    torch.testing.assert_close(model(pictures), expected, rtol=1e-5, atol=1e-5)
    others = texts(5, width_of(model), seed=1)
    torch.testing.assert_close(model(pictures, others), scores(backbone(pictures), others), rtol=1e-5, atol=1e-5)
    assert model(pictures).shape == (2, 3)


@torch.no_grad()
def test_coalitions_are_the_scores_of_the_towers_game(pair, pictures):
    backbone, model = pair
    bits = fk.sample_coalitions(2, 4, model.players, seed=0)
    size = None if backbone.default_cfg.get("fixed_input_size") else model.game.input_size[1:]
    given = copy.deepcopy(backbone)
    if not given.num_classes:
        given.reset_classifier(width_of(model))
        given.head.weight.copy_(torch.eye(width_of(model)))
        given.head.bias.zero_()
    embedding = fv.convert(given, img_size=size)
    expected = scores(embedding.coalition_values(pictures, bits), texts(3, width_of(model)))
    torch.testing.assert_close(model.coalition_values(pictures, bits), expected, rtol=1e-4, atol=1e-4)
    found = model.joint(pictures, bits)
    torch.testing.assert_close(found.values, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.logits, model(pictures), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["CLIP", "SigLIP", "EVA-02 CLIP"])
def test_packed_tokens_and_masked_attention_are_one_game(kind):
    backbone = tower(kind)
    width = backbone.num_classes or backbone.num_features
    model = fv.convert(backbone, texts=texts(3, width), logit_scale=SCALE)
    bits = fk.sample_coalitions(2, 6, model.players, seed=0)
    pictures = images(2, 24)
    assert model.game.packs
    packed = model.coalition_values(pictures, bits)
    model.game.embedding = MaskedAttention(model.backbone, False)
    torch.testing.assert_close(model.coalition_values(pictures, bits), packed, rtol=1e-4, atol=1e-4)


def test_values_add_up_to_the_score_without_that_of_nothing(pair, pictures):
    _, model = pair
    nothing = model.coalition_values(pictures, torch.zeros(2, 1, 1, dtype=torch.int32))
    for new in (None, texts(5, width_of(model), seed=1)):
        explanation = model.explain(pictures, "all", texts=new)
        assert explanation.efficiency_gap() < 1e-5
        assert explanation.values.std() > 1e-3  # the shares are not 0
        torch.testing.assert_close(explanation.logits, model(pictures, new))
    null = model.explain(pictures, "all").null
    torch.testing.assert_close(nothing[:, 0], null.expand(2, -1), rtol=1e-4, atol=1e-4)


def test_texts_of_one_call_leave_no_trace(pair, pictures):
    _, model = pair
    before = model.explain(pictures, "all")
    new = texts(4, width_of(model), seed=2)
    assert model.explain(pictures, 3, texts=new).values.shape == (2, model.players)
    assert model.coalition_values(pictures, torch.zeros(2, 1, 1, dtype=torch.int32), texts=new).shape == (2, 1, 4)
    with pytest.raises(ValueError, match="target"):
        model.explain(pictures, 4, texts=new)
    after = model.explain(pictures, "all")
    assert torch.equal(before.values, after.values)
    assert torch.equal(before.null, after.null)
    assert model.num_classes == 3


def test_texts_that_are_set_are_explained(pictures, pair):
    model = copy.deepcopy(pair[1])
    model.calibration = fv.Calibration(0.5, 8.0, (0.1,) * 3)
    assert model.explain(pictures).standard_error is not None
    new = texts(5, width_of(model), seed=1)
    expected = model.explain(pictures, "all", texts=new)
    assert expected.standard_error is None  # error bars are of the texts that were calibrated
    model.texts = new
    assert torch.equal(model.explain(pictures, "all").values, expected.values)
    assert model.calibration is None
    assert model(pictures).shape == (2, 5)
    assert model.game.vote_weight()[0].shape[0] == 5
    assert model.explain(pictures[:0], "all").values.shape == (0, model.players, 5)


def test_an_embedding_explained_once_explains_every_text(pair, pictures):
    _, model = pair
    explained = model.explain_embedding(pictures)
    unit = normalize(model.backbone(pictures), dim=1)
    assert explained.values.shape == (2, model.players, width_of(model))
    torch.testing.assert_close(
        explained.values.sum(1) + explained.explanation.null, unit.detach(), rtol=1e-4, atol=1e-5
    )
    for target in (None, 1, "all", [1, 0]):
        new = texts(4, width_of(model), seed=3)
        found, expected = explained.of(new, target), model.explain(pictures, target, texts=new)
        torch.testing.assert_close(found.values, expected.values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.null, expected.null, rtol=1e-4, atol=1e-4)
        assert found.efficiency_gap() < 1e-5
        assert target == "all" or torch.equal(found.target, expected.target)


def test_shapley_values_are_linear_in_the_text():
    """The norm is inside the game: exact values of the unit embedding, times a text, are those of its score."""
    model = fv.convert(tower("CLIP"), texts=torch.eye(WIDTH))
    pictures = images(1, 24)
    of_embedding = fv.exact_values(model, pictures)
    new = texts(3, WIDTH, seed=4)
    scored = fv.convert(model.backbone, texts=new, logit_scale=SCALE, logit_bias=BIAS)
    expected = of_embedding.phi @ normalize(new, dim=1).double().T * math.exp(SCALE)
    torch.testing.assert_close(fv.exact_values(scored, pictures).phi, expected, rtol=1e-4, atol=1e-4)


def test_an_explainer_trained_on_the_dimensions_explains_texts_that_it_never_saw():
    torch.manual_seed(0)
    model = fv.convert(tower("CLIP"), texts=torch.eye(WIDTH))
    pictures = images(64, 24)
    new = texts(4, WIDTH, seed=5)
    exact = fv.exact_values(fv.convert(model.backbone, texts=new), pictures[:4]).phi
    even = model.explain(pictures[:4], "all", texts=new).values
    data = torch.utils.data.TensorDataset(pictures, torch.zeros(64, dtype=torch.int64))
    fv.train_explainer(model, data, coalitions=32, mirror=False, epochs=12, warmup_epochs=0, progress=False)
    assert model.calibration is not None
    model.texts = new
    found = model.explain(pictures[:4], "all").values
    assert (found - exact).square().sum() < 0.5 * (even - exact).square().sum()
    model.calibrate(pictures[:16], coalitions=64)
    refined = model.explain(pictures[:4], "all", evaluations=256)
    assert (refined.values - exact).square().sum() < 0.9 * (found - exact).square().sum()
    assert refined.expected_error.shape == (4, 4)


def test_texts_are_classes_of_a_training(pictures, pair):
    model = copy.deepcopy(pair[1])
    before = [parameter.clone() for parameter in model.backbone.parameters()]
    data = torch.utils.data.TensorDataset(pictures, torch.tensor([2, 0]))
    result = fv.fit(
        model, data, objective=fv.JointObjective(coalitions=2), epochs=1, batch_size=2, lr=1e-3, progress=False
    )
    assert math.isfinite(result.history[0]["loss"])
    assert not all(map(torch.equal, before, model.backbone.parameters()))
    assert model.explain(pictures).efficiency_gap() < 1e-5


def test_the_pass_of_nothing_runs_once_for_all_texts(monkeypatch):
    model = fv.convert(tower("CLIP"), texts=texts(3, WIDTH)).eval()
    model.explain(images(1, 24))
    monkeypatch.setattr(model.game.embedding, "null", lambda: pytest.fail("it ran again"))
    model.explain(images(1, 24), texts=texts(2, WIDTH, seed=1))
    model.texts = texts(4, WIDTH, seed=2)
    model.explain_embedding(images(1, 24))


@pytest.mark.slow
def test_a_forward_pass_compiles_whole():
    model = fv.convert(tower("CLIP"), texts=texts(3, WIDTH), logit_scale=SCALE)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(2, 24)), model(images(2, 24)))


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_a_saved_model_has_its_texts(kind, tmp_path):
    backbone = tower(kind)
    width = backbone.num_classes or backbone.num_features
    model = with_shares(fv.convert(backbone, texts=texts(3, width), logit_scale=SCALE, logit_bias=BIAS))
    model.save_pretrained(tmp_path)
    loaded = fv.ImageTextClassifier.from_pretrained(tmp_path)
    found, expected = (each.explain(images(2, 24), "all") for each in (loaded, model))
    torch.testing.assert_close(found.values, expected.values)
    torch.testing.assert_close(found.logits, expected.logits)
    with pytest.raises(ValueError, match=r"set `model.texts`"):
        fv.ImageTextClassifier.from_pretrained(tmp_path, texts=texts(2, width))
    with pytest.raises(ValueError, match=r"load it with fastshap_vision.ImageTextClassifier"):
        fv.SelfExplainingClassifier.from_pretrained(tmp_path)


def test_a_recording_is_of_its_texts(tmp_path):
    model = fv.convert(tower("CLIP"), texts=texts(3, WIDTH))
    data = torch.utils.data.TensorDataset(images(4, 24), torch.zeros(4, dtype=torch.int64))
    options = {"coalitions": 4, "output": tmp_path / "recorded", "progress": False}
    assert fv.record_coalitions(model, data, **options).rows([0])["values"].shape == (1, 4, 3)
    model.texts = texts(3, WIDTH, seed=1)
    with pytest.raises(ValueError, match="another recording"):
        fv.record_coalitions(model, data, **options)
    with pytest.raises(ValueError, match="'values' for this model"):
        fv.record_coalitions(model, data, coalitions=4, store="features")


def test_scores_of_half_precision_are_float32():
    model = fv.convert(tower("CLIP").to(torch.bfloat16), texts=texts(3, WIDTH), logit_scale=SCALE)
    found = model.explain(images(2, 24).bfloat16(), "all")
    assert found.logits.dtype == torch.float32
    assert found.efficiency_gap() < 1e-5


def test_a_copy_has_scores_of_its_own():
    model = fv.convert(tower("CLIP"), texts=texts(3, WIDTH))
    twin = copy.deepcopy(model)
    twin.texts = texts(2, WIDTH)
    assert twin.game.scores is twin.scores
    assert model(images(1, 24)).shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"texts": torch.randn(3, 5)}, r"`texts` must be floating-point text features \(K, 12\)"),
        ({"texts": torch.zeros(3, WIDTH)}, "no text 0"),
        ({"texts": torch.full((1, WIDTH), math.nan)}, "NaN"),
        ({"texts": torch.ones(3, WIDTH, dtype=torch.int64)}, "floating-point"),
        ({"texts": torch.randn(WIDTH)}, r"\(K, D\)|\(K, 12\)"),
        ({"texts": texts(3, WIDTH), "logit_scale": 100.0}, r"math.log\(100\)"),
        ({"texts": texts(3, WIDTH), "logit_bias": math.inf}, "finite number"),
        ({"texts": texts(3, WIDTH), "head": "votes"}, "head"),
        ({"logit_scale": SCALE}, "`logit_scale` must be given with `texts`"),
        ({"logit_bias": torch.tensor(BIAS)}, "`logit_bias` must be given with `texts`"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        fv.convert(tower("CLIP"), **options)


def test_the_examples_of_the_documentation_run():
    text = (Path(__file__).parents[2] / "docs" / "image-text.md").read_text()
    names = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        if "import open_clip" in block:
            pytest.importorskip("open_clip")
        exec(block, names)
    assert names["explanation"].values.shape == (2, 16, 1000)
    assert names["pair"].words == [["a", "red", "dog"], ["two", "boats"]]
