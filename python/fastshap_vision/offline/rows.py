"""What is written of an image: a row of a Parquet file, or a place in safetensors shards."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .._files import write_whole

#: The key of the files' metadata.
KEY = "fastshap_vision.explain_images"


@dataclass
class Rows:
    """The explanations of consecutive images.

    Args:
        names: of all of them.
        reasons: of each, None, or why it can't be read.
        tensors: of the images that can be read, on the CPU.
    """

    names: list[str]
    reasons: list[str | None]
    tensors: dict[str, Tensor]


class ShardFiles:
    """Every class: safetensors files of `logits` (n, K), `values` (n, P, K) in float16 and `expected_error` (n, K).

    Args:
        facts: of the metadata.
        players: P.
        classes: K.
        calibrated: whether there are expected errors.
    """

    suffix = ".safetensors"

    def __init__(self, facts: Mapping[str, Any], players: int, classes: int, calibrated: bool) -> None:
        self.facts = {KEY: json.dumps(facts)}
        # Where no image of a file can be read: not every version of safetensors reads a file of no tensors.
        self.no_rows = {
            "logits": torch.empty(0, classes),
            "values": torch.empty(0, players, classes, dtype=torch.float16),
        }
        if calibrated:
            self.no_rows["expected_error"] = torch.empty(0, classes)

    def write(self, path: Path, rows: Rows) -> None:
        both = list(zip(rows.names, rows.reasons, strict=True))
        about = {
            "images": json.dumps([name for name, reason in both if reason is None]),
            "unreadable": json.dumps([[name, reason] for name, reason in both if reason is not None]),
        }
        write_whole(path, safetensors.torch.save(rows.tensors or self.no_rows, self.facts | about))

    def count(self, paths: Sequence[Path]) -> tuple[int, int]:
        """Images, and how many of them can't be read."""
        good = bad = 0
        for path in paths:
            with safetensors.safe_open(str(path), framework="pt") as file:
                about = file.metadata()
            bad += len(json.loads(about["unreadable"]))
            good += len(json.loads(about["images"]))
        return good + bad, bad


class ParquetFile:
    """The likeliest classes: one row an image.

    image (string), classes (k int32), names (k strings), probabilities (k float32), values (k lists of P float16),
    expected_error (k float32), error (string). What an image has not is null: all but image and error where it can't be
    read, names and expected_error where they are not known, error where there is none.
    """

    suffix = ".parquet"

    def __init__(self, facts: Mapping[str, Any], classes: Sequence[str] | None) -> None:
        self.arrow, self.parquet = _pyarrow()
        self.names = None if classes is None else np.array(classes, dtype=object)
        a = self.arrow
        types = {
            "image": a.string(),
            "classes": a.list_(a.int32()),
            "names": a.list_(a.string()),
            "probabilities": a.list_(a.float32()),
            "values": a.list_(a.list_(a.float16())),
            "expected_error": a.list_(a.float32()),
            "error": a.string(),
        }
        self.schema = a.schema(list(types.items()), metadata={KEY: json.dumps(facts)})

    def write(self, path: Path, rows: Rows) -> None:
        content = io.BytesIO()
        self.parquet.write_table(self._table(rows), content, compression="zstd")
        write_whole(path, content.getvalue())

    def _table(self, rows: Rows) -> Any:
        a, tensors = self.arrow, rows.tensors
        good = np.array([reason is None for reason in rows.reasons])
        columns = {"image": a.array(map(_as_text, rows.names), a.string()), "error": a.array(rows.reasons, a.string())}
        known: dict[str, Any] = {}
        if tensors:
            values = tensors["values"].mT.contiguous().numpy()  # (n, k, P)
            known = {"classes": tensors["classes"].int().numpy(), "probabilities": tensors["probabilities"].numpy()}
            known["values"] = _lists(a, np.ones(values.shape[0] * values.shape[1], bool), a.array(values.reshape(-1)))
            if self.names is not None:
                known["names"] = self.names[tensors["classes"].numpy()]
            if "expected_error" in tensors:
                known["expected_error"] = tensors["expected_error"].numpy()
        for field in self.schema:
            if field.name not in columns:
                found = known.get(field.name)
                if isinstance(found, np.ndarray):
                    found = a.array(found.reshape(-1), field.type.value_type)
                columns[field.name] = a.nulls(len(good), field.type) if found is None else _lists(a, good, found)
        return a.table([columns[field.name] for field in self.schema], schema=self.schema)

    def merge(self, parts: Sequence[Path], output: Path) -> None:
        """One file of the parts' row groups, of which one at a time is in memory; whole or absent."""
        unfinished = output.with_name(f".{output.name}.unfinished")
        with self.parquet.ParquetWriter(unfinished, self.schema, compression="zstd") as writer:
            for path in parts:
                with self.parquet.ParquetFile(path) as part:
                    for group in range(part.num_row_groups):
                        writer.write_table(part.read_row_group(group))
        with unfinished.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(unfinished, output)

    def count(self, paths: Sequence[Path]) -> tuple[int, int]:
        """Images, and how many of them can't be read."""
        errors = [self.parquet.read_table(path, columns=["error"])["error"] for path in paths]
        return sum(map(len, errors)), sum(len(column) - column.null_count for column in errors)


def facts_of(path: Path) -> Any:
    """What a finished Parquet file says of how it was made; None for a file of another kind."""
    arrow, parquet = _pyarrow()
    try:
        return json.loads((parquet.read_schema(path).metadata or {})[KEY.encode()])
    except (arrow.ArrowException, OSError, KeyError, ValueError):
        return None


def _as_text(name: str) -> str:
    """The name of a file; its bytes that are no UTF-8 as in caf\\xe9.png."""
    return name.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _lists(arrow: Any, present: np.ndarray, content: Any) -> Any:
    """Lists of one length, null where there is none."""
    length = len(content) // max(int(present.sum()), 1)
    offsets = np.concatenate([[0], np.cumsum(present * length)])
    return arrow.ListArray.from_arrays(arrow.array(offsets, arrow.int32()), content, mask=arrow.array(~present))


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ModuleNotFoundError(
            "explain_images: Parquet files need pyarrow, which is not installed. Run: pip install "
            "'fastshap-kernels[parquet]'; or pass top_k='all', which writes safetensors files."
        ) from error
    return pyarrow, pyarrow.parquet


def joined(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The batches of a part, of those that hold any image."""
    return {name: torch.cat([part[name] for part in parts]) for name in (parts[0] if parts else ())}
