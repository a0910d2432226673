"""Data: scikit-learn's digits and image folders, as datasets that know their classes, size and normalisation."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastshap_kernels._checks import check_count, fail

from .._checks import check_choice
from ..images.decode import read_image, suffixes
from ..images.preprocessing import LARGEST_SIZE, Preprocessing, of_channels

_log = logging.getLogger(__name__)

DATASETS = ("digits", "folder")
SPLITS = ("train", "test")
#: Height and width of the images where nothing else is asked for.
SIZES = {"digits": 8, "folder": 224}

# Mean and standard deviation of a digit's pixels, each divided by the largest (16), over the training split.
DIGITS_MEAN = (0.305,)
DIGITS_STD = (0.376,)
DIGITS_TEST_IMAGES = 360

FOLDER_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation")}


class ArrayImages(Dataset):
    """Images held in memory.

    Args:
        pixels (uint8): (N, C, h, w).
        labels (int64): (N,) in [0, K).
        classes: the K names.
        preprocessing: the size and normalisation of what comes out.
        largest: the pixel value that stands for 1.
        augment: a random transform of one (C, h, w) image, or None.
    """

    def __init__(
        self,
        pixels: Tensor,
        labels: Tensor,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        largest: int,
        augment: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.largest = largest
        self.augment = augment
        size = preprocessing.input_size[1:]
        self.resize = transforms.Resize(size, antialias=True) if tuple(pixels.shape[2:]) != size else None
        self._mean = torch.tensor(preprocessing.mean).view(-1, 1, 1)
        self._std = torch.tensor(preprocessing.std).view(-1, 1, 1)

    @property
    def input_size(self) -> tuple[int, int, int]:
        return self.preprocessing.input_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.preprocessing.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.preprocessing.std

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.__getitems__([index])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        """A batch at once, as torch's DataLoader takes it: tiny images one by one cost more than a step."""
        pixels = self.pixels[rows]
        if self.augment is not None:
            pixels = torch.stack([self.augment(image) for image in pixels])
        images = pixels.float() / self.largest
        if self.resize is not None:
            images = self.resize(images)
        images = (images - self._mean) / self._std
        return list(zip(images.unbind(), self.labels[rows].tolist(), strict=True))


class FolderImages(ImageFolder):
    """An image folder, one subfolder a class, read by torchvision.

    Images in folders within a class's are of that class. A file that cannot be read stops the reading; what no image
    ends like is left out, and the log names it. Hidden files and folders are none.

    Args:
        root: the folder of the class folders.
        classes: their names; an image's label is the place of its class among them.
        preprocessing: the size and normalisation of what comes out.
        augment: whether timm's training transform changes the images at random.

    Raises:
        ValueError: for a class folder without an image; on reading, for a file that is no whole image.
    """

    def __init__(self, root: Path, classes: Sequence[str], preprocessing: Preprocessing, augment: bool) -> None:
        self._names = classes
        images, self._left_out = suffixes(), list[str]()

        def is_image(path: str) -> bool:
            within = Path(path).relative_to(root)
            if any(part.startswith(".") for part in within.parts):
                return False
            if within.suffix.lower() not in images:
                self._left_out.append(str(within))
            return within.suffix.lower() in images

        super().__init__(
            str(root),
            transform=preprocessing.transform(augment),
            loader=partial(read_image, mode=preprocessing.mode),
            is_valid_file=is_image,
            allow_empty=True,
        )
        self._left_out += [path.name for path in root.iterdir() if path.is_file() and not path.name.startswith(".")]
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.input_size = preprocessing.input_size
        self.mean = preprocessing.mean
        self.std = preprocessing.std
        self._check()

    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """torchvision asks here which folder has which label."""
        return list(self._names), {name: index for index, name in enumerate(self._names)}

    def _check(self) -> None:
        """Refuses a class folder without images; names what is left out, and classes that have no folder."""
        counts: Counter[int] = Counter(self.targets)
        without = [name for index, name in enumerate(self.classes) if not counts[index]]
        for name in without:
            if (Path(self.root) / name).is_dir():
                raise ValueError(
                    f"load_dataset: the class folder {str(Path(self.root) / name)!r} holds no images"
                    f"{_named(self._left_out, '; left out by their names:')}. Put images into it, or remove it."
                )
        if self._left_out:
            _log.warning(
                "%d files below %r are no images by their names, and are left out: %s",
                *(len(self._left_out), self.root, _named(self._left_out)),
            )
        if without:
            _log.warning("%d classes have no folder in %r, so no images: %s", len(without), self.root, _named(without))


def _named(names: Sequence[str], introduction: str = "") -> str:
    """The first five, and that there are more."""
    more = ", …" if len(names) > 5 else ""
    return f"{introduction} {', '.join(names[:5])}{more}".strip() if names else ""


def load_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: bool | None = None,
) -> ArrayImages | FolderImages:
    """One split of a dataset, with `.classes`, `.input_size` (C, H, W), `.mean`, `.std` and `.preprocessing`.

    Args:
        name: "digits" (scikit-learn's, 1437 + 360 images of 8 x 8) or "folder" (train/ and test/ or val/, one subfolder
            a class).
        split: "train" or "test".
        data_dir: the folder that holds the splits.
        image_size: height and width of the images that come out; the set's own where it has one, else 224.
        in_chans: 1 (greyscale) or 3; the set's own by default.
        mean, std: per channel, for pixels in [0, 1]; the set's own (digits) or ImageNet's by default.
        augment: random changes of the training images: a shift by at most one pixel (digits; off by default), timm's
            training transform (folder; on). Never on the test split.

    Files are read as a viewer shows them: turned as their EXIF data say, transparency white, 16 bits as 8, floats from
    0 to 1. In a folder, what is no image by its name is left out, and the log names it.

    Returns:
        a dataset of (image, label): float32 (C, H, W), normalised, and the number of its class.

    Raises:
        ValueError: an unknown name or split, a value out of its range, a missing or unreadable file, a class folder
            without images; it names the remedy.

    Example:
        >>> digits = fv.load_dataset("digits", "test")
        >>> len(digits), digits.input_size
        (360, (1, 8, 8))
    """
    check_choice("name", name, DATASETS)
    check_choice("split", split, SPLITS)
    check_choice("augment", augment, (None, True, False))
    if image_size is not None:
        check_count("load_dataset", "image_size", image_size, 1, LARGEST_SIZE)
    is_number = isinstance(in_chans, Integral) and not isinstance(in_chans, bool)
    if in_chans is not None and not (is_number and in_chans in (1, 3)):
        fail("load_dataset", "in_chans", "1 (greyscale), 3 (RGB) or None", in_chans)
    if augment is None:
        augment = name != "digits"
    augment = augment and split == "train"
    default_mean, default_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if name == "digits":
        default_mean, default_std = DIGITS_MEAN, DIGITS_STD
    side = image_size or SIZES[name]
    channels = int(in_chans or (1 if name == "digits" else 3))
    preprocessing = Preprocessing(
        (channels, side, side),
        of_channels("mean", default_mean if mean is None else mean, channels),
        of_channels("std", default_std if std is None else std, channels),
        crop_pct=0.875 if name == "folder" else 1.0,
    )
    if name == "digits":
        return _load_digits(split, preprocessing, augment)
    if not isinstance(data_dir, (str, Path)):
        raise ValueError(f"load_dataset: dataset {name!r} needs the folder that holds it. Pass data_dir.")
    return _load_folder(Path(data_dir), split, preprocessing, augment)


def _load_digits(split: str, preprocessing: Preprocessing, augment: bool) -> ArrayImages:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ValueError(
            "load_dataset: the digits come with scikit-learn, which is not installed. "
            "Run: pip install 'fastshap-kernels[digits]'"
        ) from error
    bunch = load_digits()
    rows = train_test_split(
        np.arange(len(bunch.target)), test_size=DIGITS_TEST_IMAGES, stratify=bunch.target, random_state=0
    )[SPLITS.index(split)]
    pixels = torch.from_numpy(bunch.images[rows].astype(np.uint8))[:, None]
    pixels = pixels.expand(-1, preprocessing.input_size[0], -1, -1).contiguous()
    labels = torch.from_numpy(bunch.target[rows].astype(np.int64))
    classes = [str(name) for name in bunch.target_names]
    shift = transforms.RandomCrop(8, padding=1) if augment else None
    return ArrayImages(pixels, labels, classes, preprocessing, largest=16, augment=shift)


def _load_folder(data_dir: Path, split: str, preprocessing: Preprocessing, augment: bool) -> FolderImages:
    root = _split_folder(data_dir, split)
    # Both splits number the classes of the training folder, so that a class without a test image shifts no label.
    classes = _class_names(_split_folder(data_dir, "train"))
    if not classes:
        raise ValueError(
            f"load_dataset: {str(data_dir)!r} has no class folders for training. Make one subfolder a class."
        )
    unknown = sorted(set(_class_names(root)) - set(classes))
    if unknown:
        raise ValueError(
            f"load_dataset: the folder {str(root)!r} has the class {unknown[0]!r}, which the training folder has not "
            f"({len(classes)} classes there). Make the class folders of both splits agree."
        )
    return FolderImages(root, classes, preprocessing, augment)


def _split_folder(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"load_dataset: there is no folder {str(data_dir)!r}. Check data_dir.")
    for name in FOLDER_NAMES[split]:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise ValueError(
        f"load_dataset: {str(data_dir)!r} has no subfolder for the {split} split: "
        f"make one named {' or '.join(FOLDER_NAMES[split])}, with one subfolder a class."
    )


def _class_names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
