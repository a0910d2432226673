"""Data: the two built-in small sets and image folders, as datasets that know their classes, size and normalisation."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, ImageDataset, create_transform
from timm.data.readers.reader_image_folder import ReaderImageFolder
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms

DATASETS = ("digits", "cifar10", "folder")
SPLITS = ("train", "test")

# Mean and standard deviation of a digit's pixels, each divided by the largest (16), over the training split.
DIGITS_MEAN = (0.305,)
DIGITS_STD = (0.376,)
DIGITS_TEST_IMAGES = 360

ARCHIVE_KEYS = ("jpeg", "offsets", "labels", "classes")
FOLDER_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation")}


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: JSON-able, so that a checkpoint can keep it.

    Args:
        input_size: (C, H, W) of the model's input; one channel means greyscale.
        mean, std: per channel, for pixels in [0, 1].
        crop_pct: the share of the resized image that the centre crop keeps, as in timm.
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Preprocessing:
        channels, height, width = record["input_size"]
        return cls((channels, height, width), tuple(record["mean"]), tuple(record["std"]), record["crop_pct"])

    def transform(self, augment: bool = False) -> Callable[[Image.Image], Tensor]:
        """timm's transform from a PIL image to a normalised tensor (C, H, W)."""
        size = {"input_size": self.input_size, "mean": self.mean, "std": self.std}
        if augment:
            return create_transform(**size, is_training=True)
        return create_transform(**size, crop_pct=self.crop_pct, interpolation="bilinear")

    def load(self, path: str | Path) -> Tensor:
        """Reads an image file as a normalised tensor (C, H, W)."""
        try:
            with Image.open(path) as image:
                return self.transform()(image.convert("L" if self.input_size[0] == 1 else "RGB"))
        except FileNotFoundError:
            raise ValueError(f"load: there is no image {str(path)!r}. Check the path.") from None
        except (UnidentifiedImageError, OSError) as error:
            raise ValueError(
                f"load: {str(path)!r} is not an image that Pillow can read ({error}). Convert it to PNG or JPEG."
            ) from error

    def restore(self, images: Tensor) -> Tensor:
        """The inverse of the normalisation: pixels in [0, 1], for pictures."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)


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
        """A batch at once, which is what torch's DataLoader asks for: tiny images one by one cost more than a step."""
        pixels = self.pixels[rows]
        if self.augment is not None:
            pixels = torch.stack([self.augment(image) for image in pixels])
        images = pixels.float() / self.largest
        if self.resize is not None:
            images = self.resize(images)
        images = (images - self._mean) / self._std
        return list(zip(images.unbind(), self.labels[rows].tolist(), strict=True))


class _ClosingReader(ReaderImageFolder):
    """timm's reader of image folders; it leaves no file open."""

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        path, label = self.samples[index]
        return io.BytesIO(Path(path).read_bytes()), label


class FolderImages(ImageDataset):
    """An image folder, one subfolder a class, read by timm."""

    def __init__(self, root: Path, class_map: dict[str, int], preprocessing: Preprocessing, augment: bool) -> None:
        super().__init__(
            str(root),
            reader=_ClosingReader(str(root), class_map=class_map),
            input_img_mode="L" if preprocessing.input_size[0] == 1 else "RGB",
            transform=preprocessing.transform(augment),
        )
        self.classes = tuple(sorted(class_map, key=class_map.__getitem__))
        self.preprocessing = preprocessing
        self.input_size = preprocessing.input_size
        self.mean = preprocessing.mean
        self.std = preprocessing.std


class WithMirrorImages(Dataset):
    """Every image of a dataset and then, as many again, its mirror image.

    It makes more of the images that `play` takes, which may not change from one reading to the next. Not for images
    that are never seen mirrored, such as writing.

    Args:
        data: a dataset of (image, label), images (C, H, W).
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    @property
    def classes(self) -> Any:
        return getattr(self.data, "classes", None)

    def __len__(self) -> int:
        return 2 * len(self.data)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        return self.__getitems__([range(len(self))[row]])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, Any]]:
        """A batch at once, which is what torch's DataLoader asks for."""
        count = len(self.data)
        items = Subset(self.data, [row % count for row in rows]).__getitems__(list(range(len(rows))))
        return [
            (image.flip(-1) if row >= count else image, label) for row, (image, label) in zip(rows, items, strict=True)
        ]


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
        name: "digits" (scikit-learn's, 1437 + 360 images of 8 x 8), "cifar10" (archives cifar10_train.npz and
            cifar10_test.npz) or "folder" (train/ and test/ or val/, one subfolder a class).
        split: "train" or "test".
        data_dir: the folder that holds the archives or the splits; for "cifar10" one archive's path will do.
        image_size: height and width of the images that come out; the set's own where it has one, else 224.
        in_chans: 1 (greyscale) or 3; the set's own by default.
        mean, std: per channel, for pixels in [0, 1]; the set's own (digits) or ImageNet's by default.
        augment: random changes of the training images: a shift by at most one pixel (digits; off by default), crop
            with padding and flip (cifar10; on), timm's training transform (folder; on). Never on the test split.

    Raises:
        ValueError: an unknown name or split, a missing or unreadable file; it names the remedy.
    """
    if name not in DATASETS:
        raise ValueError(f"load_dataset: unknown dataset {name!r}. Choose one of {', '.join(DATASETS)}.")
    if split not in SPLITS:
        raise ValueError(f"load_dataset: unknown split {split!r}. Choose one of {', '.join(SPLITS)}.")
    if augment is None:
        augment = name != "digits"
    augment = augment and split == "train"
    if name == "digits":
        size = (in_chans or 1, image_size or 8, image_size or 8)
        return _load_digits(split, _preprocessing(size, mean or DIGITS_MEAN, std or DIGITS_STD), augment)
    if data_dir is None:
        raise ValueError(f"load_dataset: dataset {name!r} needs the folder that holds it. Pass data_dir.")
    mean, std = mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD
    if name == "cifar10":
        size = (in_chans or 3, image_size or 32, image_size or 32)
        return _load_archive(_archive_path(Path(data_dir), split), _preprocessing(size, mean, std), augment)
    size = (in_chans or 3, image_size or 224, image_size or 224)
    return _load_folder(Path(data_dir), split, _preprocessing(size, mean, std, crop_pct=0.875), augment)


def _preprocessing(
    size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], crop_pct: float = 1.0
) -> Preprocessing:
    """Fits the statistics to the channels: one channel's are repeated, three are averaged to one."""
    channels = size[0]
    if channels not in (1, 3):
        raise ValueError(f"load_dataset: in_chans must be 1 or 3, but it is {channels}. Images are greyscale or RGB.")

    def fit(values: Sequence[float]) -> tuple[float, ...]:
        return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels

    return Preprocessing(size, fit(mean), fit(std), crop_pct)


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


def _archive_path(data_dir: Path, split: str) -> Path:
    path = data_dir / f"cifar10_{split}.npz" if data_dir.is_dir() else data_dir
    if not path.is_file():
        raise ValueError(
            f"load_dataset: there is no archive {str(path)!r}. "
            f"Pass as data_dir the folder that holds cifar10_train.npz and cifar10_test.npz."
        )
    return path


def _load_archive(path: Path, preprocessing: Preprocessing, augment: bool) -> ArrayImages:
    """Decodes every image once: a training run reads each of them many times."""
    arrays = _read_archive(path)
    missing = [key for key in ARCHIVE_KEYS if key not in arrays]
    if missing:
        raise ValueError(
            f"load_dataset: the archive {str(path)!r} has no array {missing[0]!r}: it holds {', '.join(arrays)}. "
            f"It must hold {', '.join(ARCHIVE_KEYS)}."
        )
    jpeg, offsets, labels, classes = (arrays[key] for key in ARCHIVE_KEYS)
    _check_archive(path, jpeg, offsets, labels, classes)
    mode = "L" if preprocessing.input_size[0] == 1 else "RGB"
    stream = jpeg.tobytes()
    decoded = [
        np.asarray(Image.open(io.BytesIO(stream[start:stop])).convert(mode))
        for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    ]
    pixels = torch.from_numpy(np.stack(decoded))
    pixels = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
    crop_and_flip = transforms.Compose(
        [transforms.RandomCrop(tuple(pixels.shape[2:]), padding=4), transforms.RandomHorizontalFlip()]
    )
    return ArrayImages(
        pixels,
        torch.from_numpy(labels.astype(np.int64)),
        [str(name) for name in classes],
        preprocessing,
        largest=255,
        augment=crop_and_flip if augment else None,
    )


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file) as archive:
            return {key: archive[key] for key in archive.files}
    except (BadZipFile, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"load_dataset: the archive {str(path)!r} cannot be read ({error}). Copy or download it again."
        ) from error


def _check_archive(path: Path, jpeg: np.ndarray, offsets: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> None:
    if len(offsets) != len(labels) + 1 or len(labels) == 0 or offsets[-1] != len(jpeg):
        raise ValueError(
            f"load_dataset: the archive {str(path)!r} holds {len(labels)} labels, {len(offsets)} offsets and "
            f"{len(jpeg)} bytes of images, which do not fit together: offsets must be one more than labels and end "
            "at the number of bytes. Copy or download it again."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"load_dataset: the archive {str(path)!r} has labels from {labels.min()} to {labels.max()} but names "
            f"{len(classes)} classes. Labels must lie in [0, {len(classes)})."
        )


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
    try:
        return FolderImages(root, {name: index for index, name in enumerate(classes)}, preprocessing, augment)
    except RuntimeError as error:
        raise ValueError(
            f"load_dataset: there are no images below {str(root)!r}. Put each class's images into its subfolder."
        ) from error


def _split_folder(data_dir: Path, split: str) -> Path:
    for name in FOLDER_NAMES[split]:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise ValueError(
        f"load_dataset: {str(data_dir)!r} has no subfolder for the {split} split: "
        f"make one named {' or '.join(FOLDER_NAMES[split])}, with one subfolder a class."
    )


def _class_names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
