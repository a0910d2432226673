"""Coalitions that are evaluated once, and the explainer that learns from them, of a model that stays as it is."""

import copy

import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, Subset
from vision_transformers import create, image_size, images, labelled

import fastshap_kernels as fk
import fastshap_vision as fv


def converted(kind, **options):
    return fv.convert(create(kind), img_size=image_size(kind), **options)


def dataset(kind, count=10):
    return labelled(images(count, image_size(kind)))


@pytest.mark.parametrize("kind", ["class token", "resnet18"])
def test_a_record_holds_the_values_of_coalitions_that_only_the_seed_decides(kind):
    model, data = converted(kind), dataset(kind)
    recorded = fv.record_coalitions(model, data, 6, seed=3, batch_size=4)
    bits = fk.sample_coalitions(10, 6, model.players, seed=3)
    assert torch.equal(recorded.bits, bits)
    with torch.no_grad():
        values = model.eval().coalition_values(data.tensors[0], bits)
    torch.testing.assert_close(recorded.values, values, rtol=1e-4, atol=1e-5)
    assert len(recorded) == 10
    rows = [7, 2]
    for row, (image, found) in zip(rows, recorded.__getitems__(rows), strict=True):
        assert torch.equal(image, data.tensors[0][row])
        assert found["label"] == row % 7
        assert torch.equal(found["bits"], bits[row])
        assert torch.equal(found["values"], recorded.values[row])
    assert torch.equal(recorded[2][0], data.tensors[0][2])


@pytest.mark.parametrize(
    ("bits", "values", "words"),
    [
        (None, torch.zeros(10, 2, 7), "`bits` must be int32"),
        (torch.zeros(10, 2, 1), torch.zeros(10, 2, 7), r"`bits` must be int32 .*float32 \(10, 2, 1\)"),
        (torch.zeros(10, 2, dtype=torch.int32), torch.zeros(10, 2, 7), "`bits` must be int32"),
        (torch.zeros(10, 2, 1, dtype=torch.int32), torch.zeros(10, 2), "`values` must be floating-point"),
        (torch.zeros(10, 2, 1, dtype=torch.int32), torch.zeros(10, 2, 7).long(), "`values` must be floating-point"),
        (torch.zeros(10, 2, 1, dtype=torch.int32), torch.full((10, 2, 7), torch.inf), "`values` must be finite"),
        (torch.zeros(10, 3, 1, dtype=torch.int32), torch.zeros(10, 2, 7), "`values` must be"),
    ],
)
def test_what_are_no_games_is_named(bits, values, words):
    with pytest.raises((ValueError, TypeError), match=f"RecordedCoalitions: argument {words}"):
        fv.RecordedCoalitions(dataset("class token"), bits, values)


def test_labels_have_no_part_in_a_game():
    model, data = converted("class token"), dataset("class token", 3)
    unlabelled = [(image, None) for image, _ in data]
    recorded = fv.record_coalitions(model, unlabelled, 4)
    assert torch.equal(recorded.values, fv.record_coalitions(model, data, 4).values)
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 3, "progress": False}
    assert fv.fit(model, recorded, **options).history


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_models_of_other_precision_play_too(dtype):
    model, data = converted("class token"), dataset("class token", 3)
    expected = fv.record_coalitions(model, data, 4)
    recorded = fv.record_coalitions(model.to(dtype), data, 4)
    assert recorded.values.dtype == torch.float32
    assert (recorded.values - expected.values).norm() <= (
        0.2 if dtype == torch.bfloat16 else 1e-5
    ) * recorded.values.norm()
    recorded.check(model)


def test_recording_draws_nothing_from_the_processs_generator():
    model, data = converted("class token"), dataset("class token", 3)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    fv.record_coalitions(model, data, 4)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("precision", ["same", "auto"])
def test_a_constant_game_leaves_nothing_to_explain(precision):
    """Its values vary by rounding only: no step grows, the shares shrink, and there is no value_r2."""
    backbone = create("class token")
    for block in backbone.blocks:  # the class token sees no patch
        torch.nn.init.zeros_(block.attn.proj.weight)
    model, data = fv.convert(backbone, img_size=32), dataset("class token", 10)
    torch.nn.init.normal_(model.head.shares.weight, std=0.1)
    recorded = fv.record_coalitions(model, data, 8, precision=precision)
    options = {"epochs": 6, "batch_size": 5, "opt": "sgd", "lr": 0.1, "sched": "none", "weight_decay": 0}
    history = fv.fit(model, recorded, recorded, objective=fv.ExplainerObjective(), **options).history
    regression = [row["regression"] for row in history]
    assert regression == sorted(regression, reverse=True)
    assert regression[0] < 10
    assert all(row["value_r2"] is row["eval_value_r2"] is None for row in history)


def test_classes_are_those_of_the_data():
    digits = fv.load_dataset("digits", "test")
    recorded = fv.record_coalitions(converted("class token"), dataset("class token", 2), 2)
    assert recorded.classes is None
    assert fv.RecordedCoalitions(Subset(digits, [0, 1]), recorded.bits, recorded.values).classes is None
    bits, values = (part[:1].expand(len(digits), -1, -1) for part in (recorded.bits, recorded.values))
    assert fv.RecordedCoalitions(digits, bits, values).classes == digits.classes


def test_recording_leaves_modes_as_they_were():
    model = converted("class token").train()
    fv.record_coalitions(model, dataset("class token", 2), 2)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("base", ["even", "votes"])
def test_the_regression_follows_its_formula(base):
    model, data = converted("average pooling", base=base).train(), dataset("average pooling", 3)
    torch.nn.init.normal_(model.head.shares.weight, std=0.1)
    recorded = fv.record_coalitions(model, data, 8)
    x = data.tensors[0]
    terms = fv.ExplainerObjective()(model, x, recorded.rows(range(3)))
    phi, logits = model.eval().shapley_values(x)
    null, present = model.null_value(), fk.unpack_bits(recorded.bits, model.players).float()
    residual = recorded.values - null - torch.einsum("bmp,bpk->bmk", present, phi)
    left = recorded.values - null - present.mean(2, keepdim=True) * (logits - null).unsqueeze(1)
    expected = residual.square().mean() / left.square().mean()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-6)
    variance = recorded.values.flatten(0, 1).var(0, correction=0).mean()
    torch.testing.assert_close(terms.value_r2, 1 - residual.square().mean() / variance, rtol=1e-4, atol=1e-5)
    terms.loss.backward()
    assert all(weight.grad is None for weight in model.backbone.parameters())
    assert all(weight.grad is not None for weight in [*model.head.explainer.parameters(), model.head.shares.weight])


@pytest.mark.parametrize("kind", ["class token", "test_resnet"])
def test_the_explainer_learns_and_all_else_stays_as_it_is(kind):
    """Norms' statistics too, with dropout and weight decay, though training puts the model in training mode."""
    model, data = converted(kind), dataset(kind)
    for module in model.backbone.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    before = copy.deepcopy(model)
    recorded = fv.record_coalitions(model, data, 32)
    options = {"epochs": 20, "batch_size": 5, "lr": 3e-3, "clip_grad": 1.0, "progress": False}
    result = fv.fit(model, recorded, data, objective=fv.ExplainerObjective(), **options)
    for name, tensor in before.backbone.state_dict().items():
        assert torch.equal(tensor, model.backbone.state_dict()[name]), name
    x = data.tensors[0]
    assert torch.equal(before.eval()(x), model.eval()(x))
    assert result.accuracy == fv.evaluate(before, data).accuracy
    regression = [row["regression"] for row in result.history]
    assert regression[-1] < 0.8 * regression[0]
    assert fv.fidelity(model, x[:2], "kernel_shap", 512).r2 > fv.fidelity(before, x[:2], "kernel_shap", 512).r2


def test_games_that_were_held_out_say_what_is_learned():
    model, data = converted("class token"), dataset("class token", 20)
    trained, held_out = (fv.record_coalitions(model, Subset(data, rows), 32) for rows in (range(10), range(10, 20)))
    options = {"epochs": 3, "batch_size": 5, "progress": False, "lr": 3e-3}
    history = fv.fit(model, trained, held_out, objective=fv.ExplainerObjective(), **options).history
    images = torch.stack([held_out[row][0] for row in range(10)])
    residuals = []
    with torch.no_grad():
        for part in (range(5), range(5, 10)):
            terms = fv.ExplainerObjective()(model, images[part], held_out.rows(part))
            residuals.append(float(terms.value_r2))
    assert history[-1]["eval_value_r2"] == pytest.approx(sum(residuals) / 2, abs=1e-5)
    assert history[-1]["eval_value_r2"] != history[0]["eval_value_r2"]
    assert history[-1]["eval_accuracy"] is None  # the classifier stays as it is
    assert fv.evaluate(model, held_out).accuracy == fv.evaluate(model, Subset(data, range(10, 20))).accuracy


def test_a_run_of_other_games_is_not_resumed(tmp_path):
    model, data = converted("class token"), dataset("class token")
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 5, "progress": False}
    fv.fit(model, fv.record_coalitions(model, data, 4), output=tmp_path, **options)
    assert fv.fit(model, fv.record_coalitions(model, data, 4), output=tmp_path, resume="auto", **options).history
    with pytest.raises(fv.CheckpointError, match="recorded was"):
        fv.fit(model, fv.record_coalitions(model, data, 4, seed=1), output=tmp_path, resume="auto", **options)


def test_games_of_another_model_are_refused():
    """Of another one, of another removal, of one with other players, and of this one before it was trained on."""
    model, data = converted("average pooling"), dataset("average pooling")
    recorded = fv.record_coalitions(model, data, 8)
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 5, "progress": False}
    torch.manual_seed(1)
    others = {
        "another": converted("class token"),
        "removal": converted("average pooling", removal="pixel"),
        "players": fv.SelfExplainingClassifier("resnet10t", 7, img_size=64),
    }
    model.backbone.load_state_dict(others["removal"].backbone.state_dict())
    for other in others.values():
        with pytest.raises(ValueError, match=r"recorded with another model.*fv\.record_coalitions"):
            fv.fit(other, recorded, **options)
    with pytest.raises(ValueError, match="recorded with another model"):  # held out, the objective known to both
        fv.fit(others["removal"], fv.record_coalitions(others["removal"], data, 8), recorded, **options)
    model.backbone.head.weight.data *= 1.5
    with pytest.raises(ValueError, match="before it was trained further"):
        fv.fit(model, recorded, **options)


def test_a_frozen_encoder_keeps_its_weights_whatever_gradients_it_holds():
    model, data = converted("class token"), dataset("class token")
    torch.nn.functional.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    before = copy.deepcopy(model.backbone.state_dict())
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 5, "progress": False}
    fv.fit(model, fv.record_coalitions(model, data, 4), **options)
    for name, tensor in before.items():
        assert torch.equal(tensor, model.backbone.state_dict()[name]), name


def test_data_that_changes_is_refused():
    """The value of a coalition was found on another image than the explainer would see."""
    augmented = Subset(fv.load_dataset("digits", "train", augment=True), range(40))
    small = {"patch_size": 2, "in_chans": 1, "embed_dim": 12, "depth": 1, "num_heads": 1}
    model = fv.SelfExplainingClassifier("vit_tiny_patch16_224", 10, img_size=8, model_kwargs=small)
    with pytest.raises(ValueError, match=r"`data`.*same at every reading.*augmentation"):
        fv.record_coalitions(model, augmented)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"coalitions": 3}, "coalitions.*even"),
        ({"coalitions": 0}, "coalitions"),
        ({"batch_size": 0}, "batch_size"),
        ({"workers": -1}, "`workers` must be a whole number from 0"),
        ({"seed": -1}, "`seed` must be a whole number from 0"),
        ({"seed": 2**64}, "`seed` must be a whole number from 0"),
        ({"precision": "half"}, "precision"),
        ({"store": "logits"}, "`store` must be one of 'values', 'features'"),
        ({"dtype": "float64"}, "`dtype` must be one of None, 'float16', 'float32'"),
        ({"shard": 0}, "`shard` must be a whole number from 1"),
        ({"classes": 8}, "`classes` must be a whole number from 1 to 7"),
        ({"classes": 2, "store": "features"}, "`classes` must be None with store='features'"),
    ],
)
def test_bad_arguments_of_play(options, words):
    with pytest.raises(ValueError, match=words):
        fv.record_coalitions(converted("class token"), dataset("class token", 2), **options)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ([], "at least one image"),
        ([images(batch=1, size=32)[0]], r"\(image, label\)"),
        ([{"image": images(batch=1, size=32)[0], "label": 0}], r"\(image, label\)"),
        ([("a picture", 0)], "float tensor"),
        ([(images(batch=1, size=16)[0], 0)], r"float tensor \(3, 32, 32\), but it is float32 \(3, 16, 16\)"),
        ([(images(batch=1, size=32)[0].byte(), 0)], "uint8"),
        ([(images(batch=1, size=32)[0].long(), 0)], "int64"),
        (DataLoader(dataset("class token")), r"a dataset of \(image, label\).*DataLoader.*loader\.dataset"),
        (ChainDataset([]), "a dataset with a length"),
        (3, "a dataset with a length"),
        ([(images(batch=1, size=32)[0] * torch.nan, 0)], "finite.*NaN"),
    ],
)
def test_data_that_cannot_be_recorded_is_refused(data, words):
    with pytest.raises(ValueError, match=f"record_coalitions: argument `data` must be .*{words}"):
        fv.record_coalitions(converted("class token"), data)


def test_a_model_that_plays_no_game_is_refused():
    with pytest.raises(ValueError, match=r"`model` must be a SelfExplainingClassifier.*fv\.convert"):
        fv.record_coalitions(create("class token"), dataset("class token"))


def test_what_was_not_recorded_is_refused():
    data = dataset("class token")
    options = {"objective": fv.ExplainerObjective(), "epochs": 1, "batch_size": 5, "progress": False}
    with pytest.raises(ValueError, match=r"given labels.*fv\.record_coalitions"):
        fv.fit(converted("class token"), data, **options)
    recorded = fv.record_coalitions(converted("class token"), data, 2)
    for objective in (fv.TaskObjective(), fv.JointObjective(2)):
        with pytest.raises(ValueError, match=r"learns from labelled images.*ExplainerObjective"):
            fv.fit(converted("class token"), recorded, **options | {"objective": objective})
    votes = converted("average pooling", head="votes")
    with pytest.raises(ValueError, match="shares"):
        fv.fit(votes, fv.record_coalitions(votes, data, 2), **options)
