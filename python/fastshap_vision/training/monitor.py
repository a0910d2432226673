"""The terms of the objective, epoch by epoch, and what stops a run that can't come to a good end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

TERMS = ("loss", "task", "regression", "masked_task", "value_r2", "spread")

#: Beside the terms, the gradient's norm.
READ = (*TERMS, "grad_norm")

# A game whose values vary this much less than in the run's best epoch, for so many epochs, has collapsed.
COLLAPSED_SPREAD = 0.01
COLLAPSED_EPOCHS = 3
# Values that still differ by under a thousandth of a logit after this many epochs leave nothing to explain.
STILLBORN_SPREAD = 1e-3
STILLBORN_EPOCHS = 10


class TrainingError(RuntimeError):
    """A run that cannot come to a good end: values that are not finite, or a collapsed game.

    Example:
        >>> broken = torch.utils.data.TensorDataset(images * float("inf"), labels)
        >>> try:
        ...     fv.fit(model, broken, objective=fv.TaskObjective(), epochs=1, batch_size=4)
        ... except fv.TrainingError as error:
        ...     print(error)
        fit: the images hold NaN or infinity in epoch 1, step 1. ...
    """


class TermReader:
    """Collects the terms on the device and reads them now and then, so that no step waits for the one before it.

    Args:
        epoch: from 0.
        interval: batches between two readings.
        logged: called with the means since the last reading, None for a term that there is not.
    """

    def __init__(self, epoch: int, interval: int, logged: Callable[[dict[str, float | None]], None]) -> None:
        self.epoch, self.interval, self.logged = epoch, interval, logged
        self.waiting: list[Tensor] = []
        self.steps = 0
        self.sums, self.counts = torch.zeros(2, len(READ), dtype=torch.float64)

    def add(self, images: Tensor, terms: dict[str, Tensor], grad_norm: Tensor | None) -> None:
        loss = terms["loss"].float()
        absent = torch.full_like(loss, math.nan)
        values = [terms[name].float() if name in terms else absent for name in TERMS]
        norm = absent if grad_norm is None else grad_norm.float()  # not finite where fp16 leaves an update out
        values.append(torch.where(norm.isfinite(), norm, absent))
        self.waiting.append(torch.stack([images.isfinite().all().float(), *values]))
        if len(self.waiting) == self.interval:
            self._read()

    def state(self) -> list[Any]:
        """The sums so far, and of how many, for `restore`."""
        if self.waiting:
            self._read()
        return [self.steps, self.sums.tolist(), self.counts.tolist()]

    def restore(self, state: list[Any]) -> None:
        self.steps, sums, counts = state
        self.sums, self.counts = torch.tensor([sums, counts], dtype=torch.float64)

    def means(self) -> dict[str, float | None]:
        """The mean of each term over the epoch and the processes, None for a term the objective has not."""
        _, sums, counts = joined_states(gather_object([self.state()]))
        return _by_name(torch.tensor(sums, dtype=torch.float64) / torch.tensor(counts))

    def _read(self) -> None:
        rows = torch.stack(self.waiting).cpu()
        self.waiting.clear()
        self._check(rows)
        self.steps += len(rows)
        values = rows[:, 1:].double()
        for row in values:  # in this order, whenever the rows are read
            self.sums += row.nan_to_num(0.0, math.inf, -math.inf)
        counts = (~values.isnan()).sum(0)
        self.counts += counts
        self.logged(_by_name(values.nansum(0) / counts))

    def _check(self, rows: Tensor) -> None:
        bad = (rows[:, 0] == 0) | ~rows[:, 1].isfinite()
        if not bad.any():
            return
        first = int(bad.nonzero()[0])
        where = f"in epoch {self.epoch + 1}, step {self.steps + first + 1}"
        if rows[first, 0] == 0:
            raise TrainingError(
                f"fit: the images hold NaN or infinity {where}. Check the data and its normalisation. "
                "The last checkpoint is whole."
            )
        raise TrainingError(
            f"fit: the loss is {rows[first, 1].item()} {where}. Lower lr or the objective's regression_weight, or pass "
            "clip_grad=1.0. The last checkpoint is whole."
        )


def joined_states(states: Sequence[list[Any]]) -> list[Any]:
    """Several states of readers as one."""
    steps, *figures = zip(*states, strict=True)
    return [max(steps), *([sum(column) for column in zip(*rows, strict=True)] for rows in figures)]


def _by_name(values: Tensor) -> dict[str, float | None]:
    numbers = zip(READ, values.tolist(), strict=True)
    return {name: None if math.isnan(value) else value for name, value in numbers}


def epoch_line(row: dict[str, Any], epochs: int) -> str:
    """One epoch in a log."""
    shown = {"loss": ".4f", "value_r2": ".3f", "eval_value_r2": ".3f", "eval_loss": ".4f", "eval_accuracy": ".2f"}
    shown |= {"images_per_second": ".0f", "seconds": ".1f"}
    values = [f"{name} {row[name]:{form}}" for name, form in shown.items() if row[name] is not None]
    return f"epoch {row['epoch']}/{epochs}: {', '.join(values)}"


def check_not_lost(history: list[dict[str, Any]], num_classes: int | None) -> None:
    """Stops a run whose coalitions have all come to the same value, and whose accuracy (if known) is chance."""
    spreads = [row["spread"] for row in history if row["spread"] is not None]
    chance = 0.0 if num_classes is None else 100 / max(num_classes, 2)  # a single logit says yes or no
    lately = history[-COLLAPSED_EPOCHS:]
    # A game that never came to life has no larger spread behind it.
    smallest = max(COLLAPSED_SPREAD * max(spreads, default=0.0), STILLBORN_SPREAD * (len(spreads) > STILLBORN_EPOCHS))
    if len(spreads) <= COLLAPSED_EPOCHS or any(
        row["spread"] is None
        or row["spread"] >= smallest
        or (row["eval_accuracy"] is not None and chance > 0 and row["eval_accuracy"] > chance + (100 - chance) / 10)
        for row in lately
    ):
        return
    accuracy = history[-1]["eval_accuracy"]
    raise TrainingError(
        f"fit: the game collapsed in epoch {lately[0]['epoch']}: the values of the coalitions spread over "
        f"{spreads[-1]:.3g}, against {max(spreads):.3g} before"
        + ("" if accuracy is None else f", and accuracy is {accuracy:.1f} %")
        + ". Lower the objective's regression_weight. The last checkpoint is whole."
    )
