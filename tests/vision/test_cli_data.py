"""The command line's data, preprocessing and models."""

import io
import json
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from test_cli import fails

import fastshap_vision as fv
from fastshap_vision.cli.main import main

SMALL = ["--model-kwargs", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"]
SIZE = ["--img-size", "16", "--model", "vit_tiny_patch16_224", *SMALL]
TRAIN = ["train", *SIZE, "--coalitions", "2", "--epochs", "1", "--batch-size", "4"]


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
    for split in ("train", "val"):
        with tarfile.open(root / f"{split}.tar", "w") as tar:
            for name in ("ant", "bee", "cow"):
                (root / split / name).mkdir(parents=True)
                for copy in range(4):
                    path = root / split / name / f"{copy}.png"
                    Image.fromarray(generator.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(path)
                    tar.add(path, f"{name}/{copy}.png")
    return root


def run(*arguments):
    assert main([str(argument) for argument in arguments]) == 0


@pytest.fixture(scope="module")
def saved(pictures, tmp_path_factory):
    """What save_pretrained wrote: a model that no command trained."""
    torch.manual_seed(0)
    arguments = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    classifier = timm.create_model("vit_tiny_patch16_224", num_classes=3, **arguments)
    folder = tmp_path_factory.mktemp("saved") / "model"
    fv.convert(classifier).save_pretrained(folder)
    return folder


def test_a_tar_file_is_trained_on_and_explained(pictures, tmp_path, capsys):
    run(*TRAIN, "--dataset", "tar", "--data-dir", pictures, "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["classes"] == ["ant", "bee", "cow"]
    assert record["arguments"]["dataset"] == "tar"
    run("evaluate", "--checkpoint", tmp_path / "run", "--num-images", "1")
    assert "on 12 test images" in capsys.readouterr().out


def test_splits_and_class_maps_reach_the_data(pictures, tmp_path, capsys):
    (tmp_path / "map.txt").write_text("cow\nant\n")
    flags = ["--dataset", "folder", "--data-dir", pictures, "--class-map", tmp_path / "map.txt", "--val-split", "train"]
    run(*TRAIN, *flags, "--output", tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["classes"] == ["cow", "ant"]
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    run("evaluate", "--checkpoint", tmp_path / "run", "--num-images", "1")
    assert "on 8 test images" in capsys.readouterr().out  # of the training split, without bee
    refused = [*TRAIN, *flags[:-1], "nowhere", "--output", tmp_path / "other"]
    assert "no subfolder for the nowhere split" in fails(capsys, refused)


def test_hugging_faces_data_are_trained_on(tmp_path, capsys):
    datasets = pytest.importorskip("datasets")
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["ant", "bee"])}
    folder = tmp_path / "insects"
    folder.mkdir()
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 7, np.uint8)).save(file, "PNG")
    rows = {"picture": [{"bytes": file.getvalue(), "path": None}] * 8, "kind": [0, 1] * 4}
    for split in ("train", "validation"):
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    keys = ["--input-key", "picture", "--target-key", "kind", "--data-dir", tmp_path / "cache"]
    run(*TRAIN, "--dataset", f"hfds/{folder}", *keys, "--output", tmp_path / "run")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["classes"] == ["ant", "bee"]
    run("evaluate", "--checkpoint", tmp_path / "run", "--num-images", "1")
    assert "on 8 test images" in capsys.readouterr().out


def test_streams_and_unknown_data_are_refused(pictures, tmp_path, capsys):
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "part.tar", "w"):
        pass
    (tmp_path / "map.txt").write_text("0\n1\n")
    named = ["--dataset", "wds/part", "--train-split", "part.tar|4", "--val-split", "part.tar|4"]
    flags = [*named, "--data-dir", tmp_path, "--class-map", tmp_path / "map.txt"]
    line = fails(capsys, [*TRAIN, *flags, "--output", tmp_path / "run"])
    assert "argument --dataset: a stream has no index" in line
    assert "expected one of digits, folder, tar" in fails(capsys, [*TRAIN, "--dataset", "mnist", "--output", tmp_path])
    tar = [*TRAIN, "--dataset", "tar", "--data-dir", pictures, "--output", tmp_path / "run"]
    assert "--no-aug: --aa and --reprob change images" in fails(capsys, [*tar, "--no-aug", "--reprob", "0.5"])
    digits = [*TRAIN, "--crop-pct", "0.9", "--output", tmp_path / "run"]
    assert "--crop-pct: the digits are never cropped" in fails(capsys, digits)


@pytest.mark.parametrize(
    ("name", "flags"),
    [("resnet50.a1_in1k", []), ("resnet50.a1_in1k", ["--img-size", "288"]), ("vit_tiny_patch16_224", [])],
)
def test_pictures_are_prepared_as_the_model_expects(pictures, tmp_path, monkeypatch, name, flags):
    seen = {}

    def build(options, data):
        seen["data"] = data
        raise ValueError("enough")

    monkeypatch.setattr("fastshap_vision.cli.commands.build", build)
    data = ["--dataset", "folder", "--data-dir", pictures, "--output", tmp_path / "run"]
    arguments = ["train", "--model", name, "--pretrained", *data, *flags, "--aa", "rand-m9", "--reprob", "0.25"]
    main([str(argument) for argument in arguments])
    size = int(flags[1]) if flags else None
    assert seen["data"].preprocessing == fv.Preprocessing.of_model(name, size)
    steps = {type(step).__name__: step for step in seen["data"].transform.transforms}
    assert steps["RandomErasing"].probability == 0.25
    assert "RandAugment" in steps
    main([str(argument) for argument in [*arguments, "--crop-pct", "0.8"]])
    assert seen["data"].preprocessing.crop_pct == 0.8


def test_what_save_pretrained_wrote_is_explained(saved, pictures, tmp_path, capsys):
    output = tmp_path / "explained"
    command = [
        "train-explainer",
        "--checkpoint",
        saved,
        "--coalitions",
        "4",
        "--epochs",
        "1",
        "--batch-size",
        "4",
        "--output",
        output,
    ]
    assert "argument --dataset: only a run of fastshap train knows its data" in fails(capsys, command)
    command += ["--dataset", "folder", "--data-dir", pictures]
    run(*command)
    assert "as before" in capsys.readouterr().out
    before, after = load_file(saved / "model.safetensors"), load_file(output / "model.safetensors")
    encoder = [name for name in before if name.startswith("backbone.")]
    assert encoder
    assert all(torch.equal(before[name], after[name]) for name in encoder)
    loaded = fv.SelfExplainingClassifier.from_pretrained(output)
    assert loaded.preprocessing == fv.SelfExplainingClassifier.from_pretrained(saved).preprocessing
    run("evaluate", "--checkpoint", output, "--num-images", "1")
    (tmp_path / "two.txt").write_text("ant\nbee\n")
    two = [*command[:-1], pictures, "--class-map", tmp_path / "two.txt", "--output", tmp_path / "two"]
    assert "the data has 2 classes, but the model has 3 outputs" in fails(capsys, two)


def test_timms_weights_are_explained(pictures, tmp_path, capsys, monkeypatch):
    """Weights that need no network: what timm would load, made here."""
    made = []

    def create_model(name, pretrained=False, **options):
        made.append((name, pretrained))
        return build(name, num_classes=3, **{key: value for key, value in options.items() if key != "num_classes"})

    build = timm.create_model
    monkeypatch.setattr("fastshap_vision.models.backbone.timm.create_model", create_model)
    data = ["--dataset", "folder", "--data-dir", pictures]
    command = [
        "train-explainer",
        "--model",
        "test_vit",
        *data,
        "--coalitions",
        "4",
        "--epochs",
        "1",
        "--batch-size",
        "4",
    ]
    assert "Add --pretrained, or pass --checkpoint" in fails(capsys, [*command, "--output", tmp_path / "run"])
    run(*command, "--pretrained", "--output", tmp_path / "run")
    assert made[0] == ("test_vit", True)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["preprocessing"] == json.loads(json.dumps(fv.Preprocessing.of_model("test_vit").as_dict()))
    capsys.readouterr()
    features = ["train-explainer", "--model", "vit_small_patch14_dinov2", "--pretrained", *data]
    assert "have no classifier. Train one" in fails(capsys, [*features, "--output", tmp_path / "two"])
    unknown = ["train-explainer", "--model", "test_vitt", "--pretrained", *data]
    assert "Did you mean test_vit" in fails(capsys, [*unknown, "--output", tmp_path / "two"])
    both = [*command, "--checkpoint", tmp_path / "run", "--output", tmp_path / "two"]
    assert "not allowed with argument --model" in fails(capsys, both)
    assert "one of the arguments --checkpoint --model is required" in fails(
        capsys, ["train-explainer", "--output", tmp_path / "two"]
    )


def test_the_test_split_is_not_augmented_whatever_its_name(pictures, tmp_path, monkeypatch):
    seen = {}

    def fit(model, train_data, test_data, **_):
        seen["train"], seen["test"] = train_data, test_data
        raise ValueError("seen")

    shutil.copytree(pictures / "train", tmp_path / "data" / "train")
    shutil.copytree(pictures / "val", tmp_path / "data" / "holdout")
    monkeypatch.setattr("fastshap_vision.cli.commands.fit", fit)
    arguments = ["--dataset", "folder", "--data-dir", tmp_path / "data", "--val-split", "holdout"]
    assert main([str(part) for part in [*TRAIN, *arguments, "--output", tmp_path / "run"]]) == 2
    changes = {name: not torch.equal(data[0][0], data[0][0]) for name, data in seen.items()}
    assert changes == {"train": True, "test": False}
