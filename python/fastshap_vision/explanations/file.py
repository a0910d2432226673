"""The file of an explanation: safetensors, with its facts in the metadata."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import safetensors
import safetensors.torch
from torch import Tensor

from .._files import write_whole

T = TypeVar("T")

_FORMAT = "fastshap_vision.Explanation/1"


def write(path: str | os.PathLike[str], tensors: Mapping[str, Tensor | None], facts: Mapping[str, str]) -> None:
    """Writes the tensors that there are; the file at `path` is never half written."""
    kept = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in tensors.items() if x is not None}
    write_whole(Path(path), safetensors.torch.save(kept, {"format": _FORMAT, **facts}))


def read(path: str | os.PathLike[str], make: Callable[[Mapping[str, Tensor], Mapping[str, str]], T]) -> T:
    """What `make` makes of the tensors and facts in a file, on the CPU."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"Explanation.load: there is no file {str(path)!r}")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if facts.get("format") != _FORMAT:
            raise ValueError(f"its format is {facts.get('format')!r}, not {_FORMAT!r}")
        return make(tensors, facts)
    except (safetensors.SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"Explanation.load: argument `path` must name a file written by Explanation.save, "
            f"but {str(path)!r} can't be read as one: {error}"
        ) from error
