"""Standard errors of explanations, and explanations that a few coalitions refine."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from vision_transformers import converted, image_size, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.models.refine import Calibration, calibrated, refined

PLAYERS, PAIRS = 12, 10


def linear_game(count, pairs=PAIRS, scale=0.3, noise=0.05, heavy=False, seed=0):
    """Explanations that are wrong by N(0, scale²), pairs of coalitions, their values, and the Shapley values."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    phi, error = normal(count, PLAYERS, 3), scale * normal(count, PLAYERS, 3)
    spread = 1 + heavy * normal(count, 1, 3).abs() * 3
    truth = phi + (error - error.mean(1, keepdim=True)) * spread
    bits = fk.sample_coalitions(count, 2 * pairs, PLAYERS, seed=seed)
    coalitions = fv.Coalitions(bits, PLAYERS, paired=True)
    odd = noise * spread * normal(count, pairs, 3)
    values = fk.unpack_bits(bits, PLAYERS).double() @ truth
    values[:, ::2] += odd  # (v(S) − v(Sᶜ))/2 is off by as much
    values[:, 1::2] -= odd
    return phi, coalitions, values, truth


def test_calibration_finds_what_the_errors_were_drawn_from():
    phi, coalitions, values, _ = linear_game(300)
    found = calibrated(phi, coalitions, values)
    assert found.ratio == pytest.approx((0.05 / 0.3) ** 2, rel=0.3)
    assert found.variance == pytest.approx([0.09] * 3, rel=0.1)
    assert found.freedom >= 32
    heavy = calibrated(*linear_game(300, heavy=True)[:3])
    assert heavy.freedom <= 11


def test_the_posterior_is_that_of_bayesian_linear_regression():
    phi, coalitions, values, _ = linear_game(2)
    calibration = Calibration(0.04, 1e9, (0.09,) * 3)  # one scale for all images
    found, error = refined(phi, coalitions, values, calibration, torch.tensor(calibration.variance))
    design = fk.unpack_bits(coalitions.bits[:, ::2], PLAYERS).double() - 0.5
    prior = 0.09 * (torch.eye(PLAYERS) - 1 / PLAYERS).double()
    left = (values[:, ::2] - values[:, 1::2]) / 2 - design @ phi
    gain = prior @ design.mT @ torch.linalg.inv(design @ prior @ design.mT + 0.04 * 0.09 * torch.eye(PAIRS).double())
    torch.testing.assert_close(found, phi + gain @ left)
    variance = (prior - gain @ design @ prior).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(error, variance.sqrt().unsqueeze(2).expand_as(error), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("pairs", [3, 10, 60])
def test_intervals_cover_as_often_as_they_say(pairs, heavy):
    """Of images that the calibration has not seen, of which some are harder."""
    calibration = calibrated(*linear_game(300, heavy=heavy)[:3])
    phi, coalitions, values, truth = linear_game(300, pairs, heavy=heavy, seed=1)
    found, error = refined(phi, coalitions, values, calibration, torch.tensor(calibration.variance))
    torch.testing.assert_close(found.sum(1), phi.sum(1))
    covered = ((found - truth).abs() <= 1.645 * error).double().mean()
    assert 0.87 <= covered <= 0.94
    assert (found - truth).square().mean() < (phi - truth).square().mean()


def test_errors_of_a_game_that_is_explained_whole_are_nothing():
    phi, coalitions, values, truth = linear_game(4, scale=0, noise=0)
    calibration = calibrated(phi, coalitions, values)
    found, error = refined(phi, coalitions, values, calibration, torch.tensor(calibration.variance))
    torch.testing.assert_close(found, truth)
    assert error.max() < 1e-10


KINDS = ["class token", "average pooling", "test_resnet"]


@pytest.mark.parametrize("kind", KINDS)
def test_refined_explanations_are_nearer_the_more_is_evaluated(kind):
    model, x = converted(kind), images(10, image_size(kind))
    model.calibrate(x[:8], coalitions=32)
    truth = fv.kernel_shap_values(model, x[8:], 2048).phi

    def error(evaluations):
        explanation = model.explain(x[8:], "all", evaluations=evaluations)
        assert explanation.efficiency_gap() < 1e-4
        assert explanation.evaluations == evaluations
        return float((explanation.values - truth).square().mean()), float(explanation.expected_error.mean())

    (before, expected), (some, less), (many, least) = error(0), error(32), error(256)
    assert many < some < before
    assert least < less < expected
    assert many < 0.2 * before


def test_an_image_is_explained_alike_in_any_batch():
    model, x = converted("class token"), images(4)
    model.calibrate(x, coalitions=16)
    together, alone = model.explain(x, 2, evaluations=16), model.explain(x[3:], 2, evaluations=16)
    torch.testing.assert_close(together.values[3:], alone.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.standard_error[3:], alone.standard_error, rtol=1e-3, atol=1e-6)
    everything = model.explain(x, "all", evaluations=16)
    torch.testing.assert_close(everything.values[..., 2], together.values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(everything.standard_error[..., 2], together.standard_error, rtol=1e-3, atol=1e-6)
    assert not torch.equal(model.explain(x, 2, evaluations=16, seed=1).values, together.values)


def test_the_calibration_is_saved_with_the_model(tmp_path):
    model, x = converted("class token"), images(4)
    assert model.explain(x).standard_error is None
    assert model.explain(x).expected_error is None
    model.calibrate(x, coalitions=16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["calibration"] == model.calibration.as_dict()
    loaded = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert loaded.calibration == copy.deepcopy(model).calibration == model.calibration
    assert torch.equal(loaded.explain(x, 1).standard_error, model.explain(x, 1).standard_error)


def test_train_explainer_calibrates_by_what_was_held_out():
    model, x = converted("class token"), images(24)
    data = torch.utils.data.TensorDataset(x, torch.zeros(24).long())
    result = fv.train_explainer(model, data, coalitions=16, mirror=False, epochs=2, progress=False)
    found = result.model.calibration
    assert len(found.variance) == model.num_classes
    explanation = result.model.explain(images(2), "all")
    spread = torch.tensor(found.variance).mul(1 - 1 / model.players).sqrt()
    torch.testing.assert_close(explanation.standard_error, spread.float().expand_as(explanation.values))


def test_training_takes_the_calibration_away():
    """It is that of another explainer then."""
    model, x = converted("class token"), images(4)
    model.calibrate(x, coalitions=16)
    data = torch.utils.data.TensorDataset(x, torch.zeros(4).long())
    fv.fit(model, data, objective=fv.JointObjective(2), epochs=1, batch_size=4, progress=False)
    assert model.calibration is None


def test_errors_stay_beside_their_values(tmp_path):
    model, x = converted("class token"), images(4)
    model.calibrate(x, coalitions=16)
    explanation = model.explain(x, evaluations=16)
    explanation.save(tmp_path / "x.safetensors")
    loaded = fv.Explanation.load(tmp_path / "x.safetensors")
    assert torch.equal(loaded.standard_error, explanation.standard_error)
    assert loaded.evaluations == 16
    assert torch.equal(loaded[2].standard_error, explanation.standard_error[2:3])
    assert loaded.to(torch.float64).standard_error.dtype == torch.float64
    expected = explanation.standard_error.square().sum(1).sqrt()
    torch.testing.assert_close(explanation.expected_error, expected)
    with pytest.raises(ValueError, match="`standard_error` must be"):
        replace(explanation, standard_error=expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluations": 16}, r"`evaluations` must be 0 for a model without a calibration.*model.calibrate\(images\)"),
        ({"evaluations": 3}, "`evaluations` must be even"),
        ({"evaluations": -2}, "`evaluations` must be a whole number"),
        ({"evaluations": 2, "seed": -1}, "`seed` must be a whole number"),
    ],
)
def test_what_can_not_be_refined_is_said(options, message):
    with pytest.raises(ValueError, match=message):
        converted("class token").explain(images(), **options)


@pytest.mark.parametrize(
    "calibration",
    [
        {"ratio": 1.0},
        {"ratio": 0.0, "freedom": 4.0, "variance": [1.0] * 7},
        {"ratio": 1.0, "freedom": 2.0, "variance": [1.0] * 7},
        {"ratio": 1.0, "freedom": 4.0, "variance": [float("nan")] * 7},
        {"ratio": 1.0, "freedom": 4.0, "variance": [1.0] * 3},
        {"ratio": "1", "freedom": 4.0, "variance": "x"},
        [1.0],
    ],
)
def test_calibrations_that_are_none_are_refused(calibration):
    with pytest.raises((ValueError, TypeError), match="alibration"):
        converted("class token", calibration=calibration)
