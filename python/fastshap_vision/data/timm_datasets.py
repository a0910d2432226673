"""Datasets that timm names: torchvision's, Hugging Face's, tar files, and streams."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from PIL import Image
from timm.data import IterableImageDataset, create_dataset
from timm.data.readers.reader_image_in_tar import ReaderImageInTar
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets import DatasetFolder

from .._checks import shortened
from ..images.decode import as_viewed, decode, read_image
from ..images.preprocessing import Preprocessing

#: What timm's names begin with; "tar" is one file of class folders.
INDEXED, STREAMED = ("torch/", "hfds/"), ("wds/", "hfids/", "tfds/")
#: Of the readers that are no dependency of timm.
PACKAGES = {"hfds/": "datasets", "hfids/": "datasets", "wds/": "webdataset", "tfds/": "tensorflow-datasets"}

#: Of a tar file: its table of contents is read each time.
NO_PICKLE = {"cache_tarinfo": False}
#: Other names of a split, in the order in which they are looked for.
SYNONYMS = {"train": ("training",), "test": ("val", "validation"), "validation": ("val", "test")}


class TimmImages(Dataset):
    """A dataset that timm made, of images that are read by their number.

    Images are decoded as in a folder: upright, transparency white, 16 bits as 8; what can't be read stops the reading.

    Args:
        images: what `timm.data.create_dataset` returned, other than a stream.
        preprocessing: the size and normalisation of what comes out.
        augment: of timm's training transform, or False; see `Preprocessing.transform`.
        resize: "pillow" or "torch"; see `load_dataset`.

    Raises:
        ValueError: where the data name no classes; on reading, for what is no whole image.
    """

    def __init__(
        self, images: Any, preprocessing: Preprocessing, augment: bool | Mapping[str, Any], resize: str = "pillow"
    ) -> None:
        self.images = images
        self.reader = getattr(images, "reader", None)
        if isinstance(images, DatasetFolder):
            images.loader = partial(read_image, mode=preprocessing.mode)
        self.classes = _class_names(images)
        self.preprocessing = preprocessing
        self.transform = preprocessing.transform(augment, resize)
        self.input_size, self.mean, self.std = preprocessing.input_size, preprocessing.mean, preprocessing.std

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        if self.reader is None:
            picture, label = self.images[row]
            picture = as_viewed(picture, self.preprocessing.mode)
        else:
            source, label = _in_tar(self.reader, row) if isinstance(self.reader, ReaderImageInTar) else self.reader[row]
            with source:
                picture = self._decoded(source, row)
        return self.transform(picture), int(label)

    def _decoded(self, source: Any, row: int) -> Image.Image:
        try:
            return decode(source, self.preprocessing.mode)
        except ValueError as error:
            assert self.reader is not None
            name = self.reader.filename(row) or f"image {row}"
            raise ValueError(
                f"{str(name)!r} is not an image that can be read: {error}. Replace it, or take it out of the data."
            ) from error


class _Viewed:
    """The transform of a stream, whose pictures timm opens."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], mode: str) -> None:
        self.transform, self.mode = transform, mode

    def __call__(self, picture: Image.Image) -> Tensor:
        return self.transform(as_viewed(picture, self.mode))


def is_timm_name(name: object) -> bool:
    return isinstance(name, str) and (name == "tar" or name.lower().startswith(INDEXED + STREAMED))


def is_by_timm(name: str) -> bool:
    """Whether timm's default names of splits, train and validation, are its own."""
    return is_timm_name(name) and name != "tar"


def load(
    name: str,
    split: str,
    data_dir: str | Path | None,
    preprocessing: Preprocessing,
    augment: bool | Mapping[str, Any],
    class_map: Mapping[Any, int] | None,
    resize: str,
    options: dict[str, Any],
) -> TimmImages | IterableImageDataset:
    """What `timm.data.create_dataset` makes of the name, with our decoding and the transform."""
    prefix = next((known for known in INDEXED + STREAMED if name.lower().startswith(known)), "tar")
    root = None if data_dir is None else str(data_dir)
    if prefix == "tar":
        root, class_map = _tar(data_dir, split, class_map)
        options = NO_PICKLE | options
    if class_map is not None and prefix != "torch/":
        numbers = {int(label): number for label, number in class_map.items() if str(label).isdecimal()}
        options = {"class_map": dict(class_map) | numbers} | options  # a text file's labels may be numbers in the data
    elif class_map is not None:
        raise ValueError(f"load_dataset: argument `class_map`: {name!r} has its own classes. Leave it out.")
    is_training = bool(augment)
    try:
        found = create_dataset(
            "" if prefix == "tar" else name,
            root=root,
            split=split,
            is_training=is_training,
            input_img_mode="",
            **options,
        )
    except Exception as error:  # readers of many packages raise errors of any kind
        raise ValueError(
            f"load_dataset: timm can't make the dataset {name!r}, split {split!r}, from data_dir {root!r}: "
            f"{type(error).__name__}: {shortened(error).rstrip('.')}. {_remedy(prefix, error)}"
        ) from error
    if not isinstance(found, IterableImageDataset):
        return TimmImages(found, preprocessing, augment, resize)
    found.transform = _Viewed(preprocessing.transform(augment, resize), preprocessing.mode)
    found.preprocessing = preprocessing
    if found.reader.class_to_idx:
        found.classes = _class_names(found)
    return found


def _remedy(prefix: str, error: Exception) -> str:
    package = PACKAGES.get(prefix)
    if isinstance(error, ImportError) or "Please install" in str(error):
        return f"Run: pip install {package}"
    if "download" in str(error):
        return "Check data_dir, or pass download=True."
    return "Check the name, split and data_dir; timm's documentation lists the names."


def _tar(
    data_dir: str | Path | None, split: str, class_map: Mapping[Any, int] | None
) -> tuple[str, Mapping[Any, int] | None]:
    """The file of a split, and the classes: those of the training split, so that both number them alike."""
    given = None if data_dir is None else Path(data_dir)
    if given is not None and given.is_file():
        return str(given), class_map
    names = (split, *SYNONYMS.get(split, ()))
    path = _first(given, names)
    if given is None or path is None:
        raise ValueError(
            f"load_dataset: the dataset 'tar' needs a tar file of class folders as data_dir, or a folder that holds "
            f"{' or '.join(f'{name}.tar' for name in names)}, but data_dir is {str(data_dir)!r}. Pass one of these."
        )
    training = _first(given, ("train", *SYNONYMS["train"]))
    if class_map is None and training is not None and training != path:
        of_training = create_dataset("", root=str(training), **NO_PICKLE)
        class_map = of_training.reader.class_name_to_idx
    return str(path), class_map


def _in_tar(reader: ReaderImageInTar, row: int) -> tuple[IO[bytes], int]:
    """A file where timm found it, with no file left open, whose position worker processes would share."""
    member, archive, inner = reader.samples[row]
    with open(Path(reader.root, archive) if archive else reader.root, "rb") as file:
        file.seek(member.offset_data + (inner.offset_data if inner is not None else 0))
        return BytesIO(file.read(member.size)), int(reader.targets[row])


def _first(folder: Path | None, names: tuple[str, ...]) -> Path | None:
    paths = [folder / f"{name}.tar" for name in names] if folder is not None else []
    return next((path for path in paths if path.is_file()), None)


def _class_names(images: Any) -> tuple[str, ...]:
    """The names by number; of several names of one class, the first."""
    reader = getattr(images, "reader", None)
    found = getattr(images, "classes", None)
    if reader is not None:
        numbers = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None) or {}
        names = {number: str(name) for name, number in reversed(numbers.items())}
        found = [names.get(number, str(number)) for number in range(max(names, default=-1) + 1)]
    if not found:
        raise ValueError(
            "load_dataset: the data name no classes. Pass class_map: a dict from each label to its class number, or a "
            "text file with one label a line."
        )
    return tuple(str(name) for name in found)
