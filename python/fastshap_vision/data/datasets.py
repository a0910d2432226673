"""Data: scikit-learn's digits, image folders and what timm names; each knows its classes, size and normalisation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, IterableImageDataset
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import transforms

from fastshap_kernels._checks import check_count, fail

from .._checks import check_choice
from ..images.preprocessing import LARGEST_SIZE, Preprocessing, of_channels
from . import timm_datasets
from .folder import FolderImages, load_folder
from .identity import identified
from .timm_datasets import TimmImages

DATASETS = ("digits", "folder")
SPLITS = ("train", "test")
#: Splits whose images are never changed at random.
UNCHANGED = ("test", "val", "valid", "validation", "eval", "evaluation")
RESIZES = ("pillow", "torch")
TORCH_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
#: Height and width of the images where nothing else is asked for.
SIZE, DIGITS_SIZE = 224, 8

# Mean and standard deviation of a digit's pixels, each divided by the largest (16), over the training split.
DIGITS_MEAN = (0.305,)
DIGITS_STD = (0.376,)
DIGITS_TEST_IMAGES = 360


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


def load_dataset(
    name: str,
    split: str,
    *,
    data_dir: str | Path | None = None,
    image_size: int | None = None,
    in_chans: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preprocessing: Preprocessing | None = None,
    augment: bool | Mapping[str, Any] | None = None,
    class_map: str | Path | Mapping[Any, int] | None = None,
    resize: str = "pillow",
    **options: Any,
) -> ArrayImages | FolderImages | TimmImages | IterableImageDataset:
    """One split of a dataset, with `.classes`, `.input_size` (C, H, W), `.mean`, `.std` and `.preprocessing`.

    Args:
        name: "digits" (scikit-learn's, 1437 + 360 images of 8 x 8); "folder" (train/ and test/ or val/, one subfolder
            a class); "tar" (train.tar and test.tar or val.tar of such folders, or one file); or a name of
            `timm.data.create_dataset`: "torch/cifar10" and the like, "hfds/…" (Hugging Face's datasets, by index), and
            the streams "wds/…", "hfids/…" and "tfds/…", which have no index and so serve a loop of your own alone.
        split: "train" or "test"; of a folder also the name of a subfolder; of others what timm takes.
        data_dir: the folder that holds the splits.
        image_size: height and width of the images that come out; the set's own where it has one, else 224.
        in_chans: 1 (greyscale) or 3; the set's own by default.
        mean, std: per channel, for pixels in [0, 1]; the set's own (digits) or ImageNet's by default.
        preprocessing: all four and the crop at once, such as `model.preprocessing` or
            `Preprocessing.of_model("resnet50.a1_in1k")`.
        augment: random changes of the training images: a shift by at most one pixel (digits; off by default), timm's
            training transform (others; on), or a dict of arguments for it, such as
            {"auto_augment": "rand-m9-mstd0.5-inc1", "re_prob": 0.25}. Never of a test or validation split.
        class_map: which label has which number, from 0 on: a dict, or a text file with one label a line. Of a folder or
            tar file, other folders are left out. For streams and labels without names.
        resize: by "pillow", as timm does, to the bit; or, of images that are not augmented, by "torch": faster, and a
            few pixels (without AVX2, many) differ by up to two of 255 levels.
        options: of `timm.data.create_dataset`, for what timm names, such as download, input_key and target_key.

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
    of_timm = timm_datasets.is_timm_name(name)
    if not of_timm:
        check_name(name)
        if options:
            raise ValueError(f"load_dataset: there is no argument `{next(iter(options))}` for {name!r}. Leave it out.")
    if name == "digits":
        check_choice("split", split, SPLITS)
    elif not isinstance(split, str) or not split:
        fail("load_dataset", "split", "the name of a split, such as 'train' or 'test'", split)
    check_choice("resize", resize, RESIZES)
    augment = _checked_augment(augment, name, split)
    kept = None if class_map is None else _checked_class_map(class_map)
    found = checked_preprocessing(name, preprocessing, image_size, in_chans, mean, std)
    is_known = found.interpolation in TORCH_INTERPOLATIONS and found.crop_mode != "border"
    if resize == "torch" and not is_known:
        expected = f"'pillow' for {found.interpolation!r} interpolation and crop mode {found.crop_mode!r}"
        fail("load_dataset", "resize", expected, resize)
    if name == "digits":
        if kept is not None:
            raise ValueError("load_dataset: argument `class_map`: the digits have their own classes. Leave it out.")
        loaded: Any = _load_digits(split, found, bool(augment))
    elif of_timm:
        loaded = timm_datasets.load(name, split, data_dir, found, augment, kept, resize, options)
    elif not isinstance(data_dir, (str, Path)):
        raise ValueError(f"load_dataset: dataset {name!r} needs the folder that holds it. Pass data_dir.")
    else:
        loaded = load_folder(Path(data_dir), split, found, augment, kept, resize)
    named = {key: repr(value) for key, value in sorted(options.items()) if key != "download"}
    return identified(loaded, found, augment, resize, [name, split, named])


def is_known(name: object) -> bool:
    """Whether it is a name of ours or timm's."""
    return timm_datasets.is_timm_name(name) or (isinstance(name, str) and name in DATASETS)


def check_name(name: object) -> None:
    if not is_known(name):
        known = ", ".join((*DATASETS, "tar", *(f"{prefix}…" for prefix in timm_datasets.INDEXED)))
        fail("load_dataset", "name", f"one of {known}, or a stream's of timm", name)


def _checked_augment(augment: object, name: str, split: str) -> bool | Mapping[str, Any]:
    """What changes the images of this split at random."""
    if isinstance(augment, Mapping) and name == "digits":
        fail("load_dataset", "augment", "True, False or None for the digits, which are shifted", augment)
    if not isinstance(augment, Mapping):
        check_choice("augment", augment, (None, True, False))
    if split.split("[")[0] in UNCHANGED:
        return False
    return name != "digits" if augment is None else augment  # type: ignore[return-value]


def checked_preprocessing(
    name: str,
    preprocessing: Preprocessing | None,
    image_size: int | None,
    in_chans: int | None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preprocessing:
    """As given at once or in parts; the digits' are never cropped."""
    parts = {"image_size": image_size, "in_chans": in_chans, "mean": mean, "std": std}
    given = [part for part, value in parts.items() if value is not None]
    if preprocessing is not None:
        if not isinstance(preprocessing, Preprocessing):
            fail("load_dataset", "preprocessing", "a Preprocessing or None", preprocessing)
        if given:
            fail("load_dataset", given[0], "None beside `preprocessing`, which says it", parts[given[0]])
        whole = {"crop_pct": 1.0, "interpolation": "bilinear", "crop_mode": "center"}
        return replace(preprocessing, **whole) if name == "digits" else preprocessing  # type: ignore[arg-type]
    if image_size is not None:
        check_count("load_dataset", "image_size", image_size, 1, LARGEST_SIZE)
    is_number = isinstance(in_chans, Integral) and not isinstance(in_chans, bool)
    if in_chans is not None and not (is_number and in_chans in (1, 3)):
        fail("load_dataset", "in_chans", "1 (greyscale), 3 (RGB) or None", in_chans)
    default_mean, default_std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    if name == "digits":
        default_mean, default_std = DIGITS_MEAN, DIGITS_STD
    side = image_size or (DIGITS_SIZE if name == "digits" else SIZE)
    channels = int(in_chans or (1 if name == "digits" else 3))
    return Preprocessing(
        (channels, side, side),
        of_channels("mean", default_mean if mean is None else mean, channels),
        of_channels("std", default_std if std is None else std, channels),
        crop_pct=1.0 if name == "digits" else 0.875,
    )


def _checked_class_map(class_map: object) -> dict[Any, int]:
    """Each label's number."""
    if isinstance(class_map, (str, Path)):
        path = Path(class_map)
        if path.suffix.lower() != ".txt" or not path.is_file():
            fail("load_dataset", "class_map", "a dict, or a text file (.txt) with one label a line", class_map)
        class_map = {line.strip(): number for number, line in enumerate(path.read_text("utf-8").split("\n")) if line}
    numbers = sorted(set(class_map.values())) if isinstance(class_map, Mapping) else []
    if not isinstance(class_map, Mapping) or not numbers or numbers != list(range(len(numbers))):
        fail("load_dataset", "class_map", "a number from 0 on, without gaps, of each label", class_map)
    return dict(class_map)


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
