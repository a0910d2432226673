"""What timm names: torchvision's datasets, tar files, Hugging Face's datasets and streams, from local files."""

import io
import pickle
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

import fastshap_vision as fv
from fastshap_vision.data.datasets import load_dataset

PLAIN = fv.Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3)
LABELS = [0, 1, 2, 1, 0]


def pixels(value, size=16):
    return np.full((size, size, 3), value, np.uint8)


def encoded(value, **options):
    file = io.BytesIO()
    Image.fromarray(pixels(value)).save(file, "PNG", **options)
    return file.getvalue()


def write_tar(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def reds(data):
    return [round(255 * float(image[0, 0, 0])) for image, _ in data]


@pytest.fixture
def tars(tmp_path):
    train = {f"{name}/{copy}.png": encoded(10 * place + copy) for place, name in enumerate("abc") for copy in range(2)}
    write_tar(tmp_path / "train.tar", train)
    write_tar(tmp_path / "val.tar", {"c/0.png": encoded(100), "a/0.png": encoded(200)})
    return tmp_path


@pytest.fixture
def mnist(tmp_path):
    """MNIST's own files, of a few images."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split, shades in (("train", range(20)), ("t10k", range(200, 203))):
        images = np.stack([np.full((28, 28), shade, np.uint8) for shade in shades])
        header = np.array([2051, len(images), 28, 28], ">i4").tobytes()
        (raw / f"{split}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = np.array([shade % 10 for shade in shades], np.uint8)
        header = np.array([2049, len(labels)], ">i4").tobytes()
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.tobytes())
    return tmp_path


def test_torchvisions_sets_are_read_by_their_names(mnist):
    train, test = (load_dataset("torch/mnist", split, data_dir=mnist) for split in ("train", "test"))
    assert (len(train), len(test)) == (20, 3)
    assert train.classes == test.classes
    assert train.classes[:2] == ("0 - zero", "1 - one")
    assert train[0][0].shape == train.input_size == (3, 224, 224)
    plain = load_dataset("torch/mnist", "test", data_dir=mnist, preprocessing=PLAIN)
    assert [label for _, label in plain] == [0, 1, 2]
    assert reds(plain) == [200, 201, 202]


def test_torchvisions_folders_read_pictures_as_a_viewer_shows_them(tmp_path):
    for split, shade in (("train", 30), ("val", 60)):
        (tmp_path / split / "one").mkdir(parents=True)
        half = np.concatenate([pixels(shade), np.full((16, 16, 1), 0, np.uint8)], 2)
        Image.fromarray(half, "RGBA").save(tmp_path / split / "one" / "clear.png")
    data = load_dataset("torch/image_folder", "validation", data_dir=tmp_path, preprocessing=PLAIN)
    assert data.classes == ("one",)
    assert reds(data) == [255]


def test_tar_files_number_their_classes_as_the_training_split(tars):
    train = load_dataset("tar", "train", data_dir=tars, preprocessing=PLAIN, augment=False)
    test = load_dataset("tar", "test", data_dir=tars, preprocessing=PLAIN)
    assert train.classes == test.classes == ("a", "b", "c")
    assert [label for _, label in train] == [0, 0, 1, 1, 2, 2]
    assert reds(train) == [0, 1, 10, 11, 20, 21]
    assert sorted((label, red) for (_, label), red in zip(test, reds(test), strict=True)) == [(0, 200), (2, 100)]
    alone = load_dataset("tar", "test", data_dir=tars / "val.tar", preprocessing=PLAIN)
    assert alone.classes == ("a", "c")
    mapped = load_dataset("tar", "train", data_dir=tars, class_map={"c": 0, "a": 1}, preprocessing=PLAIN, augment=False)
    assert mapped.classes == ("c", "a")
    assert sorted(label for _, label in mapped) == [0, 0, 1, 1]
    assert not list(tars.glob("*.pickle"))


def test_tar_files_within_a_tar_file_are_its_classes(tmp_path):
    for name, shade in (("a", 40), ("b", 50)):
        write_tar(tmp_path / f"{name}.tar", {f"{copy}.png": encoded(shade + copy) for copy in range(2)})
    write_tar(tmp_path / "train.tar", {f"{name}.tar": (tmp_path / f"{name}.tar").read_bytes() for name in "ab"})
    data = load_dataset("tar", "train", data_dir=tmp_path, preprocessing=PLAIN, augment=False)
    assert data.classes == ("a", "b")
    assert sorted(zip((label for _, label in data), reds(data), strict=True)) == [(0, 40), (0, 41), (1, 50), (1, 51)]


def test_worker_processes_share_no_open_file(tars):
    data = load_dataset("tar", "train", data_dir=tars, preprocessing=PLAIN, augment=False)
    assert reds(data)[0] == 0  # which opens it in this process first
    found = torch.cat([images[:, 0, 0, 0] for images, _ in DataLoader(data, 1, num_workers=2)])
    assert (255 * found).round().tolist() == [0, 1, 10, 11, 20, 21]
    pickle.loads(pickle.dumps(data))[0]


def test_a_damaged_picture_in_a_tar_file_stops_the_reading(tmp_path):
    write_tar(tmp_path / "train.tar", {"a/0.png": encoded(1), "a/1.png": encoded(2)[:60]})
    data = load_dataset("tar", "train", data_dir=tmp_path, preprocessing=PLAIN)
    data[0]
    with pytest.raises(ValueError, match=r"'a/1.png' is not an image that can be read: .*\. Replace it"):
        data[1]


def write_hugging_face(folder):
    datasets = pytest.importorskip("datasets")
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["ant", "bee", "cow"])}
    folder.mkdir()
    for split, shift in (("train", 0), ("validation", 100)):
        rows = {"image": [{"bytes": encoded(shift + label), "path": None} for label in LABELS], "label": LABELS}
        table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        table.to_parquet(str(folder / f"{split}-00000-of-00001.parquet"))
    return folder


def test_hugging_faces_datasets_are_read_by_index(tmp_path):
    folder = write_hugging_face(tmp_path / "insects")
    options = {"data_dir": tmp_path / "cache", "preprocessing": PLAIN}
    train = load_dataset(f"hfds/{folder}", "train", augment=False, **options)
    test = load_dataset(f"hfds/{folder}", "validation", **options)
    assert train.classes == test.classes == ("ant", "bee", "cow")
    assert [label for _, label in train] == LABELS
    assert reds(test) == [100 + label for label in LABELS]
    part = load_dataset(f"hfds/{folder}", "train[:40%]", augment=False, **options)
    assert len(part) == 2
    mapped = load_dataset(f"hfds/{folder}", "train", class_map={"cow": 0, "bee": 1, "ant": 2}, augment=False, **options)
    assert mapped.classes == ("cow", "bee", "ant")
    assert [label for _, label in mapped] == [2 - label for label in LABELS]
    with pytest.raises(ValueError, match=r"can't make the dataset 'hfds/.*, split 'sixth'.*Check the name, split"):
        load_dataset(f"hfds/{folder}", "sixth", **options)
    with pytest.raises(ValueError, match=r"the data name no classes\. Pass class_map"):
        load_dataset(f"hfds/{folder}", "train", target_key="nothing", **options)


def test_shards_of_a_webdataset_are_read_by_index(tmp_path):
    pytest.importorskip("datasets")
    folder = tmp_path / "shards"
    folder.mkdir()
    for shard in range(2):
        rows = enumerate(LABELS)
        files = {f"{shard}{row}.{kind}": part for row, label in rows for kind, part in row_of(label).items()}
        write_tar(folder / f"train-{shard}.tar", files)
    (tmp_path / "labels.txt").write_text("2\n1\n0\n")
    keys = {"input_key": "png", "target_key": "cls", "class_map": tmp_path / "labels.txt"}
    data = load_dataset(
        f"hfds/{folder}", "train", data_dir=tmp_path / "cache", preprocessing=PLAIN, augment=False, **keys
    )
    assert data.classes == ("2", "1", "0")
    assert [label for _, label in data] == [2 - label for label in LABELS] * 2
    assert reds(data) == LABELS * 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_streams_are_for_loops_of_ones_own(tmp_path):
    pytest.importorskip("webdataset")
    files = {f"{row}.{kind}": part for row, label in enumerate(LABELS) for kind, part in row_of(label).items()}
    write_tar(tmp_path / "part-0.tar", files)
    stream = load_dataset(
        "wds/part", "part-0.tar|5", data_dir=tmp_path, preprocessing=PLAIN, augment=False, class_map={0: 2, 1: 1, 2: 0}
    )
    assert isinstance(stream, IterableDataset)
    assert stream.preprocessing == PLAIN
    assert stream.classes == ("2", "1", "0")
    found = list(stream)
    assert [label for _, label in found] == [2 - label for label in LABELS]
    assert reds(found) == LABELS
    model = fv.SelfExplainingClassifier("test_vit", num_classes=3, img_size=16, model_kwargs={"patch_size": 4})
    with pytest.raises(ValueError, match=r"`data` must be a dataset with a length whose items can be indexed, but"):
        fv.record_coalitions(model, stream, 2)
    with pytest.raises(ValueError, match=r"`train_data` must be a dataset with a length whose items can be indexed"):
        fv.fit(model, stream, objective=fv.TaskObjective(), epochs=1, batch_size=2)


def row_of(label):
    return {"png": encoded(label), "cls": str(label).encode()}


def test_augmentation_is_timms(tars):
    plain = load_dataset("tar", "train", data_dir=tars, preprocessing=PLAIN, augment=False)
    erased = load_dataset(
        "tar", "train", data_dir=tars, preprocessing=PLAIN, augment={"re_prob": 1.0, "re_mode": "pixel"}
    )
    assert any(type(step).__name__ == "RandomErasing" for step in erased.transform.transforms)
    torch.manual_seed(0)
    assert not torch.equal(erased[4][0], plain[4][0])
    randomly = load_dataset("tar", "train", data_dir=tars, augment={"auto_augment": "rand-m9-mstd0.5"})
    assert any(type(step).__name__ == "RandAugment" for step in randomly.transform.transforms)
    assert not hasattr(load_dataset("tar", "test", data_dir=tars, augment={"re_prob": 1.0}).transform, "augment")
    tested = load_dataset("tar", "test", data_dir=tars, preprocessing=PLAIN, augment={"re_prob": 1.0})
    assert torch.equal(tested[0][0], tested[0][0])
    with pytest.raises(ValueError, match=r"`augment` must be arguments of timm.data.create_transform .*re_share"):
        load_dataset("tar", "train", data_dir=tars, augment={"re_share": 1.0})
    with pytest.raises(ValueError, match=r"`augment` must be True, False or None for the digits"):
        load_dataset("digits", "train", augment={"re_prob": 1.0})


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (
            ("torch/cifar10", "train"),
            {"data_dir": "nowhere"},
            r"Dataset not found .*Check data_dir, or pass download=Tr",
        ),
        (("torch/mnist1000", "train"), {"data_dir": "x"}, r"Unknown torchvision dataset mnist1000\. Check the name"),
        (
            ("tar", "train"),
            {"data_dir": "nowhere"},
            r"needs a tar file of class folders .*that holds train.tar or train",
        ),
        (("tar", "train"), {}, r"but data_dir is 'None'\. Pass one"),
        (("torch/cifar10", "train"), {"class_map": {"a": 0}}, r"`class_map`: 'torch/cifar10' has its own classes"),
        (("tar", "train"), {"class_map": {"a": 1}}, r"`class_map` must be a number from 0 on, without gaps"),
        (("tar", "train"), {"class_map": "map.pkl"}, r"`class_map` must be a dict, or a text file \(.txt\)"),
        (("digits", "train"), {"class_map": {"0": 0}}, r"`class_map`: the digits have their own classes"),
        (("digits", "train"), {"preprocessing": PLAIN, "mean": (0.5,)}, r"`mean` must be None beside `preprocessing`"),
        (("digits", "train"), {"preprocessing": (3, 8, 8)}, r"`preprocessing` must be a Preprocessing or None"),
        (("tar", ""), {}, r"`split` must be the name of a split"),
    ],
)
def test_what_can_not_be_read_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(*arguments, **options)


def test_options_are_of_timms_datasets_alone():
    with pytest.raises(ValueError, match=r"there is no argument `download` for 'digits'"):
        load_dataset("digits", "train", download=True)


def test_a_package_that_is_missing_is_named(monkeypatch):
    def create_dataset(*_, **__):
        raise RuntimeError("Please install webdataset 0.2.x package")

    monkeypatch.setattr("fastshap_vision.data.timm_datasets.create_dataset", create_dataset)
    with pytest.raises(ValueError, match=r"Run: pip install webdataset"):
        load_dataset("wds/x", "train", data_dir="x")


def test_a_class_map_numbers_folders_and_leaves_others_out(tmp_path, caplog):
    for name in ("ant", "bee", "cow"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(pixels(3)).save(tmp_path / "train" / name / "0.png")
    (tmp_path / "map.txt").write_text("cow\nant\n")
    data = load_dataset("folder", "train", data_dir=tmp_path, class_map=tmp_path / "map.txt")
    assert data.classes == ("cow", "ant")
    assert [label for _, label in data] == [1, 0]  # by their folders, in the order of names
    assert "1 folders of" in caplog.text
    assert "are not in class_map, and left out: bee" in caplog.text
    with pytest.raises(ValueError, match=r"the folder of each number, and one folder each"):
        load_dataset("folder", "train", data_dir=tmp_path, class_map={"cow": 0, "ant": 0})
    (tmp_path / "val2").mkdir()
    (tmp_path / "train" / "ant").rename(tmp_path / "val2" / "ant")
    split = load_dataset("folder", "val2", data_dir=tmp_path, class_map=tmp_path / "map.txt", augment=False)
    assert [label for _, label in split] == [1]
