"""A checkpoint's JSON: numbers, words and the names of tensors; never a pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .._runtime.digest import digest_of_file, digest_of_json

MODEL, STATE, RECORD = "model.safetensors", "state.safetensors", "record.json"


class Within(NamedTuple):
    """How far an epoch is: updates done, the seconds that they took, and the sums of what was read in each process."""

    updates: int
    seconds: float
    sums: list[Any]


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run.

    Example:
        >>> options = {"objective": fv.TaskObjective(), "epochs": 1, "batch_size": 4}
        >>> try:
        ...     fv.fit(model, data, resume="run", **options)
        ... except fv.CheckpointError as error:
        ...     print(error)
        fit: there is no checkpoint in 'run'. ...
    """


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all there and unchanged."""
    path = folder / RECORD
    try:
        found = json.loads(path.read_text())
        record = found["record"]
        if digest_of_json(record) != found["digest"]:
            raise ValueError("it is not what was written")
        _check_record(record)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(folder, path, f"it cannot be read ({error!r})") from error
    for name, digest in record["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder, folder / name, "it is missing")
        if digest_of_file(folder / name) != digest:
            raise _damaged(folder, folder / name, "it is not what was written")
    return record


def _check_record(record: dict[str, Any]) -> None:
    """The types that a record has, for one that was changed together with its digest."""
    if not isinstance(record["settings"], dict) or set(record["files"]) != {MODEL, STATE}:
        raise ValueError(f"settings must be named, and the files must be {MODEL} and {STATE}")
    if record["within"] is not None:
        Within(**record["within"])
    for row in record["history"]:
        columns = {"epoch", "seconds", "spread", "eval_accuracy"}
        values = row.values() if isinstance(row, dict) and columns <= row.keys() else ["none"]
        if not all(isinstance(value, (int, float, type(None))) for value in values):
            raise ValueError(f"each row of the history must hold {', '.join(sorted(columns))}, as numbers")


def encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """A state as JSON can hold it; its tensors go to `tensors`, under the names that stand in their places."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}"
        tensors[name] = value.detach().contiguous()
        last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last) and not value.is_contiguous()
        return {"channels_last" if last else "tensor": name}
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encode(part, tensors) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(part, tensors) for part in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encode(part, tensors) for part in item] for item in value.items()]}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    raise TypeError(
        "fit: the states of optimizer and `objective` (their state_dict) must hold tensors, numbers, words, None, "
        f"lists, tuples and dicts, but there is a {type(value).__name__}. Keep arrays as tensors."
    )


def decode(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `encode` was given."""
    if isinstance(node, list):
        return [decode(part, tensors) for part in node]
    if not isinstance(node, dict):
        return node
    ((kind, content),) = node.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "channels_last":
        return tensors[content].contiguous(memory_format=torch.channels_last)
    if kind == "tuple":
        return tuple(decode(part, tensors) for part in content)
    if kind == "dict":
        return {decode(name, tensors): decode(part, tensors) for name, part in content}
    if kind == "dtype" and isinstance(getattr(torch, content), torch.dtype):
        return getattr(torch, content)
    raise ValueError(f"its state holds {kind!r}")


def _damaged(folder: Path, path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"fit: the checkpoint file {str(path)!r} is damaged: {what}. Delete {str(folder)!r}, and resume='auto' takes "
        "the checkpoint before it, or starts anew where there is none."
    )
