"""Which images a dataset holds, in what order, and what is made of them: by it runs and recordings know their own."""

from __future__ import annotations

import json
import os
from typing import Any

from torch import Tensor
from torch.utils.data import Subset

from .._runtime.digest import digest_of_json, digest_of_tensors, digest_of_words
from ..images.preprocessing import Preprocessing
from .mirrored import WithMirrorImages


def identified(data: Any, preprocessing: Preprocessing, augment: Any, resize: str, names: Any) -> Any:
    """The data themselves, which know from now on what they are; see `identity_of`.

    Args:
        data: of `load_dataset`, with `classes`, and pixels or files.
        preprocessing, augment, resize: what is made of each image.
        names: JSON-able, what names the data that hold neither.
    """
    found = {
        "images": _images(data, names),
        "classes": digest_of_json(list(getattr(data, "classes", ())))[:16],
        "augment": augment if isinstance(augment, bool) else dict(augment),
        "resize": resize,
        **{f"preprocessing.{name}": value for name, value in preprocessing.as_dict().items()},
    }
    data.identity = json.loads(json.dumps(found, default=str))  # tuples become lists, as in a file
    return data


def identity_of(data: Any) -> dict[str, Any]:
    """JSON-able, by name: of what `load_dataset` returned, of some of its rows or with mirror images; {} of others.

    A folder's images are known by their names below it, so that it may be moved.
    """
    if isinstance(data, Subset | WithMirrorImages):
        inner, part = identity_of(data.dataset if isinstance(data, Subset) else data.data), "with mirror images"
        if isinstance(data, Subset):
            part = digest_of_json(list(map(int, data.indices)))
        return inner and inner | {"images": digest_of_json([inner["images"], part])[:16]}
    found = getattr(data, "identity", None)
    return dict(found) if isinstance(found, dict) and "images" in found else {}


def images_identity(data: Any) -> dict[str, Any]:
    """The same without the classes, which have no part in what is recorded."""
    return {name: value for name, value in identity_of(data).items() if name != "classes"}


def _images(data: Any, names: Any) -> str:
    """Of the pixels, else of the files' names in their order, else of what names the data."""
    words = [json.dumps(names)]
    pixels, samples, reader = (getattr(data, name, None) for name in ("pixels", "samples", "reader"))
    if isinstance(pixels, Tensor):
        return digest_of_tensors({"pixels": pixels})[:16]
    if samples is not None:
        words = [os.path.relpath(path, data.root) for path, _ in samples]
    elif reader is not None and hasattr(reader, "samples"):  # of a tar file
        words = [reader.filename(row) for row in range(len(data))]
    return digest_of_words(words)[:16]
