"""One call explains a trained model: what it holds out, which epoch it keeps, and how a run goes on."""

import logging

import pytest
import torch
from torch.utils.data import Subset
from vision_transformers import TINY, images, labelled, network

import fastshap_vision as fv

QUICK = {"epochs": 2, "batch_size": 4, "progress": False}


def vit(**options):
    return network("vit_tiny_patch16_224", 5, **TINY, **options)


def photographs(count=20, channels=3):
    return labelled(images(count, channels=channels), 5)


def test_the_logits_stay_and_the_explanations_are_learnt():
    backbone, x = vit(), images(size=32)
    with torch.no_grad():
        before = backbone(x)
    result = fv.train_explainer(backbone, photographs(), coalitions=8, **QUICK)
    assert result.model.backbone is backbone
    assert result.model.config["head_depth"] == fv.recipe.MODEL["head_depth"]
    with torch.no_grad():
        assert torch.equal(result.model(x), before)
    assert result.best_epoch in (0, 1, 2)
    assert result.model.is_untrained == (result.best_epoch == 0)
    assert len(result.history) == 2


def test_the_best_epoch_is_kept(monkeypatch):
    """Of three epochs the second is the best: its head is given back."""
    heads, scores = [], iter([0.1, 0.4, 0.9, 0.5])
    evaluate = fv.ExplainerObjective.evaluate

    def scored(self, model, data, **options):
        heads.append(model.head.shares.weight.detach().clone())
        monkeypatch.setattr(torch.Tensor, "nanmean", lambda *_: next(scores))
        try:
            return evaluate(self, model, data, **options)
        finally:
            monkeypatch.undo()
            monkeypatch.setattr(fv.ExplainerObjective, "evaluate", scored)

    monkeypatch.setattr(fv.ExplainerObjective, "evaluate", scored)
    result = fv.train_explainer(vit(), photographs(), coalitions=8, **QUICK | {"epochs": 3})
    assert result.best_epoch == 2
    assert torch.equal(result.model.head.shares.weight, heads[2])
    assert not torch.equal(heads[2], heads[3])


def test_what_is_no_better_than_before_is_not_kept(caplog):
    with caplog.at_level(logging.WARNING, "fastshap_vision"):
        result = fv.train_explainer(vit(), photographs(), coalitions=8, **QUICK | {"lr": 50.0, "clip_grad": None})
    assert result.best_epoch == 0
    assert result.model.is_untrained
    assert "No epoch explained the held-out images better" in caplog.text


def test_held_out_images_are_not_trained_on(monkeypatch):
    seen = {}
    record = fv.record_coalitions

    def recorded(model, data, *arguments, **options):
        seen[len(seen)] = data
        return record(model, data, *arguments, **options)

    monkeypatch.setattr("fastshap_vision.training.recipe.record_coalitions", recorded)
    fv.train_explainer(vit(), photographs(), coalitions=4, **QUICK)
    mirrored, held_out = seen[0], seen[1]
    assert isinstance(mirrored, fv.WithMirrorImages)
    assert len(held_out) == 2
    assert set(mirrored.data.indices).isdisjoint(held_out.indices)
    assert len(mirrored.data) + len(held_out) == 20
    seen.clear()
    fv.train_explainer(vit(in_chans=1), photographs(channels=1), photographs(3, 1), coalitions=4, **QUICK)
    assert len(seen[0]) == 20  # greyscale: no mirror images
    assert len(seen[1]) == 3


def test_equal_seeds_give_equal_bits_and_a_run_goes_on(tmp_path):
    def run(output=None, **options):
        return fv.train_explainer(vit(), photographs(), coalitions=4, output=output, **QUICK | options)

    whole = run(tmp_path / "whole").model.state_dict()
    run(tmp_path / "stopped", epochs=2)
    again = run(tmp_path / "stopped", resume="auto").model.state_dict()
    saved = fv.SelfExplainingClassifier.from_pretrained(tmp_path / "stopped").state_dict()
    for name, tensor in whole.items():
        assert torch.equal(tensor, again[name]), name
        assert torch.equal(tensor, saved[name]), name
    assert {"coalitions", "held_out"} <= {path.name for path in (tmp_path / "whole").iterdir()}
    with pytest.raises(ValueError, match="coalitions was 4 and is 6"):
        fv.train_explainer(vit(), photographs(), coalitions=6, output=tmp_path / "whole", resume="auto", **QUICK)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": 3}, "argument `model` must be a timm model"),
        ({"data": Subset(photographs(), [0])}, "argument `data` must be a dataset of at least two images"),
        ({"coalitions": 3}, "argument `coalitions` must be even"),
        ({"seed": -1}, "argument `seed`"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"model": vit(), "data": photographs(), **QUICK} | change
    with pytest.raises(ValueError, match=message):
        fv.train_explainer(arguments.pop("model"), arguments.pop("data"), **arguments)


def test_votes_need_no_explainer():
    model = fv.convert(vit(global_pool="avg", class_token=False, fc_norm=False), head="votes")
    with pytest.raises(ValueError, match="its votes are its explanation already"):
        fv.train_explainer(model, photographs())


def test_a_constant_game_keeps_the_explanation_before_training():
    """Its held-out values vary by rounding only, so that no epoch is better than another."""
    backbone = vit()
    torch.nn.init.zeros_(backbone.head.weight)
    result = fv.train_explainer(backbone, photographs(), coalitions=4, **QUICK)
    assert result.best_epoch == 0
    assert result.model.is_untrained


@pytest.mark.parametrize("label", [None, -1, 99, "cat"])
def test_labels_have_no_part_in_it(label):
    unlabelled = [(image, label) for image, _ in photographs()]
    found = fv.train_explainer(vit(), unlabelled, coalitions=4, **QUICK)
    expected = fv.train_explainer(vit(), photographs(), coalitions=4, **QUICK)
    assert torch.equal(found.model.head.shares.weight, expected.model.head.shares.weight)
    assert found.accuracy is None


def test_a_finished_run_is_not_written_with_another_explainers_calibration(tmp_path):
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 4, "progress": False}
    model = fv.convert(vit())
    recorded = fv.record_coalitions(model, photographs(), 4)
    fv.fit(model, recorded, output=tmp_path, **options)
    model.calibrate(photographs().tensors[0], coalitions=4)
    fv.fit(model, recorded, output=tmp_path, resume="auto", **options)
    assert fv.SelfExplainingClassifier.from_pretrained(tmp_path).calibration is None
