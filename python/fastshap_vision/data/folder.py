"""An image folder, one subfolder a class."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torchvision.datasets import ImageFolder

from fastshap_kernels._checks import fail

from ..images.decode import read_image, suffixes
from ..images.preprocessing import Preprocessing

_log = logging.getLogger(__name__)

FOLDER_NAMES = {"train": ("train", "training"), "test": ("test", "val", "validation")}


class FolderImages(ImageFolder):
    """An image folder, one subfolder a class, read by torchvision.

    Images in folders within a class's are of that class. A file that cannot be read stops the reading; what no image
    ends like is left out, and the log names it. Hidden files and folders are none.

    Args:
        root: the folder of the class folders.
        classes: their names; an image's label is the place of its class among them.
        preprocessing: the size and normalisation of what comes out.
        augment: whether timm's training transform changes the images at random; or its arguments.
        resize: "pillow" or "torch"; see `load_dataset`.

    Raises:
        ValueError: for a class folder without an image; on reading, for a file that is no whole image.
    """

    def __init__(
        self,
        root: Path,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        augment: bool | Mapping[str, Any] = False,
        resize: str = "pillow",
    ) -> None:
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
            transform=preprocessing.transform(augment, resize),
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


def load_folder(
    data_dir: Path,
    split: str,
    preprocessing: Preprocessing,
    augment: bool | Mapping[str, Any],
    class_map: dict[Any, int] | None,
    resize: str,
) -> FolderImages:
    root = _split_folder(data_dir, split)
    # Both splits number the classes of the training folder, so that a class without a test image shifts no label.
    if class_map is None:
        classes = _class_names(_split_folder(data_dir, "train"))
    else:
        classes = sorted(class_map, key=lambda name: class_map[name])
        if len(set(class_map.values())) < len(classes) or not all(isinstance(name, str) for name in classes):
            fail("load_dataset", "class_map", "the folder of each number, and one folder each", class_map)
    if not classes:
        raise ValueError(
            f"load_dataset: {str(data_dir)!r} has no class folders for training. Make one subfolder a class."
        )
    unknown = sorted(set(_class_names(root)) - set(classes))
    if unknown and class_map is not None:
        _log.warning(
            "%d folders of %r are not in class_map, and left out: %s", len(unknown), str(root), _named(unknown)
        )
    elif unknown:
        raise ValueError(
            f"load_dataset: the folder {str(root)!r} has the class {unknown[0]!r}, which the training folder has not "
            f"({len(classes)} classes there). Make the class folders of both splits agree."
        )
    return FolderImages(root, classes, preprocessing, augment, resize)


def _split_folder(data_dir: Path, split: str) -> Path:
    if not data_dir.is_dir():
        raise ValueError(f"load_dataset: there is no folder {str(data_dir)!r}. Check data_dir.")
    names = FOLDER_NAMES.get(split, (split,))
    for name in names:
        if (data_dir / name).is_dir():
            return data_dir / name
    raise ValueError(
        f"load_dataset: {str(data_dir)!r} has no subfolder for the {split} split: "
        f"make one named {' or '.join(names)}, with one subfolder a class."
    )


def _class_names(root: Path) -> list[str]:
    return sorted(folder.name for folder in root.iterdir() if folder.is_dir() and not folder.name.startswith("."))
