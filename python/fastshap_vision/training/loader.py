"""The loader of a run: what it draws follows from the seed, the epoch and the rows, not from who reads them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from .._runtime.errors import SendableErrors
from .._runtime.signals import leaving_to_main

#: A row of the data in an epoch.
Row = tuple[int, int]


class EpochRows(Sampler[Row]):
    """The rows of an epoch in a random order, which its seed and number decide.

    Args:
        rows: of the data.
        count: of an epoch, at most `rows`.
        seed: of the order.

    Attributes:
        start: rows of the epoch that are left out, as they have been trained on.
    """

    def __init__(self, rows: int, count: int, seed: int) -> None:
        self.rows, self.count, self.seed = rows, count, seed
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """accelerate calls it where each pass begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count - self.start

    def __iter__(self) -> Iterator[Row]:
        generator = torch.Generator().manual_seed(_seeds(self.seed, self.epoch)[0])
        for row in torch.randperm(self.rows, generator=generator)[self.start : self.count].tolist():
            yield self.epoch, row


class SeededRows(Dataset):
    """A dataset whose random changes follow from the seed, the epoch and the first row of a batch.

    So a worker process that lives for the whole run draws what one draws that was started for this epoch, as after a
    resume, and what no worker at all draws.

    Args:
        data: the dataset.
        seed: of the run.
    """

    def __init__(self, data: Any, seed: int) -> None:
        self.data, self.seed = SendableErrors(data), seed

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[Row]) -> list[Any]:
        """A batch at once, as torch's DataLoader takes it."""
        numbers = [row for _, row in rows]
        with _drawing_from(_seeds(self.seed, *rows[0])):
            return self.data.__getitems__(numbers)


def training_loader(
    data: Any, batch_size: int, batches: int, *, seed: int, workers: int, pinned: bool, collate: Any
) -> DataLoader:
    """So many full batches an epoch, by workers that live as long as the loader.

    Args:
        data: the dataset.
        batch_size: images of a batch.
        batches: of an epoch and all processes.
        seed: of the order and of random changes.
        workers: processes that load data.
        pinned: whether batches lie in memory that a GPU can read by itself.
        collate: makes a batch of a list of items.
    """
    return DataLoader(
        SeededRows(data, seed),
        batch_size,
        sampler=EpochRows(len(data), batches * batch_size, seed),
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=leaving_to_main(),
        pin_memory=pinned,
        collate_fn=collate,
        # The loader draws a seed for its workers when they start: not from the generator that dropout draws from.
        generator=torch.Generator(),
    )


def _seeds(*numbers: int) -> list[int]:
    return [int(seed) for seed in np.random.SeedSequence(numbers).generate_state(3)]


@contextmanager
def _drawing_from(seeds: list[int]) -> Iterator[None]:
    """Python's, numpy's and torch's generators with seeds of their own; the run's own stay as they were."""
    of_python = of_numpy = of_torch = None
    generator = torch.default_generator
    is_run = get_worker_info() is None
    if is_run:
        of_python, of_numpy, of_torch = random.getstate(), np.random.get_state(), generator.get_state()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    generator.manual_seed(seeds[2])
    try:
        yield
    finally:
        if is_run:
            random.setstate(of_python)  # type: ignore[arg-type]
            np.random.set_state(of_numpy)  # type: ignore[arg-type]
            generator.set_state(of_torch)  # type: ignore[arg-type]
