"""Checkpoints of a training run: whole or absent, never half; and the way back to the exact state.

A run's folder holds

    summary.csv                   one row an epoch
    model.safetensors             the model after the last finished epoch (and config.json where the model has one)
    checkpoints/epoch_0007/       everything that resuming needs, after 7 epochs; the last two are kept
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn

FOLDER = "checkpoints"
RECORD = "record.json"
PARTIAL = ".partial"
KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that is missing, damaged, or of another run."""


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    Args:
        output: the run's folder, or None to write nothing.
        accelerator: holds the model, the optimiser and the objective that are saved and restored.
        settings: what must be the same for a resumed run to be the same run; JSON-able.
    """

    def __init__(self, output: str | Path | None, accelerator: Accelerator, settings: Mapping[str, Any]) -> None:
        self.output = None if output is None else Path(output)
        self.accelerator = accelerator
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # tuples become lists, as in the file
        self.newest: Path | None = None

    def save(self, model: nn.Module, history: Sequence[Mapping[str, Any]]) -> None:
        """Saves the state after len(history) epochs beside the last checkpoint, then renames it into place."""
        if self.output is None:
            return
        folder = self.output / FOLDER / f"epoch_{len(history):04d}"
        partial = folder.with_name(folder.name + PARTIAL)
        if self.accelerator.is_main_process:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(partial))
        self.accelerator.wait_for_everyone()
        self.newest = folder
        if self.accelerator.is_main_process:
            files = {path.name: _digest(path) for path in sorted(partial.iterdir())}
            record = {"settings": self.settings, "history": list(history), "files": files}
            (partial / RECORD).write_text(json.dumps(record, indent=1))
            os.replace(partial, folder)
            _write_model(model, self.output)
            _write_summary(history, self.output)
            for old in whole_checkpoints(self.output)[:-KEPT]:
                shutil.rmtree(old)

    def resume(self, resume: str | Path | None) -> list[dict[str, Any]]:
        """Restores the state that `resume` names and returns its history; an empty one where the run starts anew."""
        folder = find_checkpoint(self.output, resume)
        if folder is None:
            return []
        record = _read_record(folder)
        self._check_settings(folder, record["settings"])
        try:
            self.accelerator.load_state(str(folder))
        except Exception as error:  # whatever the many readers below raise
            raise CheckpointError(
                f"fit: the checkpoint {str(folder)!r} does not fit this model, optimiser and objective: {error}. "
                "Build the model as the run did, or start another run in another folder."
            ) from error
        self.newest = folder
        return record["history"]

    def _check_settings(self, folder: Path, saved: Mapping[str, Any]) -> None:
        changed = [
            f"{name} was {saved.get(name)!r} and is {self.settings.get(name)!r}"
            for name in sorted(saved.keys() | self.settings.keys())
            if saved.get(name) != self.settings.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"fit: the checkpoint {str(folder)!r} is of a run with other settings: {'; '.join(changed)}. "
                "Resume with the same settings, or load its model and start another run in another folder."
            )


def _write_model(model: nn.Module, output: Path) -> None:
    """Writes the model into the run's folder, each file whole or not at all."""
    partial = output / f"model{PARTIAL}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_pretrained: Callable[[Path], Any] | None = getattr(model, "save_pretrained", None)
    if save_pretrained is not None:
        save_pretrained(partial)
        (partial / "README.md").unlink(missing_ok=True)  # the Hub's model card says the model was pushed there
    else:
        save_model(model, str(partial / "model.safetensors"))
    for path in partial.iterdir():
        os.replace(path, output / path.name)
    partial.rmdir()


def _write_summary(history: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Writes the whole history as summary.csv, so that a resumed run leaves no row twice."""
    partial = output / f"summary.csv{PARTIAL}"
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[-1]))
        writer.writeheader()
        writer.writerows(history)
    os.replace(partial, output / "summary.csv")


def find_checkpoint(output: Path | None, resume: str | Path | None) -> Path | None:
    """The checkpoint that `resume` names; None where the run starts anew, which an output that holds one forbids."""
    own = [] if output is None else whole_checkpoints(output)
    if resume is None:
        if own:
            raise CheckpointError(
                f"fit: {str(output)!r} already holds a run ({own[-1].name}). "
                "Pass resume='auto' to go on with it, or another output folder."
            )
        return None
    if resume == "auto":
        return own[-1] if own else None
    folder = Path(resume)
    if (folder / RECORD).is_file():
        return folder
    inner = whole_checkpoints(folder)
    if not inner:
        raise CheckpointError(
            f"fit: there is no checkpoint in {str(folder)!r}. Pass a run's folder, one of its "
            f"{FOLDER}/epoch_* folders, or resume=None to start anew."
        )
    return inner[-1]


def whole_checkpoints(output: Path) -> list[Path]:
    """Oldest first. A folder gets its name only when it is whole."""
    return sorted(path for path in (output / FOLDER).glob("epoch_*") if path.suffix != PARTIAL)


def _read_record(folder: Path) -> dict[str, Any]:
    """The record of a checkpoint whose files are all there and unchanged."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        files = record["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, path, f"it cannot be read ({error})") from error
    for name, digest in files.items():
        if not (folder / name).is_file():
            raise _damaged(folder, folder / name, "it is missing")
        if _digest(folder / name) != digest:
            raise _damaged(folder, folder / name, "it is not what was written")
    return record


def _damaged(folder: Path, path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"fit: the checkpoint file {str(path)!r} is damaged: {what}. Delete {str(folder)!r}, and resume='auto' takes "
        "the checkpoint before it, or starts anew where there is none."
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
