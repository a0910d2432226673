import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file

from fastshap_vision import Explanation, Preprocessing, SelfExplainingClassifier, recipe
from fastshap_vision.cli.flags import in_flags
from fastshap_vision.cli.main import _parser, main

# Four players, so that every coalition can be tried in no time.
NO_SIZE = {"input_size": 3, "mean": [0], "std": [1], "crop_pct": 1, "interpolation": "bilinear", "crop_mode": "center"}
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
    """The one line that a command leaves on stderr when it fails; it speaks of no Python."""
    try:
        found = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert found == code, captured
    assert captured.err.startswith("fastshap")
    assert captured.err.count("\n") == 1
    words = re.sub(r"(?<!\w)'[^']*'|--model-kwargs [\w=]+|expected key=value", "", captured.err)  # names, paths
    of_python = re.search(r"\bfv\.|\bNone\b|Traceback|`|[a-z]=['\w]", words)
    assert of_python is None or "no record of" in words, words  # whose fields have Python's names
    return captured.err


def test_how_a_step_is_computed_reaches_training(pictures, tmp_path, monkeypatch):
    asked = {}

    def fit(*arguments, **options):
        asked.update(options)
        raise ValueError("enough")

    monkeypatch.setattr("fastshap_vision.cli.commands.fit", fit)
    for flags in ([], ["--compile"], ["--grad-checkpointing"]):
        main([*TRAIN, "--data-dir", str(pictures), "--output", str(tmp_path / "none"), *flags])
        assert asked["compile"] is (True if "--compile" in flags else None)  # None: as accelerate says
        assert asked["grad_checkpointing"] is ("--grad-checkpointing" in flags)


def test_train_writes_a_run(run, pictures, tmp_path, capsys):
    record = json.loads((run / "run.json").read_text())
    assert record["classes"] == ["ant", "bee", "cow"]
    assert record["arguments"]["lr"] == 0.001
    assert record["preprocessing"]["input_size"] == [1, 16, 16]
    kept = SelfExplainingClassifier.from_pretrained(run).preprocessing
    assert kept == Preprocessing.from_dict(record["preprocessing"])
    assert record["versions"]["timm"]
    assert len((run / "summary.csv").read_text().splitlines()) == 2
    model = SelfExplainingClassifier.from_pretrained(run)
    assert (model.players, model.num_classes) == (4, 3)
    again = [*TRAIN, "--data-dir", pictures, "--output", run]
    assert "resume" in fails(capsys, again)
    assert main([str(argument) for argument in [*again, "--resume"]]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "lr was 0.001 and is 0.5" in fails(capsys, [*again, "--resume", "--lr", "0.5"])
    changed = {
        ("--no-aug",): "data.augment was True and is False",
        ("--aa", "rand-m9-mstd0.5-inc1"): "data.augment was True and is {'auto_augment': 'rand-m9-mstd0.5-inc1'}",
        ("--reprob", "0.25"): "data.augment was True and is {'re_prob': 0.25}",
        ("--resize", "torch"): "data.resize was 'pillow' and is 'torch'",
        ("--crop-pct", "0.5"): "data.preprocessing.crop_pct was 0.9 and is 0.5",
        ("--drop-path", "0.5"): "'drop_path_rate': 0.5",
        ("--removal", "pixel"): "model.removal was 'token' and is 'pixel'",
        ("--backbone-gradient", "0.5"): "model.backbone_gradient was 0.0 and is 0.5",
        ("--class-map", str(tmp_path / "map.txt")): "data.classes was",
    }
    (tmp_path / "map.txt").write_text("bee\nant\ncow\n")
    for flags, words in changed.items():
        assert words in fails(capsys, [*again, "--resume", *flags]), flags
    assert json.loads((run / "run.json").read_text()) == record


def test_the_explainer_of_a_run_is_trained_and_all_else_stays(run, tmp_path, capsys):
    output = tmp_path / "explained"
    arguments = ["train-explainer", "--checkpoint", str(run), "--coalitions", "6", "--epochs", "2", "--batch-size", "4"]
    assert main([*arguments, "--lr", "0.01", "--output", str(output)]) == 0
    assert "explained in 2 epochs" in capsys.readouterr().out
    before, after = (SelfExplainingClassifier.from_pretrained(folder).state_dict() for folder in (run, output))
    last = load_file(output / "checkpoints" / "epoch_0002" / "model.safetensors")
    assert last["head.shares.weight"].abs().max() > 0
    encoder = [name for name in before if name.startswith("backbone.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    record = json.loads((output / "run.json").read_text())
    assert record["arguments"]["checkpoint"] == str(run)
    assert record["arguments"]["coalitions"] == 6
    assert "regression_weight" not in record["arguments"]
    assert record["arguments"]["mirror"] is True
    images = len(load_file(output / "coalitions" / "000000.safetensors")["bits"])
    assert main([*arguments, "--epochs", "1", "--no-mirror", "--output", str(tmp_path / "less")]) == 0
    assert images == 2 * len(load_file(tmp_path / "less" / "coalitions" / "000000.safetensors")["bits"])
    config = json.loads((output / "config.json").read_text())
    assert config["preprocessing"] == record["preprocessing"]
    assert (config["head_depth"], config["intermediates"]) == (2, True)
    assert main(["evaluate", "--checkpoint", str(output), "--num-images", "2"]) == 0


def test_the_explainers_coalitions_are_recorded_once(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "explained"
    arguments = ["train-explainer", "--checkpoint", str(run), "--coalitions", "6", "--epochs", "1", "--batch-size", "4"]
    arguments += ["--no-intermediates", "--head-depth", "0", "--output", str(output)]
    assert main(arguments) == 0
    assert (output / "coalitions" / "manifest.json").is_file()

    def write_shard(*_, **__):
        raise AssertionError("recorded again")

    monkeypatch.setattr("fastshap_vision.data.record.write_shard", write_shard)
    assert main([*arguments, "--resume"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert "coalitions was 6 and is 8" in fails(capsys, [*arguments, "--resume", "--coalitions", "8"])
    assert "already holds a run" in fails(capsys, arguments)
    assert "folder of its own" in fails(capsys, [*arguments, "--output", str(run)])


def test_recordings_are_made_for_train_explainer(run, tmp_path, capsys, monkeypatch):
    output = tmp_path / "explained"
    common = ["--checkpoint", str(run), "--coalitions", "6", "--output", str(output)]
    features = [*common, "--store", "features", "--shard", "3", "--batch-size", "2", "--precision", "same"]
    assert main(["record", *features]) == 0
    assert "recorded 6 coalitions of" in capsys.readouterr().out
    assert "features" in load_file(output / "coalitions" / "000000.safetensors")
    assert "seed was 0 and is 1" in fails(capsys, ["record", *features, "--seed", "1"])
    monkeypatch.delattr("fastshap_vision.data.record.write_shard")  # nothing is recorded again
    assert main(["train-explainer", *common, "--epochs", "1", "--batch-size", "4"]) == 0
    monkeypatch.undo()
    capsys.readouterr()
    values = ["record", "--checkpoint", str(run), "--output", str(tmp_path / "top")]
    assert "--top-classes must be a whole number from 1 to 3" in fails(capsys, [*values, "--top-classes", "4"])
    assert main([*values, "--top-classes", "2"]) == 0
    assert load_file(tmp_path / "top" / "coalitions" / "000000.safetensors")["classes"].shape[1] == 2
    assert "classes" not in load_file(tmp_path / "top" / "held_out" / "000000.safetensors")


@pytest.mark.parametrize("command", ["record", "train-explainer"])
def test_votes_need_no_explainer(command, run, tmp_path, capsys, monkeypatch):
    model = SimpleNamespace(head=torch.nn.Identity())
    voting = SimpleNamespace(model=model, arguments={"dataset": "digits"}, data_dir=None, dataset=lambda *_: None)
    monkeypatch.setattr("fastshap_vision.cli.commands.Run.read", lambda *_: voting)
    arguments = [command, "--checkpoint", run, "--output", tmp_path / "none"]
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
    command = [*TRAIN, "--data-dir", str(pictures), "--output", str(tmp_path), "--removal", "cell"]
    assert main(command) == 0
    assert SelfExplainingClassifier.from_pretrained(tmp_path).removal == "cell"
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["removal"] == "cell"


def test_explain_test_images(run, tmp_path, capsys):
    command = ["explain", "--checkpoint", run, "--output", tmp_path, "--num-images", "3", "--target-class", "2"]
    assert main([str(argument) for argument in command]) == 0
    assert "3 pictures" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_explain_many_images(run, pictures, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "bad.png").write_bytes(b"")
    sources = ["--images", str(pictures / "val"), str(tmp_path / "more")]
    command = ["explain", "--checkpoint", str(run), *sources, "--batch-size", "4", "--workers", "1"]
    assert main([*command, "--top-k", "2", "--output", str(tmp_path / "out.parquet")]) == 0
    said = capsys.readouterr().out
    assert said == f"explained 9 of 10 images in {tmp_path}/out.parquet; 1 could not be read, and say why\n"
    rows = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert rows[0]["image"] == str(pictures / "val" / "ant" / "0.png")
    assert set(rows[0]["names"]) < {"ant", "bee", "cow"}
    assert [len(values) for values in rows[0]["values"]] == [4, 4]
    assert main([*command, "--top-k", "all", "--output", str(tmp_path / "all")]) == 0
    assert sorted(path.name for path in (tmp_path / "all").glob("[0-9]*")) == ["000000.safetensors"]
    many = ["explain", "--checkpoint", run, "--images", pictures, "--output", tmp_path / "x.parquet"]
    assert "it can't be combined with --target-class" in fails(capsys, [*many, "--target-class", "bee"])
    many[-1] = tmp_path / "x"
    line = fails(capsys, many)
    assert "--output must be a file that ends in .parquet" in line
    assert "pass --top-k all" in line


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


OUTPUT = ("train", "--output", "x")
EXPLAINER = ("train-explainer", "--checkpoint", "x", "--output", "y")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required"),
        (("paint",), "invalid choice: 'paint'"),
        (("train",), "required: --output"),
        ((*OUTPUT, "--lr", "fast"), "--lr: expected a number above 0, but got 'fast'"),
        ((*OUTPUT, "--lr", "nan"), "--lr: expected a number above 0"),
        ((*OUTPUT, "--lr", "0"), "--lr: expected a number above 0"),
        ((*OUTPUT, "--weight-decay", "-1"), "--weight-decay: expected a number from 0"),
        ((*OUTPUT, "--warmup-epochs", "inf"), "--warmup-epochs: expected a number from 0"),
        ((*OUTPUT, "--clip-grad", "0"), "--clip-grad: expected a number above 0"),
        ((*OUTPUT, "--regression-weight", "-1"), "--regression-weight: expected a number from 0"),
        ((*OUTPUT, "--masked-task-weight", "nan"), "--masked-task-weight: expected a number from 0"),
        ((*OUTPUT, "--backbone-gradient", "2"), "--backbone-gradient: expected a number from 0 to 1, but got '2'"),
        ((*OUTPUT, "--regression-ramp", "0", "7"), "--regression-ramp: expected a number from 0 to 1"),
        ((*OUTPUT, "--regression-ramp", "0.5", "0.2"), "argument --regression-ramp must be (start, end)"),
        ((*OUTPUT, "--epochs", "0"), "--epochs: expected a whole number from 1"),
        ((*OUTPUT, "--batch-size", "1.5"), "--batch-size: expected a whole number from 1"),
        ((*OUTPUT, "--batch-size", "2000"), "(--batch-size 2000, 1 process). Lower --batch-size to at most 1437"),
        ((*OUTPUT, "--coalitions", "0"), "--coalitions: expected a whole number from 1"),
        ((*OUTPUT, "--seed", "-1"), "--seed: expected a whole number from 0 to 4294967295"),
        ((*OUTPUT, "--seed", "4294967296"), "--seed: expected a whole number from 0 to 4294967295"),
        ((*OUTPUT, "--workers", "-1"), "--workers: expected a whole number from 0"),
        ((*OUTPUT, "--img-size", "-3"), "--img-size: expected a whole number from 1 to 16384, but got '-3'"),
        ((*OUTPUT, "--img-size", "1000000"), "--img-size: expected a whole number from 1 to 16384"),
        ((*OUTPUT, "--num-classes", "0"), "--num-classes: expected a whole number from 1"),
        ((*OUTPUT, "--num-classes", "4"), "the test data has 10 classes, but the model has 4 outputs"),
        ((*OUTPUT, "--num-classes", "4"), "Build the model with --num-classes 10"),
        ((*OUTPUT, "--in-chans", "2"), "--in-chans: invalid choice"),
        ((*OUTPUT, "--opt", "adamww"), "--opt = 'adamww'"),
        ((*OUTPUT, "--dataset", "mnist"), "--dataset: expected one of digits, folder, tar, torch/…"),
        ((*OUTPUT, "--dataset", "folder"), "Pass --data-dir"),
        ((*OUTPUT, "--dataset", "folder", "--data-dir", "absent"), "there is no folder 'absent'. Check --data-dir"),
        ((*OUTPUT, "--model-kwargs", "depth"), "--model-kwargs: expected key=value, but got 'depth'"),
        ((*OUTPUT, "--model-kwargs", "wings=2"), "timm cannot build"),
        ((*OUTPUT, "--model-kwargs", "embed_dim=0"), "Check --model-kwargs and --img-size"),
        ((*OUTPUT, "--model-kwargs", "depth=none"), "Check --model-kwargs and --img-size"),
        ((*OUTPUT, "--model-kwargs", "num_classes=5"), "argument --model-kwargs: --num-classes has a flag of its own"),
        ((*OUTPUT, "--model", "nonsense"), "timm has no model 'nonsense'"),
        ((*OUTPUT, "--model", "vit_smal_patch16_224"), "Did you mean vit_small_patch16_224"),
        ((*OUTPUT, "--model", "vit_tiny_patch16_224"), "two are needed"),
        ((*OUTPUT, "--model", "vit_tiny_patch16_224"), "Pass --img-size 32, or make the patches smaller"),
        ((*OUTPUT, "--model", "resnet18"), "Pass --img-size 64"),
        ((*OUTPUT, "--model", "mixer_s32_224", "--img-size", "32"), "Supported: timm"),
        ((*OUTPUT, "--model", "resnet18", "--removal", "token"), "Or pass --removal cell, or leave --removal out"),
        ((*OUTPUT, "--removal", "stem"), "Argument --removal can be 'stem' for convolutional networks"),
        (
            (*OUTPUT, "--model", "resnet18", "--img-size", "64", "--base", "votes", "--removal", "pixel"),
            "Use --base even",
        ),
        ((*OUTPUT, "--head", "nose"), "--head: invalid choice"),
        ((*OUTPUT, "--head", "votes", "--removal", "pixel"), "Use --head shares, or --removal cell"),
        ((*OUTPUT, "--removal", "blur"), "--removal: invalid choice"),
        ((*OUTPUT, "--resume", "absent"), "or leave --resume out to start anew"),
        (("train", "--output", "/dev/null/run"), "argument --output: '/dev/null' is no folder that can be written to"),
        ((*EXPLAINER, "--epochs", "none"), "--epochs: expected a whole number from 1"),
        ((*EXPLAINER, "--coalitions", "1"), "--coalitions: expected a whole number from 2"),
        (EXPLAINER, "argument --checkpoint: there is no run in 'x'"),
        (("explain", "--checkpoint", "absent", "--output", "x"), "there is no run in 'absent'"),
        (("explain", "--checkpoint", "/dev/null", "--output", "x"), "there is no run in '/dev/null'"),
        (("explain", "--checkpoint", "x", "--output", "/dev/null"), "argument --output: '/dev/null' is no folder"),
        (("explain", "--checkpoint", "x", "--output", "x", "--device", "meta"), "cannot compute on 'meta'"),
        (("explain", "--checkpoint", "x", "--output", "x", "--device", "abacus"), "cannot compute on 'abacus'"),
        (
            ("explain", "--checkpoint", "x", "--output", "y", "--top-k", "few"),
            "--top-k: expected a whole number from 1",
        ),
        (("evaluate", "--checkpoint", "absent", "--num-images", "0"), "--num-images: expected a whole number from 1"),
        (("evaluate", "--checkpoint", "absent", "--seed", "9" * 99), "--seed: expected a whole number from 0"),
    ],
)
def test_mistakes_are_one_line_in_the_words_of_the_command_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, arguments)
    assert message in line
    assert {path.name for path in tmp_path.rglob("*")} <= {"x", "run.json", "checkpoints", ".lock"}


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("fit: argument `lr` must be above 0.", "argument --lr must be above 0."),
        ("Preprocessing.from_dict: argument `mean` is wrong.", "argument `mean` is wrong."),
        ("Lower lr or the objective's regression_weight.", "Lower --lr or the objective's --regression-weight."),
        ("Pass clip_grad=1.0 or batch_size 4.", "Pass --clip-grad 1.0 or --batch-size 4."),
        ("in '/data/batch_size/clip_grad=1'", "in '/data/batch_size/clip_grad=1'"),
        ("Use global_pool='avg', img_size=32.", "Use --model-kwargs global_pool=avg, --img-size 32."),
        ("Use intermediates=False; compile=True", "Use no --intermediates; --compile"),
        ("Use `intermediates=False`.", "Use no --intermediates."),
        ("aug=False", "--no-aug"),
        ("resume='auto' takes the one before", "--resume takes the one before"),
        ("two\nlines of `sched`", "two lines of --sched"),
    ],
)
def test_messages_in_flags(said, meant):
    assert in_flags(said, _parser().parse_args([*OUTPUT]).parser) == meant


def test_wrong_values_reach_the_user(pictures, run, tmp_path, capsys):
    base = [*TRAIN, "--data-dir", pictures, "--output", tmp_path / "run"]
    assert "Lower --batch-size to at most 12" in fails(capsys, [*base, "--batch-size", "64"])
    assert "--num-classes 3" in fails(capsys, [*base, "--num-classes", "4"])
    assert "Try adamw" in fails(capsys, [*base, "--opt", "adamww"])
    explain = ["explain", "--checkpoint", run, "--output", tmp_path / "out"]
    assert "Try ant, bee, cow" in fails(capsys, [*explain, "--target-class", "dodo"])
    assert "there is no image" in fails(capsys, [*explain, tmp_path / "absent.png"])
    (tmp_path / "text.png").write_text("no image")
    assert "text.png' is not an image that can be read" in fails(capsys, [*explain, tmp_path / "text.png"])
    assert "is not an image" in fails(capsys, [*explain, tmp_path / "text.png", "--data-dir", tmp_path])
    assert "there is no folder" in fails(capsys, [*explain, "--data-dir", tmp_path / "absent"])
    few = ["evaluate", "--checkpoint", run, "--reference", "kernel_shap", "--coalitions", "2"]
    assert "argument --coalitions must be a number of coalitions that determine 4 Shapley values" in fails(capsys, few)
    explainer = ["train-explainer", "--checkpoint", run, "--output", tmp_path / "explained"]
    assert "argument --coalitions must be even" in fails(capsys, [*explainer, "--coalitions", "7"])
    assert not (tmp_path / "explained" / "coalitions").exists()


def test_an_unreadable_image_stops_a_run_with_workers(pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "pictures")
    (tmp_path / "pictures" / "train" / "bee" / "2.png").write_bytes(b"no image")
    arguments = [*TRAIN, "--data-dir", tmp_path / "pictures", "--output", tmp_path / "run", "--workers", "1"]
    message = fails(capsys, arguments).splitlines()[-1]
    assert message.startswith(f"fastshap train: error: '{tmp_path}/pictures/train/bee/2.png' is not an image")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ("[]", "TypeError"),
        ({"classes": None}, "its classes are no list of names"),
        ({"classes": [1, 2, 3]}, "its classes are no list of names"),
        ({"classes": []}, "its classes are no list of names"),
        ({"arguments": None}, "TypeError"),
        ({"arguments": {}}, "KeyError: 'dataset'"),
        ({"arguments": {"dataset": "mnist", "model": "x", "data_dir": None}}, "its dataset or model is unknown"),
        ({"arguments": {"dataset": "digits", "model": "x", "data_dir": 3}}, "its data folder is no path"),
        ({"preprocessing": None}, "argument `record` must be a dict"),
        ({"preprocessing": NO_SIZE}, "argument `input_size` must be"),
    ],
)
@pytest.mark.parametrize("command", ["explain", "evaluate", "train-explainer"])
def test_a_damaged_record_of_a_run_is_refused(run, tmp_path, capsys, command, change, message):
    folder = tmp_path / "run"
    folder.mkdir()
    record = json.loads((run / "run.json").read_text())
    (folder / "run.json").write_text(change if isinstance(change, str) else json.dumps(record | change))
    output = () if command == "evaluate" else ("--output", tmp_path / "out")
    line = fails(capsys, [command, "--checkpoint", folder, *output])
    assert f"{str(folder / 'run.json')!r} is no record of fastshap train" in line
    assert message in line


def sums(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_explain_never_overwrites_what_it_did_not_write(run, pictures, tmp_path, capsys):
    one = tmp_path / "one.png"
    shutil.copy(pictures / "val" / "ant" / "0.png", one)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "two.safetensors").write_bytes(b"weights of another")
    shutil.copy(one, tmp_path / "two.png")
    before = sums(tmp_path)
    for output in (tmp_path, tmp_path / "link", tmp_path / "new" / ".."):
        line = fails(capsys, ["explain", one, "--checkpoint", run, "--output", output])
        assert "one.png' exists, and would be overwritten. Choose another folder" in line
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "one.safetensors").write_bytes(b"weights of another")
    assert "one.safetensors' exists" in fails(
        capsys, ["explain", one, "--checkpoint", run, "--output", tmp_path / "out"]
    )
    assert before.items() <= sums(tmp_path).items()
    # Its own explanations it replaces, but for one that is explained now.
    command = ["explain", str(one), "--checkpoint", str(run), "--output", str(tmp_path / "again")]
    assert main(command) == main(command) == 0
    command[1] = tmp_path / "again" / "one.png"
    assert "one.png' exists" in fails(capsys, command)


def test_train_leaves_the_run_json_of_another_program(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"name": "another"}')
    assert "run.json' exists, and fastshap train did not write it" in fails(capsys, ["train", "--output", tmp_path])
    assert (tmp_path / "run.json").read_text() == '{"name": "another"}'


def test_a_second_run_changes_nothing_in_the_folder_of_a_first(pictures, tmp_path, capsys, monkeypatch):
    """The first has no checkpoint yet, but holds the folder."""
    monkeypatch.setattr("fastshap_vision.training.checkpoint.SECONDS_TO_WAIT", 0.0)
    begun = [*TRAIN, "--data-dir", pictures, "--output", tmp_path / "run"]

    def stopped(self, *_):
        raise ValueError("enough")

    with monkeypatch.context() as patch:
        patch.setattr("fastshap_vision.training.run.TrainingRun.train_epoch", stopped)
        assert "enough" in fails(capsys, begun)
    before = sums(tmp_path / "run")
    assert "run.json" in {path.name for path in before}
    with FileLock(tmp_path / "run" / ".lock"):
        assert "another run writes into" in fails(capsys, [*begun, "--lr", "0.5"])
    assert sums(tmp_path / "run") == before


def test_every_image_has_a_picture_of_its_own(run, pictures, tmp_path):
    names = ("a/x.png", "b/x.png", "c/x_0.png", "d/X.png", "e/x_1_0.png", "f/y.png")
    for name in names:
        (tmp_path / name).parent.mkdir()
        shutil.copy(pictures / "val" / "ant" / "0.png", tmp_path / name)
    images = [str(tmp_path / name) for name in names]
    assert main(["explain", *images, "--checkpoint", str(run), "--output", str(tmp_path / "out")]) == 0
    written = {path.stem.casefold() for path in (tmp_path / "out").glob("*.png")}
    assert len(written) == len(names)
    assert {"x_0", "y"} <= written


def test_train_works_with_its_own_defaults(tmp_path, capsys):
    output = tmp_path / "run"
    assert main(["train", "--output", str(output), "--epochs", "1"]) == 0
    record = json.loads((output / "run.json").read_text())["arguments"]
    assert (record["model"], record["model_kwargs"]["patch_size"]) == ("vit_tiny_patch16_224", 2)
    few = ("--num-images", "1", "--reference", "kernel_shap", "--coalitions", "128")
    assert main(["evaluate", "--checkpoint", str(output), *few]) == 0
    explained = ["train-explainer", "--checkpoint", str(output), "--coalitions", "2", "--output", str(output / "a")]
    assert main([*explained, "--epochs", "1"]) == 0
    found = json.loads((output / "a" / "run.json").read_text())["arguments"]
    assert found["mirror"] is False
    assert {name: found[name] for name in recipe.TRAINING} == recipe.TRAINING | {"epochs": 1}
