"""Recorded coalitions in a folder: safetensors shards, each written whole or not at all, and a manifest.

    manifest.json        what was recorded, of how many images, by which model; once all is there, each shard's digest
    000000.safetensors   the first images: bits, values (or features, or values and classes), and a check sum of each

Rows are read from the files as they are wanted and compared with their check sums. No file stays open or mapped: a file
that is cut short is an error, not the end of the process, and memory is that of the rows.
"""

from __future__ import annotations

import json
import os
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .._files import write_whole
from .._runtime.digest import bytes_of, digest_of_json, digest_of_tensors

MANIFEST = "manifest.json"
_FORMAT = "fastshap_vision.RecordedCoalitions/3"
_DTYPES = {"I32": torch.int32, "F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
_CHECKS = "checks"
#: No header of ours is nearly as long.
_LONGEST_HEADER = 2**20


@dataclass(frozen=True)
class Manifest:
    """What was recorded.

    Args:
        images, coalitions, players: N, M, P.
        seed: of the coalitions; None where it is not known.
        precision: of v(S), as in `record_coalitions`.
        dtype, store, classes: of what is kept.
        shard: images in each shard but the last.
        model: the fingerprint of the encoder and its classifier; None where it is not known.
        pictures: mean and standard deviation of some images.
        digests: of each shard; None while some are missing.
        data: which images, and how they are prepared; {} where it is not known.
    """

    images: int
    coalitions: int
    players: int
    seed: int | None
    precision: str | None
    dtype: str
    store: str
    classes: int | None
    shard: int
    model: str | None
    pictures: list[list[float]]
    digests: list[str] | None = None
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def shards(self) -> int:
        return -(-self.images // self.shard)

    def rows(self, index: int) -> range:
        """The images of a shard."""
        return range(index * self.shard, min(self.images, (index + 1) * self.shard))

    def other_settings(self, wanted: Manifest) -> list[str]:
        """What differs, in words; the pictures apart. Where one does not know its data, they do not differ."""
        known = bool(self.data and wanted.data)
        found, expected = (
            asdict(replace(each, digests=None, pictures=[], data={}))
            | {f"data.{name}": value for name, value in each.data.items() if known}
            for each in (self, wanted)
        )
        differing = [name for name in found if found[name] != expected.get(name)]
        return [f"{name} was {found[name]!r} and is {expected.get(name)!r}" for name in differing]

    def write(self, folder: Path) -> None:
        """Writes it into the folder, whole or not at all."""
        text = json.dumps(
            {"format": _FORMAT, "digest": digest_of_json(asdict(self)), "manifest": asdict(self)}, indent=1
        )
        write_whole(folder / MANIFEST, text.encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises a ValueError for what was not written by `write`."""
        path = folder / MANIFEST
        try:
            found = json.loads(path.read_bytes())
            if not isinstance(found, dict) or found.get("format") != _FORMAT:
                raise ValueError("it is no manifest of recorded coalitions")
            content = found["manifest"]
            if found["digest"] != digest_of_json(content):
                raise ValueError("it is not what was written")
            manifest = cls(**content)
            if not all(isinstance(number, int) and number > 0 for number in (manifest.images, manifest.shard)):
                raise ValueError("it holds no images")
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise damaged(path, error) from error
        return manifest


class InMemory:
    """Tensors of all images.

    Args:
        tensors: by name, each of the images' number of rows.
        shard: images that have one digest.
    """

    def __init__(self, tensors: dict[str, Tensor], shard: int) -> None:
        self.tensors, self.shard = tensors, shard

    def __len__(self) -> int:
        return len(self.tensors["bits"])

    @property
    def coalitions(self) -> int:
        return self.tensors["bits"].shape[1]

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(rows, dtype=torch.int64)
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def digests(self) -> list[str]:
        cut = [
            {name: tensor[at : at + self.shard] for name, tensor in self.tensors.items()}
            for at in range(0, len(self), self.shard)
        ]
        return [digest_of(part) for part in cut]


class Shards:
    """The rows of a folder's shards, of those that are there.

    Args:
        folder: which holds them.
        manifest: of the folder.
        present: the shards that are there, in order.
    """

    def __init__(self, folder: Path, manifest: Manifest, present: Sequence[int]) -> None:
        self.folder, self.manifest, self.present = folder, manifest, list(present)
        self.images = [row for index in self.present for row in manifest.rows(index)]
        self._headers: dict[int, _Header] = {}

    def __len__(self) -> int:
        return len(self.images)

    @property
    def coalitions(self) -> int:
        return self.manifest.coalitions

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Raises a ValueError that names the file where it is not what was written."""
        places = defaultdict(list)
        for place, row in enumerate(rows):
            index, within = divmod(self.images[row], self.manifest.shard)
            places[index].append((within, place))
        found: dict[str, Tensor] = {}
        for index in sorted(places):
            header = self._header(index)
            if not found:
                found = {name: header.empty(name, len(rows)) for name in header.names}
            try:
                header.read(sorted(places[index]), found)
            except (OSError, ValueError, KeyError) as error:
                raise damaged(header.path, error) from error
        return found

    def digests(self) -> list[str]:
        """As the shards' headers say."""
        return [self._header(index).digest for index in self.present]

    def _header(self, index: int) -> _Header:
        if index not in self._headers:
            path = path_of(self.folder, index)
            try:
                self._headers[index] = _Header(path, len(self.manifest.rows(index)))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise damaged(path, error) from error
        return self._headers[index]


class _Header:
    """Where the rows of a shard lie in its file: 8 bytes with the header's length, the header as JSON, the tensors."""

    def __init__(self, path: Path, images: int) -> None:
        self.path, self.images = path, images
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError("it is no shard of recorded coalitions")
            header = json.loads(file.read(length))
        self.digest = str(header.pop("__metadata__")["digest"])
        self.tensors: dict[str, tuple[torch.dtype, tuple[int, ...], int]] = {}
        for name, entry in header.items():
            dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            if shape[0] != images or end - begin != dtype.itemsize * torch.Size(shape).numel():
                raise ValueError(f"its {name} have the shape {shape}")
            self.tensors[name] = (dtype, tuple(shape[1:]), 8 + length + begin)
        self.names = sorted(self.tensors.keys() - {_CHECKS})
        self._checks: Tensor | None = None

    def empty(self, name: str, count: int) -> Tensor:
        dtype, shape, _ = self.tensors[name]
        return torch.empty(count, *shape, dtype=dtype)

    def read(self, places: Sequence[tuple[int, int]], into: Mapping[str, Tensor]) -> None:
        """Rows of the file into places of the tensors: pairs of both."""
        with self.path.open("rb", buffering=0) as file:
            if self._checks is None:
                self._checks = self.empty(_CHECKS, self.images)
                _read(file, self.tensors[_CHECKS][2], self._checks)
            for row, place in places:
                targets = [into[name][place] for name in self.names]
                for name, target in zip(self.names, targets, strict=True):
                    _read(file, self.tensors[name][2] + row * target.nbytes, target)
                if _check_of(targets) != int(self._checks[row]):
                    raise ValueError("it is not what was written")


def _read(file: Any, at: int, into: Tensor) -> None:
    file.seek(at)
    if file.readinto(bytes_of(into)) != into.nbytes:
        raise ValueError("it is cut short")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a shard, whole or not at all.

    Args:
        path: of the file.
        tensors: by name, each with a row for every image.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    digest = digest_of(tensors)
    rows = zip(*(tensors[name] for name in sorted(tensors)), strict=True)
    checks = torch.tensor([_check_of(row) for row in rows])
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
    try:
        save_file(tensors | {_CHECKS: checks}, unfinished, {"digest": digest})
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def kept_as(folder: Path) -> dict[str, Any]:
    """What a recording that was begun was made with, as arguments of `record_coalitions`; {} where there is none."""
    if not (folder / MANIFEST).exists():
        return {}
    manifest = Manifest.read(folder)
    kept = {name: getattr(manifest, name) for name in ("dtype", "store", "classes", "shard")}
    return kept | ({} if manifest.precision is None else {"precision": manifest.precision})


def path_of(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.safetensors"


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Of the tensors' bytes, types and shapes."""
    return digest_of_tensors({name: tensors[name] for name in sorted(tensors)})


def damaged(path: Path, error: Exception) -> ValueError:
    remedy = "Delete it, and call fv.record_coalitions(model, data) again, which records what is missing."
    if path.name == MANIFEST:
        remedy = "Call fv.record_coalitions(model, data) again, into another folder."
    return ValueError(
        f"RecordedCoalitions: the file {str(path)!r} is damaged, or holds no coalitions: {error}. {remedy}"
    )


def _check_of(row: Sequence[Tensor]) -> int:
    """A check sum of the tensors of an image, in the order of their names."""
    check = 0
    for tensor in row:
        check = zlib.crc32(bytes_of(tensor), check)
    return check
