"""bench.fidelity: the whole experiment on a few images, and what its report makes of results."""

import argparse
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from bench import tables
from bench.fidelity import archives
from bench.fidelity import experiment as program
from bench.fidelity import report as fidelity_report
from bench.fidelity import runs as fidelity_runs
from bench.fidelity.compare import Remembered
from bench.fidelity.methods import METHODS


def archive(path, count):
    """Noise with a bright square in one of two places, which is the class."""
    random, files, labels = np.random.default_rng(0), [], []
    for index in range(count):
        label = index % 2
        pixels = random.integers(0, 128, (32, 32, 3), dtype=np.uint8)
        pixels[12 * label : 12 * label + 12, :12] = 255
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        files.append(file.getvalue())
        labels.append(label)
    jpeg = np.frombuffer(b"".join(files), np.uint8)
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(path, jpeg=jpeg, offsets=offsets, labels=np.array(labels), classes=np.array(["up", "down"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    archive(path / "cifar10_train.npz", 64)
    archive(path / "cifar10_test.npz", 16)
    return path


def run(monkeypatch, folder, *options):
    places = ("--data", folder, "--runs", folder / "runs", "--output", folder / "results", "--pictures", folder)
    words = ["fidelity.py", "--budget", "tiny", "--networks", "vit", "--jobs", "1", *map(str, places), *options]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(program.fv, "keep_freed_memory", lambda: True)  # not for all tests of this process
    with pytest.raises(SystemExit) as stopped:
        program.main()
    return stopped.value.code


@pytest.fixture(scope="module")
def measured(folder):
    with pytest.MonkeyPatch.context() as monkeypatch:
        code = run(monkeypatch, folder)
    results = {path.stem: json.loads(path.read_text()) for path in (folder / "results" / "tiny").glob("*.json")}
    return code, results


def test_archives_are_decoded_and_augmented(folder):
    train, plain, test = (archives.load(folder, *way) for way in (("train", True), ("train",), ("test",)))
    assert (len(train), len(test)) == (64, 16)
    assert (test.classes, test.input_size) == (("up", "down"), (3, 32, 32))
    assert [label for _, label in test] == [0, 1] * 8
    with np.load(folder / "cifar10_test.npz") as arrays:
        file = arrays["jpeg"][arrays["offsets"][2] : arrays["offsets"][3]].tobytes()
    pixels = test.preprocessing.restore(test[2][0]).permute(1, 2, 0).numpy() * 255
    assert np.allclose(pixels, np.asarray(Image.open(io.BytesIO(file))), atol=1e-3)
    torch.manual_seed(0)
    assert not torch.equal(train[2][0], train[2][0])
    assert torch.equal(plain[2][0], plain[2][0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"must hold jpeg, offsets, labels, classes, but: .*labels"),
        ({"classes": np.array(["up"])}, "labels from 0 to 1 and the names of 1 classes"),
        ({"labels": np.zeros(3, int)}, "holds 4 images, 3 labels"),
        ({"classes": np.array(["up", {}], dtype=object)}, r"must hold .*allow_pickle=False"),
        ({"jpeg": np.zeros(8, np.uint8), "offsets": np.arange(0, 9, 2)}, "Pillow knows no such format"),
    ],
)
def test_wrong_archives_are_refused(tmp_path, changes, message):
    path = tmp_path / "cifar10_test.npz"
    with pytest.raises(ValueError, match=r"There is no archive .*Pass as --data"):
        archives.load(tmp_path, "test")
    archive(path, 4)
    arrays = dict(np.load(path)) | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=message):
        archives.load(tmp_path, "test")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="must hold"):
        archives.load(tmp_path, "test")


def test_every_run_of_the_budget_has_its_result(measured, folder):
    code, results = measured
    assert code == 0
    names = {"plain", "plain-half", "recipe", "fine-tuned", "fastshap"}
    assert set(results) == {f"vit-{name}-0" for name in names} | {"methods-vit-0"}
    for name in names:
        result = results[f"vit-{name}-0"]
        assert 0 <= result["accuracy"] <= 100
        assert result["fidelity"]["images"] == (1 if name == "fastshap" else 4)
        assert result["fidelity"]["efficiency_gap"] < 1e-5
        assert result["ms_per_explanation"] > 0
        assert 0 < result["time"]["ms_per_image"] < result["time"]["kernel_shap_ms_per_image"]
    for picture in ("fidelity_settings.png", "fidelity_curves.png", "fidelity_vit.png"):
        assert (folder / picture).stat().st_size > 5000


def test_models_that_share_an_encoder_are_set_beside_the_same_values(measured, folder):
    references = {
        name: measured[1][f"vit-{name}-0"]["fidelity"]["seconds"] for name in ("plain", "recipe", "fine-tuned")
    }
    assert references["plain"] == references["recipe"] != references["fine-tuned"]
    assert len(list((folder / "runs" / "coalitions").iterdir())) == 1
    assert (
        len(list((folder / "runs" / "games").iterdir())) == 4
    )  # the values of plain's game, of plain-half's, fine-tuned's and the surrogate's


def test_all_methods_are_compared_on_both_models(measured):
    rows = measured[1]["methods-vit-0"]["rows"]
    by_model = {
        model: {row["method"] for row in rows if row["model"] == model} for model in ("plain", "recipe", "fastshap")
    }
    assert by_model["fastshap"] == {"amortized_surrogate", "kernel_shap_surrogate"}
    assert by_model["recipe"] == by_model["plain"] | {"ours"}
    assert "amortized" in by_model["plain"]
    assert {row["evaluations"] for row in rows if row["method"] == "leave_one_out"} == {17}
    assert {"random", "kernel_shap_4096", "chefer", "grad_cam"} < by_model["plain"]
    for row in rows:
        assert row["difference"] == pytest.approx(row["insertion"] - row["deletion"], abs=1e-6)
        assert len(row["insertion_curve"]) == 17


def test_equal_coalitions_are_evaluated_once():
    asked = []

    class Game:
        players = 3

        def coalition_values(self, images, bits):
            asked.append(bits)
            return bits.double()

    game, first, second = Remembered(Game()), torch.tensor([[[1]]]), torch.tensor([[[6]]])
    for bits in (first, second, first.clone(), second):
        assert torch.equal(game.coalition_values(torch.ones(1), bits), bits.double())
    assert len(asked) == 2


def test_there_are_tables_of_it(measured, folder, monkeypatch):
    (folder / "fidelity").mkdir()
    (folder / "fidelity" / "small").symlink_to(folder / "results" / "tiny")
    monkeypatch.setattr(tables, "RESULTS", folder)
    shown = tables.fidelity_tables()
    row = next(line for line in shown.splitlines() if line.startswith("| ViT | the recipe |"))
    assert f"| {measured[1]['vit-recipe-0']['accuracy']:.2f} |" in row
    assert "| ViT: R², all classes | at least 0.9 |" in shown
    assert "fine-tuned" not in shown
    assert "| ViT | `fine-tuned` | together: from the plain model, λ 4 |" in tables.ablation_table("small")
    assert "| ViT | FastSHAP / ViT-Shapley |" in tables.fidelity_methods_table()


def test_what_has_a_result_is_not_run_again(measured, folder, monkeypatch):
    def fail(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(program, "train_classifier", fail)
    monkeypatch.setattr(program, "train_explainer", fail)
    monkeypatch.setattr(program, "compare_methods", fail)
    assert run(monkeypatch, folder) == 0


def test_another_recipe_is_another_run(monkeypatch, tmp_path):
    """In another folder, so that its training does not go on from the first one's checkpoints."""
    options = argparse.Namespace(budget="tiny", runs=tmp_path, output=tmp_path)

    def folders():
        return [program.folder_of(fidelity_runs.Run("vit", name, 0), options) for name in ("recipe", "plain")]

    before = folders()
    monkeypatch.setitem(fidelity_runs.SETTINGS, "recipe", fidelity_runs.SETTINGS["recorded-32"])
    after = folders()
    assert before[0] != after[0]
    assert before[1] == after[1]


def test_together_is_the_default_of_the_objective():
    found = vars(fidelity_runs.make_objective(fidelity_runs.Run("vit", "together", 0)))
    default = vars(fidelity_runs.fv.JointObjective())
    compared = [name for name, value in default.items() if not callable(value) and not name.startswith("_")]
    assert "regression_ramp" in compared
    for name in compared:
        assert found[name] == default[name], name


def test_a_setting_changes_what_it_names_and_nothing_else():
    found = {name: fidelity_runs.objective_of(fidelity_runs.Run("vit", name, 0)) for name in fidelity_runs.SETTINGS}
    assert found["recipe"] == found["depth-1"] == fidelity_runs.RECIPE
    assert found["recorded-32"] == {"coalitions": 32}
    assert found["together"] == fidelity_runs.TOGETHER
    assert found["M-2"] == fidelity_runs.TOGETHER | {"coalitions": 2}
    assert found["viashap"] == {"coalitions": 2}


def test_mirror_images_double_the_data_and_not_the_steps(folder):
    options, budget = argparse.Namespace(data=folder, budget="tiny"), fidelity_runs.BUDGETS["tiny"]
    unmirrored, recipe = (fidelity_runs.Run("vit", name, 0) for name in ("unmirrored", "recipe"))
    plain, both = program.load_train(unmirrored, options), program.load_train(recipe, options)
    assert len(both) == 2 * len(plain) == fidelity_runs.images_of(recipe, budget)
    for row, offset in ((3, 0), (3, len(plain))):
        (image, label), (expected, same) = both[row + offset], plain[row]
        assert label == same
        assert torch.equal(image.flip(-1) if offset else image, expected)
    steps = [len(data) * fidelity_runs.epochs_of(run, budget) for data, run in ((plain, unmirrored), (both, recipe))]
    assert steps[0] == steps[1]
    found = [fidelity_runs.evaluations_of(run, budget) for run in (unmirrored, recipe)]
    assert found[0] == found[1]


@pytest.mark.parametrize("network", ["vit", "cnn"])
@pytest.mark.parametrize("setting", fidelity_runs.SETTINGS)
def test_every_setting_has_a_model_of_the_same_backbone(network, setting):
    def backbone(name):
        run = fidelity_runs.Run(network, name, 0)
        return fidelity_runs.make_model(run, fidelity_runs.BUDGETS["tiny"], 10).backbone.state_dict()

    plain, found = backbone("plain"), backbone(setting)
    assert all(torch.equal(weight, found[name]) for name, weight in plain.items())


def test_what_others_start_from_is_trained_before_them():
    budget = fidelity_runs.BUDGETS["medium"]
    runs = fidelity_runs.runs_of(budget, ["vit", "cnn"], None, None)
    seen = set()
    for wave in program.waves(runs):
        for one in wave:
            start = fidelity_runs.SETTINGS[one.setting].starts_from
            assert start is None or (one.network, start, one.seed) in seen
        seen |= {(one.network, one.setting, one.seed) for one in wave}
    assert len(seen) == 2 * 3 * len(fidelity_runs.SETTINGS)


def test_the_explainer_is_given_as_many_evaluations_as_the_recipe():
    for name in ("medium", "full"):
        budget = fidelity_runs.BUDGETS[name]
        ours, theirs = (
            fidelity_runs.evaluations_of(fidelity_runs.Run("vit", setting, 0), budget)
            for setting in ("recipe", "fastshap")
        )
        assert theirs == pytest.approx(ours, rel=0.05)


def result(setting, seed, accuracy, r2, error=1.0, network="vit"):
    kernel_shap = [{"evaluations": n, "mean_squared_error": 2048 / n} for n in (512, 2048)]
    fidelity = {"r2": r2, "correlation_predicted": 0.9, "mean_squared_error": error}
    return {"network": network, "setting": setting, "seed": seed, "accuracy": accuracy, "fidelity": fidelity} | {
        "kernel_shap": kernel_shap,
        "ms_per_explanation": 4.0,
        "time": {"ms_per_image": 2.0, "kernel_shap_ms_per_image": 2048.0},
    }


def findings(tmp_path, results):
    for index, content in enumerate(results):
        (tmp_path / f"{index}.json").write_text(json.dumps(content))
    return fidelity_report.Findings(tmp_path)


def bar(found, words):
    return next(row for row in fidelity_report.judge(found) if words in row["what"])


def test_accuracy_is_compared_with_the_plain_model_of_the_same_seed(tmp_path):
    results = [result("plain", 0, 60.0, 0.0), result("plain", 1, 64.0, 0.0)]
    results += [result("recipe", 0, 60.5, 0.92), result("recipe", 1, 63.0, 0.96), result("recipe", 2, 99.0, 0.94)]
    found = findings(tmp_path, results)
    assert found.accuracy_difference("vit", "recipe") == (-0.25, pytest.approx(1.0607, abs=1e-4))
    assert bar(found, "ViT: accuracy minus plain")["met"]
    assert bar(found, "ViT: R², all classes")["measured"] == pytest.approx(0.94)
    assert bar(found, "CNN: R², all classes")["met"] is None


def test_kernel_shap_of_equal_error_is_carried_on_from_the_nearest_point(tmp_path):
    for error, evaluations in ((1.0, 2048), (0.5, 4096), (8.0, 256)):
        assert fidelity_report.equal_evaluations(result("recipe", 0, 0.0, 0.9, error)) == pytest.approx(evaluations)
    assert fidelity_report.time_ratio(result("recipe", 0, 0.0, 0.9)) == 1024


def test_post_hoc_methods_are_taken_on_the_model_that_suits_them(tmp_path):
    figures = {("plain", "occlusion"): 0.4, ("recipe", "occlusion"): 0.3, ("recipe", "random"): 0.0}
    figures |= {("plain", "grad_cam"): 0.1, ("recipe", "grad_cam"): 0.23}
    figures |= {("recipe", "ours"): 0.46, ("plain", "amortized"): 0.45, ("fastshap", "amortized_surrogate"): 0.7}
    figures |= {("fastshap", "kernel_shap_surrogate"): 0.5}  # of a game that is not ours
    rows = [
        {
            "model": model,
            "method": method,
            "name": method,
            "game": game,
            "evaluations": 1,
            "difference": figure,
            "aopc": figure / (2 if game == "own" else 1),
        }
        for (model, method), figure in figures.items()
        for game in ("own", "pixel")
    ]
    found = findings(tmp_path, [{"network": "cnn", "seed": 0, "rows": rows}])
    ours = bar(found, "CNN: insertion − deletion, own removal")
    assert (ours["measured"], ours["met"]) == (pytest.approx(1.15), True)
    assert bar(found, "CNN: insertion − deletion minus FastSHAP's")["measured"] == pytest.approx(0.01)
    assert bar(found, "CNN: AOPC, grey pixels: over the best post-hoc")["measured"] == pytest.approx(1.15)
    assert bar(found, "CNN: AOPC, own removal: over the best gradient")["measured"] == pytest.approx(2.0)
    assert bar(found, "ViT: AOPC, own removal: over the best gradient")["measured"] is None


def test_results_of_different_settings_are_not_averaged(tmp_path):
    old, new = (
        result("recipe", seed, 60.0, 0.9) | {"settings": {"epochs": epochs}} for seed, epochs in ((0, 6), (1, 24))
    )
    with pytest.raises(ValueError, match="vit-recipe were trained with different settings"):
        findings(tmp_path, [old, new])


def test_rivals_that_read_gradients_or_attention_are_methods():
    assert set(fidelity_report.GRADIENT_OR_ATTENTION) < set(METHODS)
