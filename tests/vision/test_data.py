import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import Subset

from fastshap_vision.data.datasets import DIGITS_MEAN, DIGITS_STD, load_dataset
from fastshap_vision.data.mirrored import WithMirrorImages
from fastshap_vision.images.preprocessing import Preprocessing


def picture(value, size=32):
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path):
    for split, classes in {"train": ("ant", "bee", "cow"), "val": ("ant", "cow")}.items():
        for index, name in enumerate(classes):
            (tmp_path / split / name).mkdir(parents=True)
            for copy in range(2):
                picture(10 * index + copy, 40).save(tmp_path / split / name / f"{copy}.png")
    return tmp_path


def test_digits_are_split_once_and_normalised():
    train, test = load_dataset("digits", "train"), load_dataset("digits", "test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.classes == test.classes == tuple("0123456789")
    assert train.input_size == (1, 8, 8)
    counts = torch.bincount(test.labels)
    assert counts.min() >= 34
    assert counts.max() <= 38
    images = torch.stack([image for image, _ in train])
    assert images.dtype == torch.float32
    assert images.mean().abs() < 0.01
    assert (images.std() - 1).abs() < 0.01
    # Together the splits hold every image of the set once.
    both = torch.cat([train.pixels, test.pixels]).flatten(1).numpy()
    expected = sklearn_digits().data
    assert np.array_equal(both[np.lexsort(both.T)], expected[np.lexsort(expected.T)])
    image, label = test[5]
    assert isinstance(label, int)
    assert torch.equal(image, (test.pixels[5].float() / 16 - DIGITS_MEAN[0]) / DIGITS_STD[0])
    assert torch.allclose(train.preprocessing.restore(images), train.pixels / 16, atol=1e-6)


def test_digits_options():
    image, _ = load_dataset("digits", "test", image_size=16, in_chans=3)[0]
    assert image.shape == (3, 16, 16)
    assert torch.equal(image[0], image[2])
    plain = load_dataset("digits", "train")
    shifted = load_dataset("digits", "train", augment=True)
    torch.manual_seed(0)
    seen = {tuple(shifted[0][0].flatten().tolist()) for _ in range(200)}
    assert len(seen) == 9
    assert tuple(plain[0][0].flatten().tolist()) in seen
    still = load_dataset("digits", "test", augment=True)
    assert torch.equal(still[0][0], still[0][0])
    assert still.augment is None


def test_folder_classes_are_those_of_the_training_split(folder, caplog):
    train = load_dataset("folder", "train", data_dir=folder, image_size=24)
    test = load_dataset("folder", "test", data_dir=folder, image_size=24)
    assert (len(train), len(test)) == (6, 4)
    assert train.classes == test.classes == ("ant", "bee", "cow")
    assert [label for _, label in test] == [0, 0, 2, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 classes have no folder in {str(folder / 'val')!r}, so no images: bee"
    ]
    assert test[0][0].shape == (3, 24, 24)
    assert torch.equal(test[0][0], test[0][0])
    assert not torch.equal(train[0][0], train[0][0])
    assert load_dataset("folder", "test", data_dir=folder, image_size=24, in_chans=1)[0][0].shape == (1, 24, 24)


def test_folder_errors(folder, tmp_path):
    (folder / "val" / "dodo").mkdir()
    with pytest.raises(ValueError, match=r"class 'dodo', which the training folder has not \(3 classes there\)"):
        load_dataset("folder", "test", data_dir=folder)
    empty = tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no class folders"):
        load_dataset("folder", "train", data_dir=empty)
    (empty / "train" / "ant").mkdir()
    with pytest.raises(ValueError, match=r"class folder '.*ant' holds no images\. Put images into it, or remove it"):
        load_dataset("folder", "train", data_dir=empty)
    with pytest.raises(ValueError, match=r"no subfolder for the test split: make one named test or val"):
        load_dataset("folder", "test", data_dir=empty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "train"), r"`name` must be one of digits, folder, tar, torch/…, hfds/…, or a stream.s of timm, but"),
        (("digits", "val"), r"`split` must be one of 'train', 'test', but it is 'val'"),
        (("folder", "train"), r"needs the folder that holds it. Pass data_dir"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(*arguments)


def test_missing_files(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder '.*nowhere'"):
        load_dataset("folder", "train", data_dir=tmp_path / "nowhere")


def test_preprocessing_reads_an_image_file_as_the_dataset_does(tmp_path):
    digits = load_dataset("digits", "test")
    pixels = (digits.pixels[0, 0].int() * 255 // 16).to(torch.uint8).numpy()
    Image.fromarray(pixels).save(tmp_path / "digit.png")
    image = digits.preprocessing.load(tmp_path / "digit.png")
    assert image.shape == (1, 8, 8)
    assert torch.allclose(image, digits[0][0], atol=1 / 255 / DIGITS_STD[0] + 1e-6)
    wide = Preprocessing((3, 24, 24), (0.5,) * 3, (0.5,) * 3).load(tmp_path / "digit.png")
    assert wide.shape == (3, 24, 24)
    with pytest.raises(ValueError, match="there is no image"):
        digits.preprocessing.load(tmp_path / "absent.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text.png' is not an image that can be read: Pillow knows no such format"):
        digits.preprocessing.load(tmp_path / "text.png")


def test_mirror_images_follow_the_images():
    data = load_dataset("digits", "test")
    both = WithMirrorImages(data)
    assert (len(both), both.classes) == (2 * len(data), data.classes)
    rows = [3, len(data) + 3, len(both) - 1]
    (image, label), (mirrored, same), _ = both.__getitems__(rows)
    assert torch.equal(image, data[3][0])
    assert torch.equal(mirrored, data[3][0].flip(2))
    assert label == same == data[3][1]
    assert torch.equal(both[-1][0], data[-1][0].flip(2))
    with pytest.raises(IndexError):
        both[len(both)]
    assert sum(1 for _ in WithMirrorImages(Subset(data, range(5)))) == 10
    with pytest.raises(TypeError, match=r"`data` must be a dataset of .*, but it is a int"):
        WithMirrorImages(5)
    for items, kind in (([(picture(0), 1)], "Image"), ([{"image": 0}], "dict"), ([data[0][0]], "Tensor")):
        with pytest.raises(TypeError, match=f"each image a tensor .*, but it holds a {kind}"):
            WithMirrorImages(items)[0]


def test_images_are_of_their_top_folder_whatever_their_format(tmp_path, caplog):
    names = ("a/0.png", "a/b/4.png", "a/deep/er/5.PNG", "a/x.png/6.png", "b/0.jpg", "b/1.webp", "b/2.bmp", "b/3.tiff")
    for split in ("train", "val"):
        for index, name in enumerate(names):
            path = tmp_path / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (index * 16, 0, 0)).save(path)
        (tmp_path / split / ".cache").mkdir()
        (tmp_path / split / "a" / ".hidden").mkdir()
        (tmp_path / split / "a" / ".hidden" / "7.png").touch()
        (tmp_path / split / "a" / "._0.png").touch()
    for other in ("a/Thumbs.db", "b/labels.txt", "b/more/no_ending", "loose.png"):
        (tmp_path / "train" / other).parent.mkdir(exist_ok=True)
        (tmp_path / "train" / other).touch()
    data = load_dataset("folder", "train", data_dir=tmp_path, image_size=8, augment=False)
    found = {str(Path(path).relative_to(tmp_path / "train")): data.classes[label] for path, label in data.samples}
    assert found == {name: name[0] for name in names}
    red = [float(data.preprocessing.restore(image)[0].mean()) * 255 for image, _ in data]
    assert sorted(red) == pytest.approx([index * 16 for index in range(8)], abs=4)  # of which one is a JPEG
    (warning,) = caplog.records
    assert warning.getMessage() == (
        f"4 files below {str(tmp_path / 'train')!r} are no images by their names, and are left out: "
        "a/Thumbs.db, b/labels.txt, b/more/no_ending, loose.png"
    )


@pytest.mark.parametrize("kind", ["text", "empty", "truncated"])
def test_an_unreadable_image_is_not_replaced_by_another(folder, kind):
    content = (folder / "train" / "cow" / "0.png").read_bytes()
    picture(3, 200).save(folder / "train" / "cow" / "1.jpg")
    jpeg = (folder / "train" / "cow" / "1.jpg").read_bytes()
    damaged = {"text": b"no image", "empty": b"", "truncated": content[: len(content) // 2]}[kind]
    (folder / "train" / "cow" / "0.png").write_bytes(damaged)
    (folder / "train" / "cow" / "1.jpg").write_bytes(jpeg[: len(jpeg) // 2])
    data = load_dataset("folder", "train", data_dir=folder, image_size=24)
    for row, name in ((4, "0.png"), (5, "1.jpg")):
        with pytest.raises(ValueError, match=rf"cow/{name}' is not an image that can be read"):
            data[row]
    assert data[0][1] == 0


def test_a_class_of_text_files_is_refused(folder):
    for path in (folder / "val" / "cow").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(
        ValueError, match=r"val/cow' holds no images; left out by their names: cow/0.txt, cow/1.txt\. Put"
    ):
        load_dataset("folder", "test", data_dir=folder)


PIXELS = np.linspace(0, 255, 256).reshape(16, 16).astype(np.uint8)
RED, CLEAR = (200, 30, 60), (0, 0, 0, 0)


def upside_down():
    exif = Image.Exif()
    exif[0x0112] = 3
    return exif


def clear_palette():
    """Half of the pixels transparent, and black beneath."""
    image = Image.fromarray((PIXELS > 127).astype(np.uint8), "P")
    image.putpalette([0, 0, 0, *RED])
    return image


HALF = np.where(PIXELS[..., None] > 127, np.uint8([*RED, 255]), np.uint8(CLEAR))
ON_WHITE = np.where(PIXELS[..., None] > 127, np.uint8(RED), np.uint8([255] * 3))


@pytest.mark.parametrize(
    ("image", "name", "options", "expected"),
    [
        (Image.fromarray(PIXELS), "grey.png", {}, PIXELS),
        (Image.fromarray(PIXELS.astype(np.uint16) * 257), "sixteen.png", {}, PIXELS),
        (Image.fromarray(PIXELS.astype(np.uint16) * 257), "sixteen.tiff", {}, PIXELS),
        (Image.fromarray(PIXELS.astype(np.uint16) * 257).convert("I"), "sixteen.pgm", {}, PIXELS),
        (Image.fromarray((PIXELS / 255).astype(np.float32)), "float.tiff", {}, PIXELS),
        (Image.fromarray(PIXELS > 127), "bits.png", {}, (PIXELS > 127) * 255),
        (Image.fromarray(PIXELS), "turned.png", {"exif": upside_down()}, PIXELS[::-1, ::-1]),
        (Image.fromarray(PIXELS), "turned.tiff", {"exif": upside_down()}, PIXELS[::-1, ::-1]),
        (Image.fromarray(PIXELS.astype(np.uint16) * 257), "both.png", {"exif": upside_down()}, PIXELS[::-1, ::-1]),
        (Image.fromarray(PIXELS), "damaged.png", {"exif": b"Exif\0\0no such data"}, PIXELS),
        (Image.fromarray(HALF, "RGBA"), "clear.png", {}, ON_WHITE),
        (clear_palette(), "palette.png", {"transparency": 0}, ON_WHITE),
        (clear_palette(), "palette.gif", {"transparency": 0}, ON_WHITE),
        (Image.fromarray(PIXELS), "clear_black.png", {"transparency": 0}, np.where(PIXELS == 0, 255, PIXELS)),
        (Image.fromarray(np.stack([PIXELS * 0 + 90, PIXELS * 0], 2), "LA"), "nothing.png", {}, PIXELS * 0 + 255),
        (Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "print.tiff", {}, np.uint8([[[255, 0, 0]]])),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_picture_is_read_as_a_viewer_shows_it(image, name, options, expected, tmp_path):
    (tmp_path / "train" / "one").mkdir(parents=True)
    path = tmp_path / "train" / "one" / name
    image.save(path, **options)
    expected = np.array(np.broadcast_to(np.atleast_3d(expected), (16, 16, 3)), np.uint8)
    alone = Preprocessing((3, 16, 16), (0.0,) * 3, (1.0,) * 3).load(path)
    assert np.array_equal(alone.permute(1, 2, 0).numpy(), expected / np.float32(255))
    folder = load_dataset("folder", "train", data_dir=tmp_path, image_size=16)
    assert np.array_equal(np.asarray(folder.loader(path)), expected)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.fromarray(PIXELS.astype(np.float32)), "floats are not all from 0 to 1"),
        (Image.fromarray(np.full((4, 4), np.nan, np.float32)), "floats are not all from 0 to 1"),
        (Image.fromarray(PIXELS.astype(np.int32)), "32 bits have no known range"),
    ],
)
def test_a_picture_of_unknown_range_is_refused(image, message, tmp_path):
    image.save(tmp_path / "range.tiff")
    with pytest.raises(ValueError, match=message):
        Preprocessing((1, 16, 16), (0.0,), (1.0,)).load(tmp_path / "range.tiff")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": -3}, r"`image_size` must be a whole number from 1 to 16384, but it is -3"),
        ({"image_size": 0}, r"`image_size` must be a whole number"),
        ({"image_size": 10**9}, r"`image_size` must be a whole number"),
        ({"image_size": 8.0}, r"`image_size` must be a whole number"),
        ({"image_size": True}, r"`image_size` must be a whole number"),
        ({"in_chans": 0}, r"`in_chans` must be 1 \(greyscale\), 3 \(RGB\) or None, but it is 0"),
        ({"in_chans": 2}, r"`in_chans` must be 1"),
        ({"in_chans": True}, r"`in_chans` must be 1"),
        ({"std": (0,)}, r"`std` must be 1 or 3 finite numbers above 0, but it is \(0,\)"),
        ({"std": (-1.0,)}, r"`std` must be"),
        ({"mean": "ab"}, r"`mean` must be 1 or 3 finite numbers, but it is 'ab'"),
        ({"mean": "1"}, r"`mean` must be"),
        ({"mean": ()}, r"`mean` must be"),
        ({"mean": (0.5, 0.5)}, r"`mean` must be"),
        ({"mean": (float("nan"),)}, r"`mean` must be"),
        ({"std": (float("inf"),)}, r"`std` must be"),
        ({"mean": 0.5}, r"`mean` must be"),
        ({"augment": "yes"}, r"`augment` must be one of"),
    ],
)
def test_bad_values(options, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("digits", "test", **options)


def test_statistics_of_any_kind_become_plain_numbers():
    data = load_dataset("digits", "test", mean=np.float32([0.25]), std=torch.tensor([0.5]), in_chans=3)
    assert (data.mean, data.std) == ((0.25,) * 3, (0.5,) * 3)
    assert Preprocessing.from_dict(json.loads(json.dumps(data.preprocessing.as_dict()))) == data.preprocessing


@pytest.mark.parametrize(
    "change",
    [
        {"input_size": None},
        {"input_size": [1, 8]},
        {"input_size": [2, 8, 8]},
        {"input_size": [1, "8", 8]},
        {"input_size": [1, 10**9, 10**9]},
        {"mean": None},
        {"mean": [None]},
        {"mean": [0.0, 0.0]},
        {"std": [0.0]},
        {"crop_pct": "all"},
        {"crop_pct": 0},
        {"crop_pct": 1.5},
        {"interpolation": "cubic"},
        {"crop_mode": None},
        {"more": 1},
    ],
)
def test_wrong_records_of_preprocessing(change):
    record = {"input_size": [1, 8, 8], "mean": [0.5], "std": [0.5], "crop_pct": 1.0}
    record |= {"interpolation": "bicubic", "crop_mode": "squash"}
    assert Preprocessing.from_dict(record).input_size == (1, 8, 8)
    with pytest.raises(ValueError, match=f"rgument `{'record' if 'more' in change else next(iter(change))}` must be"):
        Preprocessing.from_dict(record | change)
    for other in ({}, None, [record]):
        with pytest.raises(
            ValueError, match="argument `record` must be a dict of crop_mode, crop_pct, input_size, interp"
        ):
            Preprocessing.from_dict(other)
