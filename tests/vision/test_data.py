import io

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits as sklearn_digits
from torch.utils.data import Subset

from fastshap_vision.data import DIGITS_MEAN, DIGITS_STD, Preprocessing, WithMirrorImages, load_dataset


def picture(value, size=32):
    pixels = np.random.default_rng(value).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def archive(tmp_path):
    """cifar10_train.npz with four pictures, and a function that writes another with some arrays changed."""

    def write(name="cifar10_train.npz", **changes):
        files = []
        for index in range(4):
            file = io.BytesIO()
            picture(index).save(file, "JPEG", quality=95)
            files.append(file.getvalue())
        arrays = {
            "jpeg": np.frombuffer(b"".join(files), np.uint8),
            "offsets": np.cumsum([0, *map(len, files)]),
            "labels": np.array([0, 1, 1, 0], np.uint8),
            "classes": np.array(["cat", "dog"]),
        } | changes
        path = tmp_path / name
        np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
        return path

    write()
    return write


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


def test_archive_is_decoded_and_augmented(archive):
    path = archive()
    archive("cifar10_test.npz")
    train, test = (
        load_dataset("cifar10", "train", data_dir=path.parent),
        load_dataset("cifar10", "test", data_dir=path.parent),
    )
    assert (len(train), train.classes, train.input_size) == (4, ("cat", "dog"), (3, 32, 32))
    assert [label for _, label in test] == [0, 1, 1, 0]
    pixels = test.preprocessing.restore(test[2][0]).permute(1, 2, 0).numpy() * 255
    file = io.BytesIO()
    picture(2).save(file, "JPEG", quality=95)
    assert np.allclose(pixels, np.asarray(Image.open(file)), atol=1e-3)
    torch.manual_seed(0)
    assert not torch.equal(train[2][0], train[2][0])
    assert torch.equal(test[2][0], test[2][0])
    plain = load_dataset("cifar10", "train", data_dir=path, augment=False)
    assert torch.equal(plain[2][0], test[2][0])
    grey = load_dataset("cifar10", "test", data_dir=path.parent, in_chans=1, image_size=16)
    assert grey[0][0].shape == (1, 16, 16)


def test_archive_keeps_given_statistics(archive):
    data = load_dataset("cifar10", "train", data_dir=archive(), mean=(0.5,) * 3, std=(0.25,) * 3, augment=False)
    assert (data.mean, data.std) == ((0.5,) * 3, (0.25,) * 3)
    assert torch.equal(data[0][0], (data.pixels[0] / 255 - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": None}, r"has no array 'labels'.*must hold jpeg, offsets, labels, classes"),
        ({"classes": np.array(["cat"])}, r"labels from 0 to 1 but names 1 classes"),
        ({"offsets": np.array([0, 5])}, r"do not fit together"),
        ({"labels": np.zeros(3, np.uint8)}, r"do not fit together"),
    ],
)
def test_wrong_archives(archive, changes, message):
    with pytest.raises(ValueError, match=message):
        load_dataset("cifar10", "train", data_dir=archive(**changes))


def test_truncated_archive(archive):
    path = archive()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ValueError, match=r"cannot be read .*again"):
        load_dataset("cifar10", "train", data_dir=path)
    path.write_bytes(b"no archive at all")
    with pytest.raises(ValueError, match=r"cannot be read .*again"):
        load_dataset("cifar10", "train", data_dir=path)


def test_folder_classes_are_those_of_the_training_split(folder):
    train = load_dataset("folder", "train", data_dir=folder, image_size=24)
    test = load_dataset("folder", "test", data_dir=folder, image_size=24)
    assert (len(train), len(test)) == (6, 4)
    assert train.classes == test.classes == ("ant", "bee", "cow")
    assert [label for _, label in test] == [0, 0, 2, 2]
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
    with pytest.raises(ValueError, match=r"no images below"):
        load_dataset("folder", "train", data_dir=empty)
    with pytest.raises(ValueError, match=r"no subfolder for the test split: make one named test or val"):
        load_dataset("folder", "test", data_dir=empty)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("mnist", "train"), r"unknown dataset 'mnist'. Choose one of digits, cifar10, folder"),
        (("digits", "val"), r"unknown split 'val'. Choose one of train, test"),
        (("cifar10", "train"), r"needs the folder that holds it. Pass data_dir"),
    ],
)
def test_bad_names(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(*arguments)


def test_missing_files(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"there is no archive .*cifar10_train.npz and cifar10_test.npz"):
            load_dataset("cifar10", "train", data_dir=path)
    with pytest.raises(ValueError, match="in_chans must be 1 or 3, but it is 2"):
        load_dataset("digits", "train", in_chans=2)


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
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
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
