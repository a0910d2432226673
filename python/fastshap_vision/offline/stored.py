"""Images in folders and tar shards: which there are, in an order that never changes, and how one becomes an input."""

from __future__ import annotations

import io
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastshap_kernels._checks import fail

from .._runtime.digest import digest_of_words
from ..images.decode import decode, suffixes
from ..images.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

SHARD = ".tar"


class StoredImage(NamedTuple):
    """A file, or a part of a tar file, which is read like a folder: its name below what was given, and its bytes."""

    name: str
    file: str
    offset: int = 0
    size: int = -1  # to the end

    def read(self) -> io.BytesIO:
        with open(self.file, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def find_images(source: str | Path | Sequence[str | Path]) -> list[StoredImage]:
    """All images of a folder, a tar file, or of several paths, as `explain_images` says."""
    endings, left_out = suffixes(), list[str]()
    if isinstance(source, str | os.PathLike):
        found = list(_below(Path(source), "", endings, left_out))
    elif isinstance(source, Sequence) and all(isinstance(path, str | os.PathLike) for path in source):
        found = [image for path in source for image in _below(Path(path), str(path), endings, left_out)]
    else:
        fail("explain_images", "source", "the path of a folder, a tar file or an image, or a list of paths", source)
    if left_out:
        shown = ", ".join(left_out[:5]) + (", …" if len(left_out) > 5 else "")
        _log.warning("%d files are no images by their names, and are left out: %s", len(left_out), shown)
    if not found:
        raise ValueError(
            f"explain_images: argument `source` must hold images, but there is none in {str(source)!r}. Pass a folder "
            f"of image files, or tar shards ({SHARD}) of them."
        )
    return found


def _below(path: Path, name: str, endings: frozenset[str], left_out: list[str]) -> Iterable[StoredImage]:
    """The images of a folder and the folders and tar files in it, by name; of a tar file, in its order."""
    if path.is_dir():
        for folder, folders, files in os.walk(path, onerror=_refuse, followlinks=True):
            folders[:] = sorted(
                inner for inner in folders if not inner.startswith(".") and not _leads_back(os.path.join(folder, inner))
            )
            within = os.path.relpath(folder, path)
            for file in sorted(files):
                inner = os.path.normpath(os.path.join(name, within, file))
                ending = os.path.splitext(file)[1].lower()
                if file.startswith("."):
                    continue
                if ending == SHARD:
                    yield from _members(os.path.join(folder, file), inner, endings)
                elif ending in endings:
                    yield StoredImage(inner, os.path.join(folder, file))
                else:
                    left_out.append(inner)
    elif not path.exists():
        raise ValueError(
            f"explain_images: argument `source`: there is no file or folder {str(path)!r}. Check the path."
        )
    elif path.suffix.lower() == SHARD:
        yield from _members(str(path), name, endings)
    else:  # whatever its name: it was asked for
        yield StoredImage(name or path.name, str(path))


def _refuse(error: OSError) -> None:
    """Without the images of a folder that can't be read, the rest would pass for all."""
    raise ValueError(
        f"explain_images: argument `source`: the folder {error.filename!r} can't be read: {error.strerror}. Let it be "
        "read, or take it out of the images."
    ) from error


def _leads_back(folder: str) -> bool:
    """Whether it is a link to a folder that it lies in, whose images would be found again without end."""
    if not os.path.islink(folder):
        return False
    target = Path(folder).resolve()
    return any(parent.resolve().is_relative_to(target) for parent in Path(folder).parents)


def _members(path: str, name: str, endings: frozenset[str]) -> Iterable[StoredImage]:
    """The images of a tar file; its other files, such as labels, have no part in it."""
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                inner = os.path.normpath(member.name.lstrip("/"))  # ./0001.jpg, as tar writes a folder's
                is_hidden = any(part.startswith(".") and part != ".." for part in inner.split(os.sep))
                if member.isfile() and not is_hidden and os.path.splitext(inner)[1].lower() in endings:
                    yield StoredImage(os.path.join(name, inner), path, member.offset_data, member.size)
    except (tarfile.TarError, OSError) as error:
        raise ValueError(
            f"explain_images: argument `source`: {path!r} is no whole tar file: {error}. Write it again, without "
            "compression, or take it out of the images."
        ) from error


def digest_of(images: Iterable[StoredImage]) -> str:
    """Of the names and their order, and of where in tar files the images are."""
    return digest_of_words(f"{image.name}\0{image.offset}\0{image.size}" for image in images)


class Inputs(Dataset):
    """Inputs (C, H, W) of stored images, or the reason why one can't be read.

    Args:
        images: as `find_images` found them.
        preprocessing: of the model.
    """

    def __init__(self, images: Sequence[StoredImage], preprocessing: Preprocessing) -> None:
        self.images, self.mode = images, preprocessing.mode
        self.transform: Callable[[Image.Image], Tensor] = preprocessing.transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor | str:
        try:
            return self.transform(decode(self.images[row].read(), self.mode))
        except (OSError, ValueError) as error:
            return " ".join(f"{error}".split()) or type(error).__name__


class Batch(NamedTuple):
    """Inputs (n, C, H, W) of the images that can be read, and for each of the batch None or why it can't."""

    inputs: Tensor
    reasons: list[str | None]

    def pin_memory(self) -> Batch:
        return Batch(self.inputs.pin_memory(), self.reasons)


def collate(items: list[Any]) -> Batch:
    good = [item for item in items if isinstance(item, Tensor)]
    return Batch(torch.stack(good) if good else torch.empty(0), [None if torch.is_tensor(x) else x for x in items])
