import dataclasses
import itertools

import numpy
import pytest
import torch
from safetensors.torch import save_file

from fastshap_vision.explanations.explanation import Explanation, ProbabilityExplanation

BATCH, GRID, CLASSES = 3, (2, 4), 5


def explain_all(generator, dtype=torch.float64):
    values = torch.randn(BATCH, 8, CLASSES, generator=generator, dtype=dtype)
    null = torch.randn(CLASSES, generator=generator, dtype=dtype)
    return Explanation(values, values.sum(1) + null, None, GRID, null)


def explain_one(generator):
    every = explain_all(generator)
    target = torch.tensor([4, 0, 2])
    return Explanation(every.values_for(target), every.logits, target, GRID, every.null)


def test_probabilities_and_prediction(generator):
    explanation = explain_all(generator)
    assert torch.allclose(explanation.probabilities.sum(-1), torch.ones(BATCH, dtype=torch.float64))
    assert torch.equal(explanation.predicted, explanation.probabilities.argmax(-1))


def test_values_of_a_class(generator):
    explanation = explain_all(generator)
    assert torch.equal(explanation.values_for(3), explanation.values[:, :, 3])
    target = torch.tensor([1, 3, 0])
    for b, k in enumerate(target):
        assert torch.equal(explanation.values_for(target)[b], explanation.values[b, :, k])
        assert torch.equal(explanation.values_for()[b], explanation.values[b, :, explanation.predicted[b]])


def test_values_of_the_one_target(generator):
    explanation = explain_one(generator)
    assert explanation.values_for() is explanation.values
    assert explanation.values_for(torch.tensor([4, 0, 2])) is explanation.values
    with pytest.raises(ValueError, match='target="all"'):
        explanation.values_for(1)


@pytest.mark.parametrize("target", [5, -1, 0.5, True, torch.tensor([1, 2])])
def test_unknown_target_is_named(generator, target):
    with pytest.raises(ValueError, match="`target`"):
        explain_all(generator).values_for(target)


def test_heatmap_of_the_grid_is_row_by_row(generator):
    explanation = explain_one(generator)
    maps = explanation.heatmap()
    assert maps.shape == (BATCH, *GRID)
    for row, column in itertools.product(range(2), range(4)):
        assert torch.equal(maps[:, row, column], explanation.values[:, row * 4 + column])


def test_heatmap_nearest_gives_each_pixel_its_patch(generator):
    explanation = explain_all(generator)
    maps = explanation.heatmap((6, 20), target=1)
    expected = explanation.heatmap(target=1).repeat_interleave(3, 1).repeat_interleave(5, 2)
    assert torch.equal(maps, expected)


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
def test_heatmap_lies_where_the_model_looks(generator, mode):
    """A grid over 6 of 7 rows and 8 of 12 columns."""
    whole = explain_all(generator)
    part = dataclasses.replace(whole, seen=(6 / 7, 8 / 12))
    for scale in (1, 3):
        maps = part.heatmap((7 * scale, 12 * scale), mode=mode)
        inside = maps[:, : 6 * scale, : 8 * scale]
        assert torch.equal(inside, whole.heatmap((6 * scale, 8 * scale), mode=mode))
        assert not maps[:, 6 * scale :].any()
        assert not maps[:, :, 8 * scale :].any()
    assert torch.equal(part.heatmap(), whole.heatmap())
    assert part[1:].seen == part.seen


def test_heatmap_bilinear_keeps_centres_and_stays_between(generator):
    explanation = explain_all(generator)
    grid, maps = explanation.heatmap(), explanation.heatmap((6, 12), mode="bilinear")
    assert torch.allclose(maps[:, 1::3, 1::3], grid)
    assert maps.amax() <= grid.amax() + 1e-12
    assert not torch.equal(maps, explanation.heatmap((6, 12)))


def test_heatmap_of_one_number_is_square(generator):
    assert explain_one(generator).heatmap(7).shape == (BATCH, 7, 7)


@pytest.mark.parametrize(("argument", "value"), [("mode", "cubic"), ("size", 0), ("size", (3,)), ("size", (2.5, 3))])
def test_heatmap_names_bad_input(generator, argument, value):
    with pytest.raises(ValueError, match=f"Explanation.heatmap: argument `{argument}`"):
        explain_one(generator).heatmap(**{argument: value})


@pytest.mark.parametrize("make", [explain_all, explain_one])
def test_efficiency_gap(generator, make):
    explanation = make(generator)
    assert explanation.efficiency_gap() < 1e-14
    explanation.values[1, 2] += 0.5
    scale = torch.cat([explanation.logits[1], explanation.null]).abs().max()
    assert explanation.efficiency_gap() == pytest.approx(0.5 / scale.item())


def test_efficiency_gap_at_the_ends():
    zeros = Explanation(torch.zeros(2, 8), torch.zeros(2, 5), torch.zeros(2, dtype=torch.int64), GRID, torch.zeros(5))
    assert zeros.efficiency_gap() == 0
    assert zeros[:0].efficiency_gap() == 0
    zeros.values[0, 0] = float("nan")
    assert not zeros.efficiency_gap() < 1


@pytest.mark.parametrize("make", [explain_all, explain_one])
def test_indexing(generator, make):
    explanation = make(generator)
    assert len(explanation) == BATCH
    assert [len(one) for one in explanation] == [1] * BATCH
    assert torch.equal(explanation[-1].values[0], explanation.values[2])
    assert torch.equal(explanation[1:].logits, explanation.logits[1:])
    assert torch.equal(explanation[torch.tensor([2, 0])].predicted, explanation.predicted[[2, 0]])
    assert torch.equal(explanation[1].values_for(), explanation.values_for()[1:2])
    for one in (numpy.int64(1), torch.tensor(1)):
        assert torch.equal(explanation[one].values, explanation[1].values)
    for several in ([2, 0], numpy.array([2, 0]), numpy.array([True, False, True])):
        assert sorted(explanation[several].predicted.tolist()) == sorted(explanation.predicted[[2, 0]].tolist())
    for index in (True, 1.5, "1", None):
        with pytest.raises(TypeError, match="an index must be a whole number, a slice"):
            explanation[index]
    for index in (BATCH, -BATCH - 1, numpy.int64(BATCH)):
        with pytest.raises(IndexError, match="out of range for 3 images"):
            explanation[index]


@pytest.mark.parametrize("make", [explain_all, explain_one])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_save_and_load(generator, make, dtype, tmp_path):
    explanation = make(generator)
    explanation.values = explanation.values.to(dtype).requires_grad_()
    explanation.seen, explanation.untrained = (6 / 7, 1.0), True
    path = tmp_path / "explanation.safetensors"
    path.write_bytes(b"what was there before")
    explanation.save(path)
    loaded = Explanation.load(path)
    assert loaded.grid == GRID
    assert loaded.seen == (6 / 7, 1.0)
    assert loaded.untrained
    for name in ("values", "logits", "null"):
        assert torch.equal(getattr(loaded, name), getattr(explanation, name))
        assert getattr(loaded, name).dtype == getattr(explanation, name).dtype
    assert (loaded.target is None) == (explanation.target is None)
    assert explanation.target is None or torch.equal(loaded.target, explanation.target)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("unit", ["probabilities", "logits"])
def test_a_file_knows_its_unit(generator, unit, tmp_path):
    """Whichever class reads it; files from before there were units are of the class that reads them."""
    logits = explain_one(generator)
    kind = ProbabilityExplanation if unit == "probabilities" else Explanation
    kind(logits.values, logits.logits, logits.target, GRID, logits.null).save(tmp_path / "file")
    for reader in (Explanation, ProbabilityExplanation):
        loaded = reader.load(tmp_path / "file")
        assert type(loaded) is type(loaded[:1]) is kind
        assert repr(loaded).startswith(kind.__name__)


def test_a_failed_save_leaves_the_old_file(generator, tmp_path, monkeypatch):
    path = tmp_path / "explanation.safetensors"
    explanation = explain_one(generator)
    explanation.save(path)
    before = path.read_bytes()

    def full_disk(descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="no space left"):
        explain_all(generator).save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_can_be_read_by_others(generator, tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    explain_one(generator).save(tmp_path / "explanation")
    assert (tmp_path / "explanation").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_unreadable_files_are_named(generator, tmp_path):
    path = tmp_path / "explanation.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file .*explanation\.safetensors"):
        Explanation.load(path)
    explain_one(generator).save(path)
    whole = path.read_bytes()
    for content in (b"", b"not safetensors", whole[:-9], whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="must name a file written"):
            Explanation.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="its format is None"):
        Explanation.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(5)}, r"`logits` must be \(B, K\)"),
        ({"values": torch.zeros(3, 8, 5)}, r"`values` must be \(3, 8\) for one target per image on the grid \(2, 4\)"),
        ({"target": None}, r"`values` must be \(3, 8, 5\) for every class"),
        ({"grid": (3, 4)}, r"`values` must be \(3, 12\)"),
        ({"target": torch.zeros(2, dtype=torch.int64)}, r"`target` must be int64 \(3,\)"),
        ({"target": torch.zeros(3)}, "`target`"),
        ({"null": torch.zeros(1)}, r"`null` must be \(5,\)"),
        ({"grid": (2.0, 4)}, "`grid` must be two whole numbers"),
        ({"grid": 8}, "`grid`"),
        ({"null": torch.zeros(5).to_sparse()}, "`null` must be a tensor, not sparse"),
        ({"seen": (1.0, 0.0)}, "`seen`"),
        ({"seen": (1.0, 1.5)}, "`seen`"),
    ],
)
def test_shapes_are_checked(change, message):
    arguments = {
        "values": torch.zeros(3, 8),
        "logits": torch.zeros(3, 5),
        "target": torch.zeros(3, dtype=torch.int64),
        "grid": GRID,
        "null": torch.zeros(5),
    }
    with pytest.raises(ValueError, match=f"Explanation: argument {message}"):
        Explanation(**(arguments | change))


@pytest.mark.parametrize("name", ["values", "logits", "target", "null"])
def test_what_is_no_tensor_is_named(generator, name):
    with pytest.raises(TypeError, match=f"Explanation: argument `{name}` must be a tensor.*numpy array"):
        dataclasses.replace(explain_one(generator), **{name: numpy.zeros(9)})


def test_repr_is_short(generator):
    assert repr(explain_one(generator)) == "Explanation(3 images, grid=(2, 4), 5 classes, target=[4, 0, 2])"
    assert repr(explain_all(generator)).endswith("target=all)")
    many = torch.zeros(100).long()
    hundred = Explanation(torch.zeros(100, 8), torch.zeros(100, 5), many, GRID, torch.zeros(5), untrained=True)
    assert repr(hundred).endswith("target=100 classes, of an untrained explainer)")


@pytest.mark.parametrize("every", [False, True])
def test_an_explanation_moves_as_a_whole(every):
    target = None if every else torch.tensor([1, 0])
    one = Explanation(
        torch.randn(2, 4, 3) if every else torch.randn(2, 4),
        torch.randn(2, 3),
        target,
        (2, 2),
        torch.zeros(3),
        (1.0, 0.5),
    )
    wide = one.to(torch.float64)
    assert wide.values.dtype == wide.logits.dtype == wide.null.dtype == torch.float64
    assert (wide.target is None) == every
    assert wide.seen == one.seen
    moved = one.to("meta")
    assert all(part.is_meta for part in (moved.values, moved.logits, moved.null, *([] if every else [moved.target])))
    assert torch.equal(one.cpu().values, one.values)


def test_one_image_is_one_image():
    assert "(1 image," in repr(
        Explanation(torch.zeros(1, 4), torch.zeros(1, 2), torch.tensor([0]), (2, 2), torch.zeros(2))
    )
