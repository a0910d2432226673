"""What users read of a run: the model, the best one, the history. Each file is whole or absent."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_model
from torch import nn

from .._checks import check_choice
from .._files import write_whole
from .state import MODEL

PARTIAL = ".partial"
BEST, EPOCH = "best", "epoch.json"
#: Columns of the history that say how good an epoch is, and whether more of them is better.
METRICS = {"eval_accuracy": True, "eval_loss": False, "eval_value_r2": True}


def write_model(model: nn.Module, output: Path) -> None:
    """Writes the model into the run's folder, each file whole or not at all."""
    partial = output / f"model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_pretrained: Callable[[Path], Any] | None = getattr(model, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # the Hub's model card says the model was pushed there
    else:
        save_model(model, str(partial / MODEL))
    for path in partial.iterdir():
        os.replace(path, output / path.name)
    partial.rmdir()


def write_summary(history: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Writes the whole history as summary.csv, so that a resumed run leaves no row twice."""
    partial = output / f"summary.csv{PARTIAL}"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
    os.replace(partial, output / "summary.csv")


class BestModel:
    """Keeps the model of the best epoch in the run's folder, under best/, and which epoch that was.

    Args:
        output: the run's folder.
        metric: a column of the history, of `METRICS`.
    """

    def __init__(self, output: Path, metric: str) -> None:
        self.folder, self.metric = output / BEST, metric

    @classmethod
    def checked(cls, metric: Any, output: Any, is_recorded: bool | None) -> BestModel | None:
        """What `fit` is given, for eval_data that are recorded or not, or for none."""
        if metric is None:
            return None
        if output is None:
            raise ValueError("fit: argument `keep_best` needs a folder to write to, but `output` is None. Pass one.")
        if is_recorded is None:
            raise ValueError("fit: argument `keep_best` needs data to evaluate on, but `eval_data` is None. Pass some.")
        known = ("eval_value_r2",) if is_recorded else ("eval_accuracy", "eval_loss")
        check_choice("keep_best", metric, (*known, None))
        return cls(Path(output), metric)

    def write(self, model: nn.Module, history: Sequence[Mapping[str, Any]]) -> None:
        """Writes the model where the last row of the history is better than that of the model which is there."""
        row, before = history[-1], self._before(history)
        value = row[self.metric]
        if value is None or (before is not None and not self._is_better(value, before)):
            return
        self.folder.mkdir(exist_ok=True)
        write_model(model, self.folder)
        text = json.dumps({"epoch": row["epoch"], self.metric: value})
        write_whole(self.folder / EPOCH, text.encode())

    def _before(self, history: Sequence[Mapping[str, Any]]) -> float | None:
        """The metric of the model that is there; None for one that is of no epoch of this history by this metric.

        Such a one is of another run or metric, or of an epoch that the run has gone back behind.
        """
        try:
            found = json.loads((self.folder / EPOCH).read_text())
            epoch, value = found["epoch"], found[self.metric]
            is_own = any(row["epoch"] == epoch and row[self.metric] == value for row in history)
            return value if is_own else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _is_better(self, value: float, before: float) -> bool:
        return value > before if METRICS[self.metric] else value < before
