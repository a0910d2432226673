"""Explaining more images than memory holds: right rows, each once, whatever is stopped and however many processes."""

import io
import json
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from vision_transformers import TINY, converted, network, with_shares

import fastshap_vision as fv
from fastshap_vision._runtime.processes import processes
from fastshap_vision.offline import explain_images as loop
from fastshap_vision.offline import parts as parts_of
from fastshap_vision.offline.rows import KEY
from fastshap_vision.offline.stored import find_images

parquet = pytest.importorskip("pyarrow.parquet")

NAMES = [f"class {number}" for number in range(7)]
CALIBRATION = fv.Calibration(ratio=0.5, freedom=8.0, variance=[0.01 * (1 + number) for number in range(7)])


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_model():
    torch.manual_seed(0)
    model = with_shares(fv.convert(network("vit_tiny_patch16_224", **TINY), img_size=32))
    model.calibration = CALIBRATION
    return model


def write_pictures(folder, count=23):
    """Pictures in nested folders, of which the fourth is no image; and a file that has no such name."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number % 3}" / ("deep" if number % 2 else ".") / f"{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)).save(path)
    (folder / "0" / "deep" / "003.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(loop, "PART_IMAGES", 4)


def explain(model, source, output, **options):
    return fv.explain_images(model, source, output, **({"batch_size": 4, "top_k": 3, "progress": False} | options))


def rows_of(path):
    return parquet.read_table(path).to_pylist()


def test_rows_are_what_explain_gives(model, pictures, tmp_path):
    found = explain(model, pictures, tmp_path / "out.parquet", classes=NAMES)
    assert found == (tmp_path / "out.parquet", 23, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]
    rows = rows_of(found.path)
    names = sorted(str(path.relative_to(pictures)) for path in pictures.rglob("*.png"))
    assert sorted(row["image"] for row in rows) == names
    bad = [row for row in rows if row["error"] is not None]
    assert [row["image"] for row in bad] == ["0/deep/003.png"]
    assert bad[0]["error"] == "Pillow knows no such format"
    assert all(value is None for key, value in bad[0].items() if key not in ("image", "error"))
    for row in rows:
        if row["error"] is not None:
            continue
        explanation = model.explain(Image.open(pictures / row["image"]), target="all")
        chosen = explanation.logits[0].topk(3).indices
        assert row["classes"] == chosen.tolist()
        assert row["names"] == [NAMES[number] for number in row["classes"]]
        torch.testing.assert_close(torch.tensor(row["probabilities"]), explanation.probabilities[0, chosen])
        torch.testing.assert_close(
            torch.tensor(np.array(row["values"], np.float32)), explanation.values[0][:, chosen].T, rtol=1e-3, atol=1e-3
        )
        torch.testing.assert_close(torch.tensor(row["expected_error"]), explanation.expected_error[0, chosen])
    schema = parquet.read_schema(found.path)
    assert str(schema.field("values").type.value_type.value_type) == "halffloat"
    assert json.loads(schema.metadata[KEY.encode()])["grid"] == [4, 4]


def test_what_is_not_known_is_null(model, pictures, tmp_path):
    model.calibration = None
    rows = rows_of(explain(model, pictures / "1", tmp_path / "out.parquet", top_k=99).path)
    assert {row["names"] for row in rows} == {row["expected_error"] for row in rows} == {None}
    assert {len(row["classes"]) for row in rows} == {7}


@pytest.mark.parametrize("kind", ["resnet18", "average pooling"])
def test_heads_explain_chosen_classes_as_all(kind, tmp_path):
    """Of both heads, and with patches that vote."""
    for options in ({}, {"head": "votes"}):
        model = converted(kind, **options)
        images = torch.randn(2, *model.game.input_size)
        chosen = torch.tensor([[3, 0, 6], [1, 1, 2]])
        with torch.no_grad():
            features, logits = model.game.features_and_logits(images)
            every = model.head(features, logits, model.null_value())
            some = model.head(features, logits, model.null_value(), chosen)
        expected = every.gather(2, chosen.unsqueeze(1).expand(-1, model.players, -1))
        torch.testing.assert_close(some, expected, rtol=1e-4, atol=1e-5)


def test_all_classes_go_to_shards(model, pictures, tmp_path):
    found = explain(model, pictures, tmp_path / "out", top_k="all", classes=NAMES)
    assert found == (tmp_path / "out", 23, 1)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == 6
    names, bad = [], []
    for path in files:
        with safe_open(path, "pt") as file:
            about = file.metadata()
        names += json.loads(about["images"])
        bad += json.loads(about["unreadable"])
        assert json.loads(about[KEY])["classes"] == NAMES
    assert (len(names), bad) == (22, [["0/deep/003.png", "Pillow knows no such format"]])
    tensors = load_file(files[0])
    explanation = model.explain([Image.open(pictures / name) for name in names[: len(tensors["logits"])]], target="all")
    assert tensors["values"].dtype == torch.float16
    torch.testing.assert_close(tensors["logits"], explanation.logits)
    torch.testing.assert_close(tensors["values"].float(), explanation.values, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(tensors["expected_error"], explanation.expected_error)
    assert explain(model, pictures, tmp_path / "out", top_k="all", classes=NAMES) == found


def test_a_batch_without_a_readable_image(model, tmp_path):
    (tmp_path / "bad").mkdir()
    for number in range(5):
        (tmp_path / "bad" / f"{number}.png").write_bytes(b"")
    rows = rows_of(explain(model, tmp_path / "bad", tmp_path / "out.parquet").path)
    assert len(rows) == 5
    assert all(row["error"] and row["values"] is None for row in rows)
    assert explain(model, tmp_path / "bad", tmp_path / "out", top_k="all").unreadable == 5
    for path in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_file(path)
        assert tensors["values"].shape == (0, model.players, model.num_classes)
        assert tensors["logits"].shape == (0, model.num_classes)


def write_shard(path, pictures):
    with tarfile.open(path, "w") as shard:
        for picture in pictures:
            shard.add(picture, picture.name)
            label = tarfile.TarInfo(picture.with_suffix(".cls").name)
            label.size = 1
            shard.addfile(label, io.BytesIO(b"3"))


def test_tar_shards_are_read_as_folders(model, pictures, tmp_path):
    images = sorted(pictures.rglob("*.png"))
    (tmp_path / "shards").mkdir()
    for number in range(2):
        write_shard(tmp_path / "shards" / f"{number}.tar", images[number::2])
    plain = rows_of(explain(model, pictures, tmp_path / "plain.parquet", batch_size=1).path)
    for source in (tmp_path / "shards", [tmp_path / "shards" / f"{number}.tar" for number in range(2)]):
        output = tmp_path / f"{isinstance(source, list)}.parquet"
        rows = rows_of(explain(model, source, output, batch_size=1, workers=1).path)
        by_name = {Path(row["image"]).name: row for row in rows}
        assert len(by_name) == len(rows) == len(plain)
        for row in plain:
            same = by_name[Path(row["image"]).name]
            assert {**same, "image": None} == {**row, "image": None}
    assert {row["image"] for row in rows} == {
        f"{tmp_path}/shards/{number}.tar/{path.name}" for number in range(2) for path in images[number::2]
    }


def test_names_that_are_no_utf8_are_written(model, tmp_path):
    (tmp_path / "in").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "a.png")
    try:
        (tmp_path / "in" / "a.png").rename(tmp_path / "in" / os.fsdecode(b"caf\xe9.png"))
    except OSError:
        pytest.skip("names of files are UTF-8 here")
    explain(model, tmp_path / "in", tmp_path / "out.parquet")
    row = parquet.read_table(tmp_path / "out.parquet").to_pylist()[0]
    assert row["image"] == "caf\\xe9.png"
    assert row["error"] is None


def test_names_in_a_tar_are_those_of_a_folder(tmp_path):
    with tarfile.open(tmp_path / "shard.tar", "w") as shard:
        for name in ("./a.png", "/b.png", "deep/c.png", "._a.png", "deep/.hidden/d.png"):
            shard.addfile(tarfile.TarInfo(name))
    found = [image.name for image in find_images(tmp_path)]
    assert found == ["shard.tar/a.png", "shard.tar/b.png", "shard.tar/deep/c.png"]


def test_a_folder_that_leads_back_is_read_once(pictures, tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    Image.new("RGB", (32, 32)).save(tmp_path / "in" / "deep" / "a.png")
    (tmp_path / "in" / "deep" / "back").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "more").symlink_to(pictures)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "forth").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "round").symlink_to(tmp_path / "other")
    found = [image.name for image in find_images(tmp_path / "in")]
    assert len(found) == len(set(found)) == 1 + len(find_images(pictures))


def test_a_folder_that_cannot_be_read_is_named(pictures, monkeypatch):
    scandir = os.scandir

    def refusing(path):
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    with pytest.raises(ValueError, match=r"the folder '.*deep' can't be read: Permission denied"):
        find_images(pictures)


def test_left_out_files_are_counted(model, pictures, tmp_path, caplog):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "one.png")
    (folder / ".hidden.png").write_text("")
    (folder / "notes.txt").write_text("")
    assert explain(model, folder, tmp_path / "out.parquet").images == 1
    assert "1 files are no images by their names, and are left out: notes.txt" in caplog.text


def test_only_missing_parts_are_written_again(model, pictures, tmp_path, monkeypatch):
    whole = rows_of(explain(model, pictures, tmp_path / "whole.parquet").path)
    output = tmp_path / "out.parquet"
    write, written = parts_of.Parts.write, []

    def stopping(self, part, rows):
        if len(written) == 3:
            raise KeyboardInterrupt
        write(self, part, rows)
        written.append(part)

    monkeypatch.setattr(parts_of.Parts, "write", stopping)
    with pytest.raises(KeyboardInterrupt):
        explain(model, pictures, output)
    assert not output.exists()
    (tmp_path / "out.parquet.parts" / "000001.parquet").unlink()
    (tmp_path / "out.parquet.parts" / ".000004.parquet.x1").write_bytes(b"half")
    written.clear()
    monkeypatch.setattr(parts_of.Parts, "write", lambda *a: (write(*a), written.append(a[1])))
    explain(model, pictures, output)
    assert written == [1, 3, 4, 5]
    assert rows_of(output) == whole
    written.clear()
    assert explain(model, pictures, output).images == 23
    assert written == []


def test_a_run_that_was_killed_at_once_goes_on(model, pictures, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".lock").touch()
    (folder / ".settings.json.77").write_bytes(b"half")
    explain(model, pictures, folder, top_k="all")
    assert not (folder / ".settings.json.77").exists()


def test_another_task_is_refused(model, pictures, tmp_path, monkeypatch):
    output = tmp_path / "out.parquet"
    explain(model, pictures, output)
    with pytest.raises(ValueError, match=r"out.parquet' is of another task: batch_size was 4 and is 2. Pass another"):
        explain(model, pictures, output, batch_size=2)
    with pytest.raises(ValueError, match="is of another task: images was 23 and is 8; images_digest was"):
        explain(model, pictures / "1", output)
    with torch.no_grad():
        model.head.shares.weight[0, 0] += 1
    with pytest.raises(ValueError, match="is of another task: model_digest was"):
        explain(model, pictures, output)
    (tmp_path / "other.parquet").write_text("mine")
    with pytest.raises(ValueError, match=r"other.parquet' exists, and explain_images did not write it"):
        explain(model, pictures, tmp_path / "other.parquet")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="folder' exists, and explain_images did not write it"):
        explain(model, pictures, tmp_path / "folder", top_k="all")
    assert (tmp_path / "other.parquet").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["mine.txt"]


def test_one_run_at_a_time(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(parts_of, "SECONDS_TO_WAIT", 0.1)
    (tmp_path / "out.parquet.parts").mkdir()
    lock = FileLock(tmp_path / "out.parquet.parts" / ".lock")
    with lock, pytest.raises(ValueError, match=r"another run writes .*out.parquet' now"):
        explain(model, pictures, tmp_path / "out.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "argument `top_k` must be"),
        ({"top_k": "most"}, "argument `top_k` must be a whole number or 'all', but it is 'most'"),
        ({"batch_size": 0}, "argument `batch_size` must be"),
        ({"classes": ["one"]}, "argument `classes` must be 7 names, or None"),
        ({"source": "absent"}, "there is no file or folder 'absent'"),
        ({"source": 3}, "argument `source` must be the path of"),
        ({"output": "out.csv"}, "argument `output` must be a file that ends in .parquet"),
        ({"output": "out.parquet", "top_k": "all"}, "argument `output` must be a folder"),
        ({"output": "/dev/null/out.parquet"}, "must be in a folder that can be written to"),
    ],
)
def test_wrong_arguments(model, pictures, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    arguments = {"source": pictures, "output": "out.parquet"} | options
    with pytest.raises(ValueError, match=message):
        explain(model, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tar_and_an_empty_folder(model, tmp_path):
    (tmp_path / "one.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match=r"one.tar' is no whole tar file"):
        explain(model, tmp_path, tmp_path / "out.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="must hold images, but there is none in"):
        explain(model, tmp_path / "empty", tmp_path / "out.parquet")


def test_without_pyarrow_the_extra_is_named(model, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastshap-kernels\[parquet\]'"):
        explain(model, pictures, tmp_path / "out.parquet")
    assert explain(model, pictures, tmp_path / "out", top_k="all").images == 23


# Processes: forks of one that has loaded everything and does nothing but fork. A thread, of pyarrow or another, would
# be gone in a fork, with the lock that it held.


def in_a_process_of_its_own(call):
    """What a call of this module prints last, as JSON."""
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)}
    code = f"import test_explain_images as t; t.torch.set_num_threads(1); t.loop.PART_IMAGES = 4; t.{call}"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=os.environ | alone, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def forked(function, *arguments):
    process = multiprocessing.get_context("fork").Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def exit_codes(processes):
    """Waits for all of them; None for one that takes too long."""
    for process in processes:
        process.join(100)
    return [process.exitcode for process in processes]


def explain_as(rank, count, port, pictures, output):
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in ranks.items()}
    state = processes()
    assert (state.num_processes, state.process_index) == (count, rank)
    assert explain(tiny_model(), pictures, output)[1:] == (23, 1)


def explain_together(folder):
    """By one process, two and three."""
    pictures = write_pictures(Path(folder) / "pictures")
    codes = []
    for count in (1, 2, 3):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        arguments = (count, port, pictures, Path(folder) / f"{count}.parquet")
        codes += exit_codes([forked(explain_as, rank, *arguments) for rank in range(count)])
    print(json.dumps(codes))


def test_processes_share_the_parts(tmp_path):
    assert in_a_process_of_its_own(f"explain_together({str(tmp_path)!r})") == [0] * 6
    alone, *others = (rows_of(tmp_path / f"{count}.parquet") for count in (1, 2, 3))
    assert len(alone) == 23
    assert others == [alone, alone]


def parts_in(folder):
    return len(list(folder.glob("0*.parquet")))


def explain_all(pictures, output, count):
    assert explain(tiny_model(), pictures, output).images == count


def kill_and_go_on(folder, kills, count):
    """Kills runs twice in a row each, at a moment after so many parts; prints how many parts the second one left."""
    folder = Path(folder)
    pictures = write_pictures(folder / "pictures", count)
    assert exit_codes([forked(explain_all, pictures, folder / "whole.parquet", count)]) == [0]
    moments, left, stopped = random.Random(0), [], 0
    for kill in range(kills):
        output = folder / f"{kill}.parquet"
        wanted = sorted(moments.sample(range(count // 4 - 4), 2))
        for parts in wanted:
            process = forked(explain_all, pictures, output, count)
            until = time.monotonic() + 100
            while parts_in(folder / f"{kill}.parquet.parts") < parts and process.is_alive():
                assert time.monotonic() < until
                time.sleep(0.001)
            time.sleep(0.005 * moments.random())
            process.kill()
            stopped += exit_codes([process]) == [-signal.SIGKILL]
        left.append(parts_in(folder / f"{kill}.parquet.parts"))
        assert exit_codes([forked(explain_all, pictures, output, count)]) == [0]
    print(json.dumps({"killed": stopped, "parts left": left}))


@pytest.mark.parametrize(("kills", "count"), [(1, 60), pytest.param(5, 200, marks=pytest.mark.slow)])
def test_killed_runs_go_on(tmp_path, kills, count):
    found = in_a_process_of_its_own(f"kill_and_go_on({str(tmp_path)!r}, {kills}, {count})")
    print(found)
    whole = rows_of(tmp_path / "whole.parquet")
    assert all(rows_of(tmp_path / f"{kill}.parquet") == whole for kill in range(kills))
    assert found["killed"] > kills
    assert any(0 < parts < count / 4 for parts in found["parts left"]), found
