import sys
from types import ModuleType, SimpleNamespace

import numpy
import pytest
import torch

from fastshap_vision.explanation import Explanation
from fastshap_vision.interoperability import Attribution

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


def test_without_shap_the_package_is_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "shap", None)
    with pytest.raises(ModuleNotFoundError, match="pip install shap"):
        model.explain(None, "all").as_shap()
