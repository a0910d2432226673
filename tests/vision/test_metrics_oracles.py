"""What other packages compute from the same numbers: scipy, scikit-learn, torchmetrics and Quantus."""

import numpy as np
import pytest
import quantus
import torch
from metric_games import linear_game
from scipy.integrate import trapezoid
from scipy.stats import pearsonr, sem
from sklearn.metrics import auc, mean_squared_error, r2_score
from torch import nn
from torch.utils.data import TensorDataset
from torchmetrics.functional import classification

import fastshap_vision as fv
from fastshap_vision import metrics

PLAYERS, CLASSES = 9, 4


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- removal -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, (0, 0.1, 0.5, 0.6, 1)])
@pytest.mark.parametrize("metric", [metrics.insertion, metrics.deletion])
def test_areas_are_scipys_and_scikit_learns(metric, levels):
    game = linear_game(normal(PLAYERS, CLASSES))
    images, attributions = normal(5, 1, 1, PLAYERS, seed=1), normal(5, PLAYERS, seed=2)
    score = metric(game, images, attributions, levels=levels)
    counts, heights = score.curve.counts.numpy(), score.curve.probability.numpy()
    width = counts.max() - counts.min()
    np.testing.assert_allclose(score.values, trapezoid(heights, counts, axis=1) / width, rtol=1e-12)
    np.testing.assert_allclose(score.values, [auc(counts, row) / width for row in heights], rtol=1e-12)


def test_the_curve_of_masked_images_is_that_of_pixel_flipping():
    """Order, masked pixels and probabilities of a network's deletion curve, by Quantus."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(144, 8), nn.Tanh(), nn.Linear(8, CLASSES)).eval()
    images, attributions = normal(3, 1, 12, 12).float(), normal(3, PLAYERS, seed=1).float()
    target = model(images).argmax(1)
    game = fv.MaskedImageGame(model, (3, 3), torch.zeros(1))
    score = metrics.deletion(game, images, attributions, target)
    pixels = attributions.view(3, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3)
    inputs = {"x_batch": images.numpy(), "y_batch": target.numpy(), "a_batch": pixels.numpy()}
    flipping = quantus.PixelFlipping(16, perturb_baseline=0.0, abs=False, normalise=False, disable_warnings=True)
    flipped = flipping(model, **inputs, device="cpu")
    np.testing.assert_allclose(score.curve.probability[:, 1:], flipped, rtol=1e-5)


def test_the_standard_error_is_scipys():
    score = metrics.Score(normal(7))
    assert score.standard_error == pytest.approx(sem(score.values), rel=1e-12)
    with_gaps = metrics.Score(torch.tensor([0.5, torch.nan, 1.0, 0.25]).double())
    assert with_gaps.standard_error == pytest.approx(sem(with_gaps.values, nan_policy="omit"), rel=1e-12)


# -- fidelity ----------------------------------------------------------------------------------------------


def test_fidelity_is_scikit_learns_and_scipys():
    game = linear_game(normal(PLAYERS, CLASSES), null=normal(CLASSES, seed=1))
    images = normal(6, 1, 1, PLAYERS, seed=2)
    exact = fv.exact_values(game, images)
    ours = exact.phi + 0.4 * normal(*exact.phi.shape, seed=3)
    game.shapley_values = lambda images: (ours, exact.grand)
    found = fv.fidelity(game, images, exact)
    assert found.r2 == pytest.approx(r2_score(exact.phi.flatten(), ours.flatten()), rel=1e-12)
    assert found.mean_squared_error == pytest.approx(mean_squared_error(exact.phi.flatten(), ours.flatten()), rel=1e-12)
    predicted = exact.grand.argmax(1)
    theirs, true = (values[torch.arange(6), :, predicted] for values in (ours, exact.phi))
    assert found.r2_predicted == pytest.approx(r2_score(true.flatten(), theirs.flatten()), rel=1e-12)
    correlations = [pearsonr(a, b).statistic for a, b in zip(true, theirs, strict=True)]
    assert found.correlation_predicted == pytest.approx(np.mean(correlations), rel=1e-12)
    assert found.correlation_predicted_standard_error == pytest.approx(sem(correlations), rel=1e-12)


# -- localisation and accuracy -----------------------------------------------------------------------------


def test_segmentation_is_torchmetrics():
    maps, masks = normal(5, 16, 20), normal(5, 16, 20, seed=1) > 0.3
    found = metrics.segmentation(maps, masks)
    # The object is where a map is above its own mean, scaled or not.
    marked = maps > maps.mean((1, 2), keepdim=True)
    each = classification.multiclass_jaccard_index(marked.long(), masks.long(), 2, average="none")
    assert found.mean_iou == pytest.approx(each.mean().item(), rel=1e-6)
    accuracy = classification.binary_accuracy(marked.long(), masks.long(), multidim_average="samplewise")
    torch.testing.assert_close(found.pixel_accuracy.values, accuracy.double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["classes", "yes or no of each", "one logit"])
def test_accuracy_is_torchmetrics(kind):
    logits = normal(50, 1 if kind == "one logit" else CLASSES).float()
    if kind == "classes":
        labels = torch.arange(50) % CLASSES
        expected = classification.multiclass_accuracy(logits, labels, CLASSES, average="micro")
    else:
        labels = (normal(*logits.shape, seed=1) > 0).long()
        expected = classification.binary_accuracy(logits.sigmoid().flatten(), labels.flatten())
    found = fv.evaluate(nn.Identity(), TensorDataset(logits, labels), batch_size=16)
    assert found.accuracy == pytest.approx(100 * expected.item(), rel=1e-6)
