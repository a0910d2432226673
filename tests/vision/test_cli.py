import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastshap_vision import Explanation, SelfExplainingClassifier
from fastshap_vision.cli import main

# Four players, so that every coalition can be tried in no time.
TRAIN = [
    *("train", "--dataset", "folder", "--img-size", "16", "--in-chans", "1", "--model", "vit_tiny_patch16_224"),
    *("--coalitions", "2", "--epochs", "1", "--batch-size", "4", "--lr", "0.001"),
    *("--model-kwargs", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"),
]


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Threads only slow down models as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 3)):
        for name in ("ant", "bee", "cow"):
            (root / split / name).mkdir(parents=True)
            for copy in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{copy}.png")
    return root


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
    """The folder of a run of one epoch."""
    output = tmp_path_factory.mktemp("cli") / "run"
    assert main([*TRAIN, "--data-dir", str(pictures), "--output", str(output)]) == 0
    return output


def test_the_shares_read_every_stage_when_asked_to(pictures, tmp_path):
    arguments = [*TRAIN, "depth=2", "--intermediates", "--head-depth", "0", "--data-dir", str(pictures)]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    found = list((tmp_path / "run").rglob("config.json"))
    assert found
    for path in found:
        model = SelfExplainingClassifier.from_pretrained(path.parent)
        assert model.game.intermediate_widths == [16]
        assert model.config["head_depth"] == 0


def fails(capsys, arguments, code=2):
    """The one line that a command leaves on stderr when it fails."""
    try:
        found = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == code, captured
    assert captured.err.startswith("fastshap")
    assert captured.err.count("\n") == 1
    return captured.err


def test_how_a_step_is_computed_reaches_training(pictures, tmp_path, monkeypatch):
    asked = {}

    def fit(*arguments, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr("fastshap_vision.cli.fit", fit)
    for flags in ([], ["--compile"], ["--grad-checkpointing"]):
        main([*TRAIN, "--data-dir", str(pictures), "--output", str(tmp_path / "none"), *flags])
        assert asked["compile"] is ("--compile" in flags)
        assert asked["grad_checkpointing"] is ("--grad-checkpointing" in flags)


def test_train_writes_a_run(run, pictures, capsys):
    record = json.loads((run / "run.json").read_text())
    assert record["classes"] == ["ant", "bee", "cow"]
    assert record["arguments"]["lr"] == 0.001
    assert record["preprocessing"]["input_size"] == [1, 16, 16]
    assert record["versions"]["timm"]
    assert len((run / "summary.csv").read_text().splitlines()) == 2
    model = SelfExplainingClassifier.from_pretrained(run)
    assert (model.players, model.num_classes) == (4, 3)
    again = [*TRAIN, "--data-dir", pictures, "--output", run]
    assert "resume" in fails(capsys, again)
    assert main([str(argument) for argument in [*again, "--resume"]]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "lr was 0.001 and is 0.5" in fails(capsys, [*again, "--resume", "--lr", "0.5"])
    assert json.loads((run / "run.json").read_text()) == record


def test_the_explainer_of_a_run_is_trained_and_all_else_stays(run, tmp_path, capsys):
    output = tmp_path / "explained"
    arguments = ["train-explainer", "--checkpoint", str(run), "--coalitions", "6", "--epochs", "2", "--batch-size", "4"]
    assert main([*arguments, "--lr", "0.01", "--output", str(output)]) == 0
    assert "after 2 epochs" in capsys.readouterr().out
    before, after = (SelfExplainingClassifier.from_pretrained(folder).state_dict() for folder in (run, output))
    assert after["shares.weight"].abs().max() > 0
    encoder = [name for name in before if name.startswith("backbone.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    record = json.loads((output / "run.json").read_text())
    assert record["arguments"]["checkpoint"] == str(run)
    assert record["arguments"]["coalitions"] == 6
    assert "regression_weight" not in record["arguments"]
    assert record["arguments"]["mirror"] is True
    images = len(load_file(output / "games.safetensors")["bits"])
    assert main([*arguments, "--epochs", "1", "--no-mirror", "--output", str(tmp_path / "less")]) == 0
    assert images == 2 * len(load_file(tmp_path / "less" / "games.safetensors")["bits"])
    config = json.loads((output / "config.json").read_text())
    assert (config["head_depth"], config["intermediates"]) == (2, True)
    assert main(["evaluate", "--checkpoint", str(output), "--num-images", "2"]) == 0


def test_the_explainers_games_are_played_once(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "explained"
    arguments = ["train-explainer", "--checkpoint", str(run), "--coalitions", "6", "--epochs", "1", "--batch-size", "4"]
    arguments += ["--no-intermediates", "--head-depth", "0", "--output", str(output)]
    assert main(arguments) == 0
    assert (output / "games.safetensors").is_file()

    def play(*_, **__):
        raise AssertionError("played again")

    monkeypatch.setattr("fastshap_vision.cli.play", play)
    assert main([*arguments, "--resume"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "have 6" in fails(capsys, [*arguments, "--resume", "--coalitions", "8"])
    assert "already holds a run" in fails(capsys, arguments)
    assert "folder of its own" in fails(capsys, [*arguments, "--output", str(run)])


def test_votes_need_no_explainer(run, tmp_path, capsys, monkeypatch):
    voting = SimpleNamespace(model=SimpleNamespace(head="votes"))
    monkeypatch.setattr("fastshap_vision.cli._Run.read", lambda *_: voting)
    arguments = ["train-explainer", "--checkpoint", run, "--output", tmp_path / "none"]
    assert "votes are its explanation already" in fails(capsys, arguments)
    assert not (tmp_path / "none").exists()


def test_explain_image_files(run, pictures, tmp_path, capsys):
    images = [pictures / "val" / "ant" / "0.png", pictures / "val" / "bee" / "0.png"]
    command = ["explain", *images, "--checkpoint", run, "--output", tmp_path / "out", "--target-class", "bee"]
    assert main([str(argument) for argument in command]) == 0
    assert capsys.readouterr().out.count("0_") == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "0_0.png",
        "0_0.safetensors",
        "0_1.png",
        "0_1.safetensors",
    ]
    explanation = Explanation.load(tmp_path / "out" / "0_1.safetensors")
    assert explanation.values.shape == (1, 4, 3)
    assert explanation.efficiency_gap() < 1e-5
    with Image.open(tmp_path / "out" / "0_1.png") as picture:
        assert min(picture.size) > 200


def test_train_with_another_removal(pictures, tmp_path):
    command = [*TRAIN, "--data-dir", str(pictures), "--output", str(tmp_path), "--removal", "pixel"]
    assert main(command) == 0
    assert SelfExplainingClassifier.from_pretrained(tmp_path).removal == "pixel"
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["removal"] == "pixel"


def test_explain_test_images(run, tmp_path, capsys):
    command = ["explain", "--checkpoint", run, "--output", tmp_path, "--num-images", "3", "--target-class", "2"]
    assert main([str(argument) for argument in command]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_evaluate(run, capsys):
    command = ["evaluate", "--checkpoint", str(run), "--num-images", "3"]
    assert main(command) == 0
    table = capsys.readouterr().out
    assert "on 9 test images" in table
    assert "exact Shapley values: 3 images, 4 players, 3 classes" in table
    assert main([*command, "--json", "--reference", "kernel_shap", "--coalitions", "64"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["test_images"] == 9
    assert record["fidelity"]["efficiency_gap"] < 1e-5
    assert record["fidelity"]["reference"] == "kernel_shap"


def test_info(capsys):
    assert main(["info"]) == 0
    shown = capsys.readouterr().out
    assert "timm" in shown
    assert "accelerate" in shown


def test_module_is_a_command():
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "fastshap_vision",
            "train",
            "--model",
            "vit_smal_patch16_224",
            "--output",
            "x",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("fastshap train: error: argument --model: timm has no model")
    assert "vit_small_patch16_224" in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["paint"], "invalid choice: 'paint'"),
        (["train"], "required: --output"),
        (["train", "--output", "x", "--lr", "fast"], "--lr: invalid float value: 'fast'"),
        (["train", "--output", "x", "--dataset", "mnist"], "--dataset: invalid choice: 'mnist'"),
        (["train", "--output", "x", "--model-kwargs", "depth"], "--model-kwargs: expected key=value, but got 'depth'"),
        (["train", "--output", "x", "--dataset", "cifar10"], "Pass data_dir"),
        (["train", "--output", "x", "--model", "nonsense"], "timm has no model 'nonsense'"),
        (["train", "--output", "x", "--model", "mixer_s32_224", "--img-size", "32"], "Supported: timm"),
        (["train", "--output", "x", "--model-kwargs", "wings=2"], "timm cannot build"),
        (["train", "--output", "x", "--img-size", "9"], "makes 0 x 0 patches"),
        (["train", "--output", "x", "--head", "nose"], "--head: invalid choice"),
        (["train", "--output", "x", "--removal", "blur"], "--removal: invalid choice"),
        (["train", "--output", "x", "--model", "resnet18", "--removal", "drop"], "can't play by token dropping"),
        (["explain", "--checkpoint", "absent", "--output", "x"], "no run in 'absent'"),
        (["evaluate", "--checkpoint", "absent", "--num-images", "0"], "--num-images: expected a whole number from 1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, arguments)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_wrong_values_reach_the_user(pictures, run, tmp_path, capsys):
    base = [*TRAIN, "--data-dir", pictures, "--output", tmp_path / "run"]
    assert "Lower batch_size to at most 12" in fails(capsys, [*base, "--batch-size", "64"])
    assert "`epochs`" in fails(capsys, [*base, "--epochs", "0"])
    assert "num_classes=3" in fails(capsys, [*base, "--num-classes", "4"])
    assert "Try adamw" in fails(capsys, [*base, "--opt", "adamww"])
    explain = ["explain", "--checkpoint", run, "--output", tmp_path / "out"]
    assert "Try ant, bee, cow" in fails(capsys, [*explain, "--target-class", "dodo"])
    assert "there is no image" in fails(capsys, [*explain, tmp_path / "absent.png"])
    assert "cannot compute on 'abacus'" in fails(capsys, [*explain, "--device", "abacus"])
