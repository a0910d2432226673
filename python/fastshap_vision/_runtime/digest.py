"""SHA-256 of files, tensors and what JSON can hold."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Of a tensor on any device; of one on the CPU that is contiguous, no copy."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def digest_of_tensors(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]], about: Any = None) -> str:
    """Of names, types, shapes and bytes, in the order in which they come.

    Args:
        tensors: by name.
        about: JSON-able, what else is digested.
    """
    found = hashlib.sha256(b"" if about is None else json.dumps(about).encode())
    for name, tensor in tensors.items() if isinstance(tensors, Mapping) else tensors:
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes_of(tensor))
    return found.hexdigest()


def digest_of_json(content: Any) -> str:
    """Of what JSON can hold; of dicts in their order."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digest_of_words(words: Iterable[str]) -> str:
    """Of any number of them, in their order; names of files that are no UTF-8 too."""
    found = hashlib.sha256()
    for word in words:
        found.update(f"{word}\0".encode(errors="surrogateescape"))
    return found.hexdigest()


def digest_of_file(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            found.update(block)
    return found.hexdigest()
