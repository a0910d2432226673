import json
import math

import pytest
import torch
from torch import nn

from fastshap_kernels import unpack_bits
from fastshap_vision import Attribution, SelfExplainingClassifier
from fastshap_vision.estimators.exact import exact_values
from fastshap_vision.estimators.kernel_shap import kernel_shap_values
from fastshap_vision.metrics.fidelity import fidelity

CLASSES = 3


class QuadraticGame(nn.Module):
    """v_x(S) = null + Σ_{p∈S} a_p x_p + Σ_{p,q∈S} x_p Q_pq x_q, whose Shapley values are known.

    φ_p = a_p x_p + Q_pp x_p² + ½ Σ_{q≠p} x_p (Q_pq + Q_qp) x_q. Its own explanation is `distort(φ)`.
    """

    def __init__(self, players, distort=lambda phi: phi, interaction=0.3, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.players, self.distort = players, distort
        self.null = torch.randn(CLASSES, generator=generator, dtype=torch.float64)
        self.linear = torch.randn(players, CLASSES, generator=generator, dtype=torch.float64)
        self.pairs = interaction * torch.randn(players, players, CLASSES, generator=generator, dtype=torch.float64)
        self.asked = []

    def phi(self, images):
        x = images.double().flatten(1)
        half = (self.pairs + self.pairs.transpose(0, 1)) / 2
        return x.unsqueeze(2) * (self.linear + torch.einsum("pqk,bq->bpk", half, x))

    def shapley_values(self, images):
        assert not self.training
        assert not torch.is_grad_enabled()
        return self.distort(self.phi(images)), self.phi(images).sum(1) + self.null

    def coalition_values(self, images, bits):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert bits.shape[0] == len(images)
        z = unpack_bits(bits, self.players)
        self.asked.append(z)
        present = z * images.double().flatten(1).unsqueeze(1)
        quadratic = torch.einsum("bmp,pqk,bmq->bmk", present, self.pairs, present)
        return self.null + present @ self.linear + quadratic


class CubicGame(QuadraticGame):
    """Adds w · (Σ_{p∈S} x_p)³: with pairs of complements, KernelSHAP leaves no error in a quadratic game.

    φ_p of (Σ x)³ is x_p³ + 3/2 x_p² R + 3/2 x_p Σ_{q≠p} x_q² + 2 x_p Σ_{q<r≠p} x_q x_r, R = Σ_{q≠p} x_q: each
    product is shared evenly by the players in it.
    """

    weight = 0.2

    def phi(self, images):
        x = images.double().flatten(1)
        rest, squares = x.sum(1, keepdim=True) - x, x.square().sum(1, keepdim=True) - x.square()
        cubic = x**3 + 1.5 * x**2 * rest + 1.5 * x * squares + x * (rest.square() - squares)
        return super().phi(images) + self.weight * cubic.unsqueeze(2)

    def coalition_values(self, images, bits):
        total = (unpack_bits(bits, self.players) * images.double().flatten(1).unsqueeze(1)).sum(2, keepdim=True)
        return super().coalition_values(images, bits) + self.weight * total**3


def images_for(players, batch, seed=1):
    return torch.randn(batch, 1, 1, players, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("batch", [7, 64, 10_000])
@pytest.mark.parametrize("players", [1, 2, 6])
@pytest.mark.parametrize("game", [QuadraticGame, CubicGame])
def test_exact_values_are_exact(game, players, batch):
    model, images = game(players), images_for(players, 3)
    exact = exact_values(model, images, batch=batch)
    assert exact.phi.dtype == torch.float64
    assert (exact.phi - model.phi(images)).abs().max() < 1e-12
    assert (exact.null - model.null).abs().max() < 1e-12
    assert (exact.grand - model.null - model.phi(images).sum(1)).abs().max() < 1e-12
    assert exact.standard_error is None
    assert exact.evaluations == 3 * 2**players


def test_every_coalition_is_asked_once_the_smaller_first():
    model = QuadraticGame(6)
    exact_values(model, images_for(6, 2), batch=10)
    asked = torch.cat(model.asked, 1)[0]
    assert all(part.shape[1] <= 10 for part in model.asked)
    for image in asked.split(64):
        sizes = image.sum(1)
        assert (sizes.diff() >= 0).all()
        assert len(image.unique(dim=0)) == 64


def test_kernel_shap_is_exact_for_an_additive_game():
    model, images = QuadraticGame(9, interaction=0.0), images_for(9, 2)
    estimate = kernel_shap_values(model, images, coalitions=100, seed=3)
    assert (estimate.phi - model.phi(images)).abs().max() < 1e-9
    assert estimate.standard_error.max() < 1e-9
    assert estimate.evaluations == 2 * 102


def test_kernel_shap_converges_as_its_standard_errors_say():
    model, images = CubicGame(10), images_for(10, 4)
    exact = exact_values(model, images).phi
    errors = []
    for coalitions in (250, 4000):
        estimate = kernel_shap_values(model, images, coalitions, seed=5)
        z = (estimate.phi - exact) / estimate.standard_error
        assert 0.7 < z.square().mean().sqrt() < 1.4
        errors.append((estimate.phi - exact).square().mean().sqrt())
    assert errors[1] < errors[0] / 2.5  # a quarter is expected
    assert errors[1] < 0.05 * exact.std()


def test_kernel_shap_does_not_depend_on_the_batch():
    model, images = CubicGame(8), images_for(8, 3)
    together = kernel_shap_values(model, images, 200, seed=5, batch=33)
    alone = kernel_shap_values(model, images[:1], 200, seed=5)
    assert torch.allclose(together.phi[:1], alone.phi, rtol=1e-10)
    other = kernel_shap_values(model, images[:1], 200, seed=6)
    assert not torch.allclose(alone.phi, other.phi, rtol=1e-3)


def test_the_truth_scores_one():
    score = fidelity(QuadraticGame(6), images_for(6, 5))
    assert (score.images, score.players, score.classes, score.reference) == (5, 6, CLASSES, "exact")
    for name in ("r2", "r2_beyond_even", "r2_predicted", "correlation_predicted", "r2_attainable"):
        assert getattr(score, name) == pytest.approx(1, abs=1e-12)
    assert score.correlation == pytest.approx([1] * CLASSES)
    assert score.correlation_predicted_standard_error == pytest.approx(0, abs=1e-9)
    assert score.mean_squared_error == pytest.approx(0, abs=1e-20)
    assert score.efficiency_gap < 1e-12
    assert score.reference_noise == 0
    assert score.evaluations == 5 * 64
    assert score.seconds > 0


def test_the_opposite_scores_minus_one():
    images = images_for(6, 5)
    score = fidelity(QuadraticGame(6, lambda phi: -phi), images)
    assert score.correlation == pytest.approx([-1] * CLASSES)
    assert score.correlation_predicted == pytest.approx(-1)
    phi = QuadraticGame(6).phi(images)
    assert score.r2 == pytest.approx(float(1 - 4 * phi.square().sum() / (phi - phi.mean()).square().sum()))


def test_noise_of_known_variance_scores_as_expected():
    images, deviation = images_for(6, 200), 0.5
    generator = torch.Generator().manual_seed(7)

    def disturb(phi):
        return phi + deviation * torch.randn(phi.shape, generator=generator, dtype=torch.float64)

    score = fidelity(QuadraticGame(6, disturb), images)
    lost = deviation**2 / float(QuadraticGame(6).phi(images).var())
    # The variance of 3600 draws is known to 2.4 %.
    assert score.r2 == pytest.approx(1 - lost, abs=0.08 * lost)
    assert score.mean_squared_error == pytest.approx(deviation**2, rel=0.08)
    # The squared error of an image is a mean of 18 draws, each with variance 2 σ⁴.
    expected = math.sqrt(2 / 18 / 200) * deviation**2
    assert score.mean_squared_error_standard_error == pytest.approx(expected, rel=0.2)
    assert score.efficiency_gap > 0.01


def test_the_even_split_earns_nothing():
    score = fidelity(QuadraticGame(6, lambda phi: phi.mean(1, keepdim=True).expand_as(phi)), images_for(6, 5))
    assert score.r2_beyond_even == pytest.approx(0, abs=1e-12)
    assert score.correlation == (0,) * CLASSES
    assert score.correlation_predicted == 0
    assert score.efficiency_gap < 1e-12


def test_predicted_class_by_hand():
    images = images_for(6, 5)
    offset = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)

    def distort(phi):
        return phi.flip(1) + offset

    score = fidelity(QuadraticGame(6, distort), images)
    model = QuadraticGame(6)
    phi = model.phi(images)
    predicted = (phi.sum(1) + model.null).argmax(1)
    truth = torch.stack([phi[b, :, k] for b, k in enumerate(predicted)])
    ours = torch.stack([distort(phi)[b, :, k] for b, k in enumerate(predicted)])
    r = torch.stack([torch.corrcoef(torch.stack([ours[b], truth[b]]))[0, 1] for b in range(5)])
    assert score.correlation_predicted == pytest.approx(float(r.mean()))
    assert score.correlation_predicted_standard_error == pytest.approx(float(r.std() / math.sqrt(5)))
    expected = 1 - (ours - truth).square().sum() / (truth - truth.mean()).square().sum()
    assert score.r2_predicted == pytest.approx(float(expected))


def test_images_with_nothing_to_correlate_are_left_out():
    images = images_for(6, 4)
    images[1] = 0  # every Shapley value is 0
    score = fidelity(QuadraticGame(6, lambda phi: -phi), images)
    assert score.correlation == pytest.approx([-1] * CLASSES)
    assert score.correlation_predicted == pytest.approx(-1)
    assert score.correlated_images == 3
    assert "± 0.000   1 of 4 images left out" in str(score)


class RoundedGame(QuadraticGame):
    """A constant game of float32, with the noise of its rounding; explains itself by the exact values of that."""

    def shapley_values(self, images):
        return exact_values(self, images).phi, None

    def coalition_values(self, images, bits):
        z = unpack_bits(bits, self.players)
        noise = (z * torch.arange(1.0, self.players + 1)).sum(2, keepdim=True).sin()
        return (self.null.float() + 3 + 2e-7 * noise).expand(len(images), -1, -1)


def test_a_game_with_nothing_to_explain_has_no_r2_and_no_correlation():
    """Rounding that is found again to the last bit used to score 1."""
    model, images = RoundedGame(6), images_for(6, 3)
    assert 0 < exact_values(model, images).phi.abs().max() < 1e-6
    for reference in ("exact", "kernel_shap"):
        score = fidelity(model, images, reference, coalitions=60)
        for name in ("r2", "r2_beyond_even", "r2_predicted", "correlation_predicted"):
            assert math.isnan(getattr(score, name)), name
        assert all(math.isnan(value) for value in score.correlation)
        assert score.correlated_images == 0
        assert math.isnan(score.r2_attainable) is (reference == "kernel_shap")
        assert "nan" in str(score)


def test_what_is_not_defined_is_none_in_json():
    score = fidelity(QuadraticGame(6), images_for(6, 1) * 0)
    values = json.loads(json.dumps(score.as_dict(), allow_nan=False))
    assert values["r2"] is None
    assert values["correlation"] == [None] * CLASSES
    assert values["correlation_predicted_standard_error"] is None
    assert values["mean_squared_error"] == 0
    assert "nan" in str(score)


def test_one_image_has_no_standard_error():
    score = fidelity(QuadraticGame(6), images_for(6, 1))
    assert score.r2 == pytest.approx(1)
    assert math.isnan(score.correlation_predicted_standard_error)
    assert math.isnan(score.mean_squared_error_standard_error)


def test_against_kernel_shap_the_truth_scores_what_is_attainable():
    model, images = CubicGame(10), images_for(10, 12)
    score = fidelity(model, images, "kernel_shap", coalitions=150, seed=1)
    assert score.reference == "kernel_shap"
    assert 0.05 < score.reference_noise < 0.7
    assert score.r2_attainable == pytest.approx(1 - score.reference_noise**2)
    assert 1 - score.r2 == pytest.approx(1 - score.r2_attainable, rel=0.3)
    assert score.evaluations == 12 * 152
    better = fidelity(model, images, "kernel_shap", coalitions=1200, seed=1)
    assert 1 - better.r2 < (1 - score.r2) / 4  # an eighth is expected


def test_reference_values_can_be_given():
    model, images = QuadraticGame(6, lambda phi: phi * 1.3), images_for(6, 5)
    exact = exact_values(model, images)
    given, made = fidelity(model, images, exact).as_dict(), fidelity(model, images).as_dict()
    assert given.pop("seconds") == exact.seconds
    assert made.pop("seconds") > 0
    assert given == made
    estimate = kernel_shap_values(model, images, 100)
    assert fidelity(model, images, estimate).reference == "kernel_shap"


@pytest.mark.parametrize("head", ["shares", "votes"])
def test_a_real_model(head):
    torch.manual_seed(0)
    kwargs = {"patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "in_chans": 1}
    model = SelfExplainingClassifier("vit_tiny_patch16_224", 3, img_size=12, head=head, model_kwargs=kwargs)
    images = torch.randn(2, 1, 12, 12)
    exact = exact_values(model, images)
    with torch.no_grad():
        logits, null = model.eval()(images), model.null_value()
    assert torch.allclose(exact.grand.float(), logits, atol=1e-5)
    assert torch.allclose(exact.null.float(), null.expand(2, -1), atol=1e-5)
    assert torch.allclose(exact.phi.sum(1), exact.grand - exact.null, atol=1e-10)
    score = fidelity(model, images, exact)
    assert score.efficiency_gap < 1e-5
    assert math.isfinite(score.r2)
    pixels = Attribution(model).attribute(images, target=[2, 0])
    assert torch.allclose(pixels.sum((1, 2, 3)), (logits - null)[[0, 1], [2, 0]], atol=1e-5)
    estimate = kernel_shap_values(model, images, 2000)
    assert (estimate.phi - exact.phi).square().mean() < 0.02 * exact.phi.square().mean()


def test_table_is_readable():
    text = str(fidelity(QuadraticGame(6), images_for(6, 5)))
    assert text.startswith("Against exact Shapley values: 5 images, 6 players, 3 classes\n")
    assert "correlation, predicted class  1.000 ± 0.000" in text
    assert "evaluations                   320 in" in text
    text = str(fidelity(CubicGame(6), images_for(6, 5), "kernel_shap", coalitions=60))
    assert text.startswith("Against KernelSHAP: ")
    assert "R² attainable" in text


def test_modes_of_modules_are_put_back():
    model = QuadraticGame(6)
    model.frozen, model.free = nn.Dropout().eval(), nn.Dropout().train()
    model.training = True
    fidelity(model, images_for(6, 2))
    assert (model.training, model.frozen.training, model.free.training) == (True, False, True)


def test_progress_bar(capsys):
    exact_values(QuadraticGame(6), images_for(6, 2), progress=True)
    assert "exact Shapley values" in capsys.readouterr().err
    exact_values(QuadraticGame(6), images_for(6, 2))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: exact_values(QuadraticGame(21), x), r"at most 20.*reference=\"kernel_shap\""),
        (lambda m, x: exact_values(m, x[:0]), "exact_values: argument `images`.*at least one image"),
        (lambda m, x: exact_values(m, x, batch=0), "`batch`"),
        (lambda m, x: kernel_shap_values(m, x[0]), "kernel_shap_values: argument `images`"),
        (lambda m, x: kernel_shap_values(m, x, 1), "`coalitions`"),
        (lambda m, x: kernel_shap_values(m, x, 4), "coalitions that determine 6 Shapley values"),
        (lambda m, x: fidelity(m, x, "exhaustive"), "fidelity: argument `reference`"),
        (lambda m, x: fidelity(m, x, exact_values(m, x[:2])), "of the same images"),
        (lambda m, x: fidelity(m, x[:0]), "fidelity: argument `images`"),
        (lambda m, x: fidelity(QuadraticGame(6, lambda phi: phi / 0), x), "the model's Φ is not always finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(QuadraticGame(6), images_for(6, 3))
