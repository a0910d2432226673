import dataclasses
import sys

import matplotlib
import numpy
import pytest
import torch

from fastshap_vision.explanations.explanation import Explanation, ProbabilityExplanation
from fastshap_vision.explanations.page import explanation_page

matplotlib.use("agg")
from matplotlib import pyplot

BATCH, GRID, CLASSES = 2, (2, 4), 3


@pytest.fixture(autouse=True)
def _closed_figures(monkeypatch):
    def forbidden(*arguments, **keywords):
        raise AssertionError("a plot called show()")

    monkeypatch.setattr(pyplot, "show", forbidden)
    yield
    pyplot.close("all")


@pytest.fixture
def explanation(generator):
    values = torch.randn(BATCH, 8, CLASSES, generator=generator)
    return Explanation(values, values.sum(1), None, GRID, torch.zeros(CLASSES))


def painted(ax):
    """The colours on the axes, (H, W, 3)."""
    return numpy.asarray(ax.images[-1].get_array())[..., :3]


def test_sign_is_colour_and_the_scale_is_symmetric(explanation):
    figure, ax = explanation.plot(target=1)
    colours = painted(ax)
    assert colours.shape == (*GRID, 3)
    values = explanation.heatmap(target=1)[0].numpy()
    red_less_blue = colours[..., 0] - colours[..., 2]
    assert (numpy.sign(red_less_blue) == numpy.sign(values)).all()
    # The strongest colour is at the largest absolute value, and the bar runs as far either way.
    assert numpy.abs(red_less_blue).argmax() == numpy.abs(values).argmax()
    (bar,) = [axes for axes in figure.axes if axes is not ax]
    assert bar.get_ylim() == pytest.approx((-numpy.abs(values).max(), numpy.abs(values).max()))
    assert bar.get_ylabel() == "Shapley value (logits)"


def test_the_bar_names_the_unit():
    probabilities = torch.tensor([[0.7, 0.2, 0.1]])
    even = (probabilities / 8).unsqueeze(1).expand(-1, 8, -1)
    explanation = ProbabilityExplanation(even, probabilities, None, GRID, torch.zeros(CLASSES))
    figure, _ = explanation.plot()
    assert figure.axes[1].get_ylabel() == "Shapley value (probabilities)"


def test_limit_is_kept(explanation):
    figure, ax = explanation.plot(limit=10.0)
    assert figure.axes[1].get_ylim() == (-10, 10)
    assert numpy.ptp(painted(ax)) < 0.5


@pytest.mark.parametrize(("channels", "scale"), [(3, 2), (1, 40)])
def test_a_photograph_shows_through(explanation, channels, scale):
    images = torch.ones(BATCH, channels, 2 * scale, 4 * scale)
    images[:, :, :, 1] = -2.0  # one dark column, in a normalised unit
    _, plain = explanation.plot(limit=1.0)
    _, ax = explanation.plot(images, limit=1.0)
    colours, values = painted(ax), painted(plain).repeat(scale, 0).repeat(scale, 1)
    dark = numpy.arange(4 * scale) == 1
    assert colours[:, ~dark] == pytest.approx(values[:, ~dark], abs=1e-6)
    assert (colours[:, dark] < values[:, dark]).all()


@pytest.mark.parametrize("ink", [1.0, -3.0])
def test_a_small_drawing_is_outlined_and_keeps_its_colours(explanation, ink):
    images = torch.zeros(BATCH, 1, 4, 8)
    images[:, :, 1:3, 2:5] = ink
    _, plain = explanation.plot(limit=1.0)
    _, ax = explanation.plot(images, limit=1.0)
    assert painted(ax) == pytest.approx(painted(plain).repeat(2, 0).repeat(2, 1))
    (outline,) = ax.collections
    corners = numpy.concatenate([path.vertices for path in outline.get_paths()])
    # Halfway between the centres of the last pixel outside and the first one inside.
    assert corners.min(0) == pytest.approx((1.5, 0.5), abs=0.15)
    assert corners.max(0) == pytest.approx((4.5, 2.5), abs=0.15)


def test_the_grid_is_drawn_where_the_model_looks(explanation):
    """Over 8 of 10 rows of pixels; the rest is as white as 0."""
    images = torch.ones(BATCH, 3, 10, 16)
    images[:, :, :, 0] = 0.0
    _, plain = explanation.plot(limit=1.0)
    _, ax = dataclasses.replace(explanation, seen=(0.8, 1.0)).plot(images, limit=1.0)
    colours = painted(ax)[:, 1:]
    assert colours[:8] == pytest.approx(painted(plain).repeat(4, 0).repeat(4, 1)[:, 1:], abs=1e-6)
    assert numpy.ptp(colours[8:]) == pytest.approx(0, abs=0.01)


def test_what_was_never_trained_is_marked(explanation):
    _, ax = dataclasses.replace(explanation, untrained=True).plot()
    assert ax.get_title().endswith("(untrained explainer)")


def test_title_names_class_and_probability(explanation):
    _, ax = explanation.plot(index=1, target=2, classes=["cat", "dog", "hen"])
    assert ax.get_title() == f"hen · {explanation.probabilities[1, 2]:.0%}"
    _, ax = explanation.plot()
    assert ax.get_title().startswith(f"{int(explanation.predicted[0])} · ")


def test_draws_on_the_axes_given(explanation):
    figure, axes = pyplot.subplots(1, 2)
    drawn = explanation.plot(ax=axes[1])
    assert drawn == (figure, axes[1])
    assert not axes[0].images


def test_zeros_and_gradients_are_drawn():
    zeros = Explanation(
        torch.zeros(1, 8, requires_grad=True), torch.zeros(1, 3), torch.tensor([2]), GRID, torch.zeros(3)
    )
    figure, ax = zeros.plot(torch.zeros(1, 3, 4, 8))
    assert numpy.ptp(painted(ax)) == pytest.approx(0, abs=1e-6)
    zeros.plot(torch.zeros(1, 1, 4, 8))
    figure.canvas.draw()


@pytest.mark.parametrize("channels", [1, 3])
def test_page(explanation, generator, channels, tmp_path):
    images = torch.randn(BATCH, channels, 4, 8, generator=generator)
    exact = explanation.values + 0.1 * torch.randn(explanation.values.shape, generator=generator)
    figure, axes = explanation_page(images, explanation, exact.double(), ["cat", "dog", "hen"], "converged")
    assert axes.shape == (BATCH, 5)
    assert [text.get_text() for text in axes[0, 4].texts] == ["runner-up: converged"]
    for b in range(BATCH):
        best = explanation.logits[b].topk(2).indices.tolist()
        assert [axes[b, column].get_title().split(" · ")[0] for column in (1, 3)] == [
            ["cat", "dog", "hen"][k] for k in best
        ]
        for column, k in zip((2, 4), best, strict=True):
            r = numpy.corrcoef(explanation.values[b, :, k].numpy(), exact[b, :, k].numpy())[0, 1]
            assert axes[b, column].get_title() == f"r = {r:.2f}"
    bars = [ax for ax in figure.axes if ax not in set(axes.flat)]
    assert len(bars) == BATCH
    for b, bar in enumerate(bars):
        best = explanation.logits[b].topk(2).indices
        largest = torch.stack([explanation.values[b][:, best], exact[b][:, best]]).abs().max().item()
        assert bar.get_ylim() == pytest.approx((-largest, largest))
    figure.savefig(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_nothing_on_the_page_overlaps(explanation, generator):
    figure, _ = explanation_page(torch.randn(2, 1, 8, 8, generator=generator), explanation, explanation.values)
    figure.canvas.draw()
    boxes = [box for ax in figure.axes for box in [ax.get_tightbbox()] if box is not None]
    for first in range(len(boxes)):
        for second in range(first):
            shared = boxes[first].intersection(boxes[first], boxes[second])
            assert shared is None or min(shared.width, shared.height) < 1
    for box in boxes:
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y1 <= figure.bbox.y1 + 1


def test_bad_input_is_named(explanation):
    images = torch.zeros(BATCH, 1, 4, 8)
    with pytest.raises(ValueError, match=r"Explanation\.plot: argument `images` must be \(2, C, H, W\)"):
        explanation.plot(images[:1])
    with pytest.raises(ValueError, match="argument `images`"):
        explanation.plot(torch.zeros(BATCH, 2, 4, 8))
    for limit in (0, -1.0, float("nan"), "1"):
        with pytest.raises(ValueError, match="argument `limit` must be a finite number above 0"):
            explanation.plot(limit=limit)
    with pytest.raises(TypeError, match=r"argument `images`.*model\.preprocess"):
        explanation.plot("image.png")
    with pytest.raises(ValueError, match="argument `classes` must be 3 names"):
        explanation.plot(classes=["cat"])
    with pytest.raises(ValueError, match="explanation_page: argument `exact`"):
        explanation_page(images, explanation, explanation.values[..., 0])
    one = Explanation(explanation.values_for(0), explanation.logits, torch.zeros(2).long(), GRID, explanation.null)
    with pytest.raises(ValueError, match=r'explanation_page: argument `explanations`.*target="all"'):
        explanation_page(images, one, explanation.values)
    with pytest.raises(ValueError, match="at least one image"):
        explanation_page(images[:0], explanation[:0], explanation.values[:0])
    with pytest.raises(IndexError):
        explanation.plot(index=2)


def test_without_matplotlib_the_extra_is_named(explanation, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot")
    with pytest.raises(ModuleNotFoundError, match=r"fastshap-kernels\[plot\]"):
        explanation.plot()
