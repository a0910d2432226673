"""Coalitions that are recorded into a folder: whole files, several processes, stops, damage, and what is kept."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.utils.data import Subset
from vision_transformers import create, image_size, images, labelled

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.objectives.explainer import values_of

KINDS = ("class token", "average pooling", "resnet18")


def converted(kind, **options):
    return fv.convert(create(kind), img_size=image_size(kind), **options)


def dataset(kind, count=10):
    return labelled(images(count, image_size(kind)))


def record(folder, kind="class token", count=10, **options):
    options = {"output": folder, "coalitions": 4, "shard": 4, "batch_size": 3} | options
    return fv.record_coalitions(converted(kind), dataset(kind, count), **options)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


SHARDS = ["000000.safetensors", "000001.safetensors", "000002.safetensors", "manifest.json"]


def test_a_folder_holds_what_memory_would(tmp_path):
    in_memory, on_disk = record(None), record(tmp_path, dtype="float32")
    assert names(tmp_path) == SHARDS
    assert on_disk.digest == in_memory.digest
    assert torch.equal(on_disk.values, in_memory.values)
    rows = [9, 0, 4, 4, 3]
    for found, expected in zip(on_disk.__getitems__(rows), in_memory.__getitems__(rows), strict=True):
        assert torch.equal(found[0], expected[0])
        assert found[1]["label"] == expected[1]["label"]
        assert torch.equal(found[1]["values"], expected[1]["values"])
    half = record(tmp_path / "half")
    assert half.values.dtype == torch.float16
    assert torch.equal(half.values, in_memory.values.half())


def test_what_is_there_is_not_recorded_again(tmp_path, monkeypatch):
    whole = record(tmp_path / "whole")
    stopped, seen = tmp_path / "stopped", []
    values = fv.SelfExplainingClassifier.coalition_values

    def counted(self, images, *arguments, **options):
        seen.append(len(images))
        if len(seen) == 4:
            raise RuntimeError("stopped")
        return values(self, images, *arguments, **options)

    monkeypatch.setattr(fv.SelfExplainingClassifier, "coalition_values", counted)
    with pytest.raises(RuntimeError, match="stopped"):
        record(stopped)
    assert names(stopped) == [SHARDS[0], SHARDS[3]]
    with pytest.raises(ValueError, match=r"not finished: 1 of 3 parts are there.*partial=True"):
        fv.RecordedCoalitions.load(stopped, dataset("class token"))
    partial = fv.RecordedCoalitions.load(stopped, dataset("class token"), partial=True)
    assert len(partial) == len(partial.data) == 4
    assert torch.equal(partial.values, whole.values[:4])
    assert record(stopped).digest == whole.digest
    assert sum(seen[4:]) == 6  # images
    (stopped / SHARDS[1]).unlink()
    assert record(stopped).digest == whole.digest
    assert sum(seen[4:]) == 6 + 4


def test_unfinished_files_are_removed(tmp_path):
    record(tmp_path)
    (tmp_path / "000001.safetensors.77.unfinished").write_bytes(b"half")
    record(tmp_path)
    assert names(tmp_path) == SHARDS
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / ".manifest.json.77").write_bytes(b"half")
    record(tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir() if path.name != ".lock") == SHARDS


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"coalitions": 6}, "coalitions was 4 and is 6"),
        ({"count": 9}, "images was 10 and is 9"),
        ({"shard": 5}, "shard was 4 and is 5"),
        ({"dtype": "float32"}, "dtype was 'float16' and is 'float32'"),
        ({"store": "features"}, "store was 'values' and is 'features'"),
        ({"kind": "registers, layer scale"}, "model was"),
    ],
)
def test_another_recording_is_not_mixed_in(tmp_path, change, words):
    record(tmp_path)
    with pytest.raises(ValueError, match=f"`output`.* holds another recording: .*{words}.*another folder"):
        record(tmp_path, **change)


def test_other_images_are_refused_before_any_is_recorded(tmp_path):
    whole = record(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    others = [(image + 3, label) for image, label in dataset("class token")]
    with pytest.raises(ValueError, match="holds another recording: the images are others"):
        fv.record_coalitions(converted("class token"), others, 4, output=tmp_path, shard=4, batch_size=3)
    assert SHARDS[1] not in names(tmp_path)
    assert torch.equal(record(tmp_path).values, whole.values)


def photographs(folder, names="abcdef"):
    for number, name in enumerate(names):
        for split in ("train", "test"):
            (folder / split / "one").mkdir(parents=True, exist_ok=True)
            picture = Image.new("RGB", (60, 50), (40 * number, 90, 120))
            picture.putpixel((7, 9), (255, 0, number))
            picture.save(folder / split / "one" / f"{name}.png")
    return folder


def test_images_are_known_by_their_names_and_by_what_is_made_of_them(tmp_path):
    """Mean and deviation of some pixels do not tell a sharper image, or one that was put in the place of another."""
    kind, folder = "class token", photographs(tmp_path / "photographs")
    size = image_size(kind)

    def of(folder, **options):
        preprocessing = fv.Preprocessing((3, size, size), (0.5,) * 3, (0.5,) * 3, crop_pct=0.9)
        options = {"data_dir": folder, "preprocessing": preprocessing, "augment": False} | options
        return fv.load_dataset("folder", "train", **options)

    kept = fv.record_coalitions(converted(kind), of(folder), 4, output=tmp_path / "kept")
    moved = folder.rename(tmp_path / "moved")
    assert fv.RecordedCoalitions.load(tmp_path / "kept", of(moved)).digest == kept.digest
    sharper = replace(of(moved).preprocessing, interpolation="bicubic")
    others = {
        "data.preprocessing.interpolation was 'bilinear' and is 'bicubic'": of(moved, preprocessing=sharper),
        "data.resize was 'pillow' and is 'torch'": of(moved, resize="torch"),
        "data.images was": Subset(of(moved), [0, 1, 2, 3, 5, 4]),
    }
    renamed = photographs(tmp_path / "renamed", "abdefz")
    others |= {"data.images was '": of(renamed)}
    for words, data in others.items():
        with pytest.raises(ValueError, match=f"but these are others: .*{words}"):
            fv.RecordedCoalitions.load(tmp_path / "kept", data)
        with pytest.raises(ValueError, match=f"holds another recording: .*{words}"):
            fv.record_coalitions(converted(kind), data, 4, output=tmp_path / "kept")


def test_a_recording_goes_on_in_the_precision_that_it_was_begun_in(tmp_path):
    """What "auto" is depends on the machine."""
    assert record(tmp_path / "here").manifest.precision == "same"
    there = record(tmp_path / "there", precision="bf16")
    (tmp_path / "there" / SHARDS[1]).unlink()
    found = record(tmp_path / "there", precision="auto")
    assert (found.digest, found.manifest.precision) == (there.digest, "bf16")
    with pytest.raises(ValueError, match="precision was 'bf16' and is 'same'"):
        record(tmp_path / "there", precision="same")


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "photograph.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"`output` must be a folder for this recording alone.*photograph\.jpg"):
        record(tmp_path)
    assert names(tmp_path) == ["photograph.jpg"]
    (tmp_path / "mine.unfinished").write_bytes(b"")
    with pytest.raises(ValueError, match="for this recording alone"):
        record(tmp_path)
    assert names(tmp_path) == ["mine.unfinished", "photograph.jpg"]
    with pytest.raises(OSError, match=r"`output`, .*photograph\.jpg', can't be written"):
        record(tmp_path / "photograph.jpg")


@pytest.mark.parametrize("kind", KINDS)
def test_values_follow_from_features(tmp_path, kind):
    """And of a classifier that was trained since, its own."""
    model, expected = converted(kind), record(None, kind)
    kept = record(tmp_path, kind, store="features", dtype="float32")
    classifier = model.backbone.get_classifier()
    assert kept.rows([0])["features"].shape == (1, 4, classifier.in_features + 1)
    with torch.no_grad():
        values, classes = values_of(model, kept.rows(range(10)))
        assert classes is None
        torch.testing.assert_close(values, expected.values, rtol=1e-4, atol=1e-5)
        classifier.weight.mul_(2)
        classifier.bias.add_(1)
        other = fv.record_coalitions(model, dataset(kind), 4)
        torch.testing.assert_close(values_of(model, kept.rows(range(10)))[0], other.values, rtol=1e-4, atol=1e-5)
    kept.check(model)
    with pytest.raises(AttributeError, match="values of all classes were not recorded, but features"):
        _ = kept.values
    with pytest.raises(ValueError, match="another model"):
        kept.check(converted("registers, layer scale" if kind != "resnet18" else "convnext_atto"))


def test_recording_features_leaves_the_model_as_it_was():
    model = converted("class token")
    before, classifier = list(model.state_dict()), model.backbone.get_classifier()
    fv.record_coalitions(model, dataset("class token"), 2, store="features")
    assert list(model.state_dict()) == before
    assert model.backbone.get_classifier() is classifier


def test_features_of_two_classifiers_are_refused():
    with pytest.raises(ValueError, match=r"`store` must be 'values' for this model.*no single linear classifier"):
        record(None, "distilled DeiT", store="features")


@pytest.mark.parametrize("kind", KINDS)
def test_the_likeliest_classes_alone_are_kept(tmp_path, kind):
    model, data, whole = converted(kind), dataset(kind), record(None, kind)
    kept = record(tmp_path, kind, classes=3, dtype="float32")
    found = kept.rows(range(10))
    with torch.no_grad():
        likeliest = model.eval()(data.tensors[0]).topk(3, 1).indices
    assert torch.equal(found["classes"].long(), likeliest)
    chosen = likeliest.unsqueeze(1).expand(-1, 4, -1)
    assert torch.equal(found["values"], whole.values.gather(2, chosen))
    kept.check(model)
    torch.nn.init.normal_(model.head.shares.weight, std=0.1)
    terms = fv.ExplainerObjective()(model, data.tensors[0], found)
    with torch.no_grad():
        phi, logits = model.shapley_values(data.tensors[0])
    present = fv.Coalitions(found["bits"], model.players)
    predicted = torch.einsum("bmp,bpk->bmk", fk.unpack_bits(present.bits, model.players).float(), phi)
    null = model.null_value()
    even = null + present.sizes.unsqueeze(2) / model.players * (logits - null).unsqueeze(1)
    wanted = found["values"]
    expected = (wanted - (null + predicted).gather(2, chosen)).square().mean()
    expected = expected / (wanted - even.gather(2, chosen)).square().mean()
    torch.testing.assert_close(terms.loss, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(AttributeError, match="but values of 3 classes"):
        _ = kept.values


@pytest.mark.parametrize("options", [{}, {"store": "features"}, {"classes": 3}, {"dtype": "float32"}])
def test_every_kind_of_recording_trains_the_explainer(tmp_path, options):
    model = converted("class token")
    recorded = record(tmp_path, coalitions=16, **options)
    options = {"objective": fv.ExplainerObjective(keep_best=True), "epochs": 12, "batch_size": 5, "lr": 3e-3}
    history = fv.fit(model, recorded, recorded, progress=False, **options).history
    assert history[-1]["regression"] < 0.9 * history[0]["regression"]
    assert history[-1]["eval_value_r2"] > history[0]["eval_value_r2"]


def test_values_that_a_dtype_cannot_hold_are_refused(tmp_path):
    model = converted("class token")
    with torch.no_grad():
        model.backbone.head.weight.mul_(1e6)
    with pytest.raises(ValueError, match=r"`dtype` must be one that holds values up to .*Pass 'float32'"):
        fv.record_coalitions(model, dataset("class token"), 2, output=tmp_path)
    assert fv.record_coalitions(model, dataset("class token"), 2, dtype="float32").values.isfinite().all()


def test_workers_and_processes_read_the_rows(tmp_path):
    """Nothing that is open crosses to another process."""
    recorded = record(tmp_path)
    loader = torch.utils.data.DataLoader(recorded, 5, num_workers=2)
    found = torch.cat([batch["values"] for _, batch in loader])
    assert torch.equal(found, recorded.values)


def test_the_explainer_is_trained_from_recordings(tmp_path):
    model, data = converted("class token"), dataset("class token", 20)
    recorded, held_out = fv.recipe.record(
        model, data, coalitions=8, mirror=False, output=tmp_path / "run", store="features", progress=False
    )
    quick = {"epochs": 1, "batch_size": 4, "progress": False}
    result = fv.train_explainer(model, data, coalitions=8, mirror=False, output=tmp_path / "run", **quick)
    assert result.model.calibration is not None
    again = converted("class token")
    assert fv.train_explainer(again, recorded, held_out, **quick).model.calibration is not None
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"`eval_data` must be recorded coalitions, as `data` is"):
        fv.train_explainer(again, recorded, **quick)


def test_error_bars_need_all_classes(caplog):
    model, data = converted("class token"), dataset("class token", 20)
    recorded = [fv.record_coalitions(model, Subset(data, rows), 4, classes=2) for rows in (range(15), range(15, 20))]
    result = fv.train_explainer(model, *recorded, epochs=1, batch_size=4, progress=False)
    assert result.model.calibration is None
    assert "no error bars: the values of all classes" in caplog.text


def test_a_record_is_saved_and_loaded(tmp_path):
    data, recorded = dataset("class token"), record(None, shard=1024)
    recorded.save(tmp_path / "recorded")
    found = fv.RecordedCoalitions.load(tmp_path / "recorded", data)
    assert torch.equal(found.bits, recorded.bits)
    assert torch.equal(found.values, recorded.values)
    assert found.digest == recorded.digest != record(None, seed=1).digest
    assert (
        fv.record_coalitions(converted("class token"), data, 4, output=tmp_path / "recorded", dtype="float32").digest
        == recorded.digest
    )
    with pytest.raises(ValueError, match="`data` must be the 10 recorded images"):
        fv.RecordedCoalitions.load(tmp_path / "recorded", Subset(data, range(3)))
    with pytest.raises(OSError, match=r"`path`, .*recorded', can't be written: it is not empty"):
        recorded.save(tmp_path / "recorded")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="can't be written"):
        recorded.save(tmp_path / "file")


def test_a_part_of_a_record_is_saved(tmp_path):
    record(tmp_path / "recorded")
    (tmp_path / "recorded" / SHARDS[0]).unlink()
    part = fv.RecordedCoalitions.load(tmp_path / "recorded", dataset("class token"), partial=True)
    part.save(tmp_path / "part")
    found = fv.RecordedCoalitions.load(tmp_path / "part", part.data)
    assert len(found) == 6
    assert found.digest == part.digest
    assert torch.equal(found.values, part.values)


def test_images_are_those_that_were_recorded(tmp_path):
    """In that order, though another library may decode them a little differently."""
    data = dataset("class token")
    record(tmp_path / "recorded")
    order = [*range(8), 9, 8]
    for other in (Subset(data, order), labelled(data.tensors[0] + 0.1)):
        with pytest.raises(ValueError, match=r"`data` must hold the images .*in their order"):
            fv.RecordedCoalitions.load(tmp_path / "recorded", other)
    slightly = labelled(data.tensors[0] * 1.001)
    assert len(fv.RecordedCoalitions.load(tmp_path / "recorded", slightly)) == 10


def rewritten(path, change):
    """The tensors of a shard changed, its header kept."""
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    metadata = json.loads(whole[8 : 8 + length])["__metadata__"]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: rewritten(path, lambda found: found["values"][1].mul_(-5)),
        lambda path: rewritten(path, lambda found: found["bits"][1].bitwise_xor_(0x5555)),
        lambda path: rewritten(path, lambda found: found["values"][1, 3, 6].add_(0.01)),
        lambda path: path.write_bytes(path.read_bytes()[:-300]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x04."),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_file({"weight": torch.zeros(2)}, path, {"digest": "0"}),
        lambda path: save_file({"bits": torch.zeros(2, dtype=torch.bool)}, path, {"digest": "0"}),
    ],
)
def test_damaged_rows_are_never_read(tmp_path, damage):
    """Past the images that are evaluated again too."""
    recorded = record(tmp_path)
    expected = recorded.rows([0, 9])
    damage(tmp_path / SHARDS[1])
    message = rf"{SHARDS[1]}' is damaged, or holds no coalitions.*Delete it, and call fv\.record_coalitions"
    with pytest.raises(ValueError, match=message):
        fv.RecordedCoalitions.load(tmp_path, dataset("class token")).rows([0, 5])
    (tmp_path / SHARDS[1]).unlink()
    again = record(tmp_path)
    assert again.digest == recorded.digest
    assert torch.equal(again.rows([0, 9])["values"], expected["values"])


def test_files_of_another_recording_are_noticed(tmp_path):
    record(tmp_path / "one")
    record(tmp_path / "other", seed=1)
    (tmp_path / "other" / SHARDS[1]).replace(tmp_path / "one" / SHARDS[1])
    with pytest.raises(ValueError, match="not those that its manifest names"):
        fv.RecordedCoalitions.load(tmp_path / "one", dataset("class token"))


@pytest.mark.parametrize(
    "content",
    [b"", b"\x80\x04.", b"{}", b"[]", b"[" * 100_000, b'{"format": "fastshap_vision.RecordedCoalitions/2"}', "changed"],
)
def test_a_manifest_that_is_none_is_named(tmp_path, content):
    record(tmp_path)
    path = tmp_path / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"images": 10', b'"images": 11') if content == "changed" else content)
    message = r"manifest\.json' is damaged, or holds no coalitions.*fv\.record_coalitions.*another folder"
    with pytest.raises(ValueError, match=message):
        fv.RecordedCoalitions.load(tmp_path, dataset("class token"))
    with pytest.raises(ValueError, match=message):
        record(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no recording in .*nowhere.*fv\.record_coalitions"):
        fv.RecordedCoalitions.load(tmp_path / "nowhere", dataset("class token"))


SCRIPT = """
import sys, torch
sys.path[:0] = [{tests!r}]
torch.set_num_threads(1)
from test_recordings_on_disk import record
print(record({folder!r}, count=int(sys.argv[1]), workers=0).digest)
"""


def run(folder, count=10, processes=1):
    """Records by so many processes; returns them, started."""
    code = SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder))
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517", "WORLD_SIZE": str(processes)}
    common |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(processes):
        own = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else dict(os.environ)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", code, str(count)], env=own, **pipes))
    return started


def digests(started):
    ended = [(process, *process.communicate(timeout=120)) for process in started]
    for process, _, errors in ended:
        assert process.returncode == 0, errors
    return {output.split()[-1] for _, output, _ in ended}


def test_two_processes_record_the_same_bits(tmp_path):
    assert digests(run(tmp_path / "one")) == digests(run(tmp_path / "two", processes=2))
    assert names(tmp_path / "two") == SHARDS


@pytest.mark.slow
def test_three_processes_that_are_killed_ten_times_record_the_same_bits(tmp_path):
    count = 200
    expected = digests(run(tmp_path / "one", count))
    assert digests(run(tmp_path / "two", count, 2)) == expected
    folder = tmp_path / "killed"
    for number in range(10):
        started = run(folder, count, 3)
        wanted = 1 + 5 * number
        until = time.monotonic() + 60
        while len(list(folder.glob("*.safetensors"))) < wanted and time.monotonic() < until:
            time.sleep(0.01)
        for process in started:
            process.send_signal(signal.SIGKILL)
            process.communicate()
    assert 10 < len(list(folder.glob("*.safetensors"))) <= 50
    assert digests(run(folder, count, 3)) == expected
