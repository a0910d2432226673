import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import timm
import torch

import fastshap_vision as fv
from fastshap_vision.explanations.as_captum import Attribution
from fastshap_vision.explanations.explanation import Explanation

GRID, CLASSES = (2, 3), 4


class FixedModel:
    """Explains images with values that do not depend on them."""

    def __init__(self, generator):
        self.values = torch.randn(2, 6, CLASSES, generator=generator, requires_grad=True)
        self.null = torch.randn(CLASSES, generator=generator)

    def explain(self, images, target=None):
        logits = self.values.sum(1) + self.null
        if isinstance(target, str):
            return Explanation(self.values, logits, None, GRID, self.null)
        chosen = logits.argmax(-1) if target is None else torch.as_tensor(target).expand(2)
        picked = self.values[torch.arange(2), :, chosen]
        return Explanation(picked, logits, chosen, GRID, self.null)


@pytest.fixture
def model(generator):
    return FixedModel(generator)


@pytest.fixture
def shap(monkeypatch):
    """Stands in for the package: records what shap.Explanation is given."""
    module = ModuleType("shap")
    module.Explanation = lambda values, **rest: SimpleNamespace(values=values, **rest)
    monkeypatch.setitem(sys.modules, "shap", module)


@pytest.mark.parametrize("target", [None, 3, [0, 2], torch.tensor([1, 3])])
def test_attribution_keeps_the_sum_of_every_patch(model, target):
    images = torch.randn(2, 3, 4, 15)
    out = Attribution(model).attribute(images, target=target)
    assert out.shape == images.shape
    assert out.dtype == images.dtype
    assert not out.requires_grad
    explanation = model.explain(images, None if target is None else torch.as_tensor(target))
    patches = out.unflatten(3, (3, 5)).unflatten(2, (2, 2))
    assert torch.allclose(patches.sum((1, 3, 5)).flatten(1), explanation.values, atol=1e-6)
    # Spread evenly: every pixel and channel of a patch has the same share.
    assert torch.equal(out.amax(1), out.amin(1))
    assert torch.equal(patches.amax((3, 5)), patches.amin((3, 5)))


def test_attribution_takes_and_gives_captums_tuples(model):
    images = torch.randn(2, 3, 4, 15)
    expected = Attribution(model).attribute(images, target=1)
    for baselines in (None, (None,)):
        (out,) = Attribution(model).attribute((images,), baselines, target=1)
        assert torch.equal(out, expected)
    for inputs in ((images, images), (), [None], "images", images[0], images.int()):
        with pytest.raises((ValueError, TypeError), match=r"Attribution\.attribute: argument `inputs` must be"):
            Attribution(model).attribute(inputs)


def test_captums_metrics_run():
    metrics = pytest.importorskip("captum.metrics")
    torch.manual_seed(0)
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 5}
    model = fv.convert(timm.create_model("vit_tiny_patch16_224", **options)).eval()
    torch.nn.init.normal_(model.head.shares.weight)
    images = torch.randn(2, 3, 16, 16)
    found = metrics.sensitivity_max(Attribution(model).attribute, images, target=1, n_perturb_samples=2)
    assert found.shape == (2,)
    assert found.min() > 0


def test_half_precision_spreads_what_it_has():
    """1e-4 over 3 channels of 56 x 56 pixels is 1e-8, which float16 rounds to 0."""
    logits = torch.zeros(1, 4, dtype=torch.float16)
    one = Explanation(torch.full((1, 6), 1e-4).half(), logits, torch.zeros(1).long(), GRID, logits[0])

    class Half:
        def explain(self, images, target=None):
            return one

    out = Attribution(Half()).attribute(torch.zeros(1, 3, 112, 168).half())
    assert out.dtype == torch.float32
    assert out.double().sum() == pytest.approx(6e-4, rel=1e-3)


def test_pixels_that_the_model_does_not_see_get_nothing(shap):
    """EVA-02 with patches of 14 sees 28 of 32 pixels."""
    torch.manual_seed(0)
    options = {"img_size": 32, "embed_dim": 48, "depth": 1, "num_heads": 3, "num_classes": 5}
    model = fv.convert(timm.create_model("eva02_tiny_patch14_224", **options)).eval()
    torch.nn.init.normal_(model.head.shares.weight)
    images = torch.randn(2, 3, 32, 32)
    explanation = model.explain(images)
    out = Attribution(model).attribute(images)
    patches = out[:, :, :28, :28].unflatten(3, (2, 14)).unflatten(2, (2, 14)).sum((1, 3, 5)).flatten(1)
    assert torch.allclose(patches, explanation.values, atol=1e-6)
    assert out[:, :, 28:].abs().sum() == out[..., 28:].abs().sum() == 0
    assert numpy.allclose(explanation.as_shap(images).values, out.permute(0, 2, 3, 1), atol=1e-6)
    # What stands there changes nothing, so it has no part in the values.
    images[:, :, 28:] = 9.0
    assert torch.equal(model.explain(images).values, explanation.values)


def test_attribution_refuses_baselines(model):
    with pytest.raises(ValueError, match=r"Attribution\.attribute: argument `baselines` must be None"):
        Attribution(model).attribute(torch.zeros(2, 3, 4, 15), torch.zeros(2, 3, 4, 15))


def test_attribution_names_a_grid_that_does_not_divide(model):
    with pytest.raises(ValueError, match=r"`images` must be of a size that the grid \(2, 3\) divides"):
        Attribution(model).attribute(torch.zeros(2, 3, 5, 15))


def test_shap_of_patches_and_every_class(model, shap):
    explanation = model.explain(None, "all")
    exported = explanation.as_shap(classes=["cat", "dog", "hen", "owl"])
    assert exported.values.shape == (2, 6, CLASSES)
    assert exported.values.sum(1) + exported.base_values == pytest.approx(explanation.logits.detach().numpy(), abs=1e-5)
    assert exported.output_names == ["cat", "dog", "hen", "owl"]
    assert exported.feature_names[4] == "patch (1, 1)"


def test_shap_of_patches_and_one_class(model, shap):
    explanation = model.explain(None, torch.tensor([3, 1]))
    exported = explanation.as_shap()
    assert exported.values.shape == (2, 6)
    assert exported.base_values == pytest.approx(model.null[[3, 1]].numpy())
    assert exported.output_names is None


@pytest.mark.parametrize("target", ["all", 2])
def test_shap_of_pixels(model, shap, target):
    images = torch.randn(2, 3, 4, 15)
    explanation = model.explain(images, target)
    exported = explanation.as_shap(images)
    assert numpy.array_equal(exported.data, images.permute(0, 2, 3, 1).double().numpy())
    assert exported.values.shape[:4] == exported.data.shape
    sums = exported.values.sum((1, 2, 3)) + exported.base_values
    expected = explanation.logits if target == "all" else explanation.logits[:, 2]
    assert sums == pytest.approx(expected.detach().numpy(), abs=1e-5)


def test_shap_names_bad_input(model, shap):
    explanation = model.explain(None, "all")
    with pytest.raises(ValueError, match="`classes` must be 4 names"):
        explanation.as_shap(classes=["cat"])
    with pytest.raises(ValueError, match=r"`images` must be \(2, C, H, W\)"):
        explanation.as_shap(torch.zeros(3, 3, 4, 15))
    with pytest.raises(TypeError, match=r"`images`.*model\.preprocess"):
        explanation.as_shap(["image.png"])


def test_without_shap_the_package_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "shap", None)
    with pytest.raises(ModuleNotFoundError, match="pip install shap"):
        model.explain(None, "all").as_shap()
