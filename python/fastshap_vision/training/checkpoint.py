"""Checkpoints of a training run: whole or absent, never half; and the way back to the exact state.

A run's folder holds

    summary.csv                   one row an epoch
    model.safetensors             the model after the last finished epoch (and config.json where the model has one)
    best/                         the same after the best epoch, where `keep_best` says what that is
    checkpoints/epoch_0007/       everything that resuming needs, after 7 epochs; the last two are kept. Within the next
                                  epoch, after 500 of its updates, epoch_0007_step_00000500/
        model.safetensors         its weights and statistics
        state.safetensors         the tensors of optimiser and objective
        record.json               all else: settings, history, numbers of optimiser, objective and loss scaling, digests
    .lock                         held by the run that writes here

Nothing is pickled, so that reading a checkpoint never runs code. No state of a random generator is kept: `fit` seeds
every batch anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from .._checks import shortened
from .._runtime.digest import digest_of_file, digest_of_json
from .agreement import of_all, of_main
from .averaging import Average
from .export import PARTIAL, BestModel, write_model, write_summary
from .sharding import Shards, gathered
from .state import (
    MODEL,
    RECORD,
    STATE,
    CheckpointError,
    Within,
    decode,
    encode,
    read_record,
)

_log = logging.getLogger(__name__)

FOLDER = "checkpoints"

#: Of a batch, over each process, all of them and steps: their product is the batch.
SPLIT = ("batch_size", "processes", "grad_accum_steps")
LOCK = ".lock"
REMOVED = ".removed"
KEPT = 2
#: The workers of a killed run notice within five seconds that it is gone, and hold its lock until then.
SECONDS_TO_WAIT = 10.0


class Checkpoints:
    """Writes and reads the checkpoints of one run.

    Args:
        output: the run's folder, or None to write nothing.
        accelerator: of the run; it holds the loss scaling of fp16.
        settings: what must be the same for a resumed run to be the same run; JSON-able.
        average: of the model's weights, which is what users read.
        shards: what trains in place of the model, if it is sharded. They are kept whole, as of a run without them.
        kept: checkpoints that stay, the newest ones.
        best: keeps the model of the best epoch.
        model, optimizer, objective: what is saved and restored. The states of optimizer and objective are made of
            tensors, numbers, words, None, lists, tuples and dicts.

    Raises:
        TypeError: the objective's state holds anything else.
    """

    def __init__(
        self,
        output: str | Path | None,
        accelerator: Accelerator,
        settings: Mapping[str, Any],
        *,
        model: nn.Module,
        optimizer: Any,
        objective: Any,
        average: Average | None = None,
        shards: Shards | None = None,
        kept: int = KEPT,
        best: BestModel | None = None,
    ) -> None:
        self.average, self.shards, self.kept, self.best = average, shards, kept, best
        self.output = None if output is None else Path(output)
        self.accelerator = accelerator
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))  # tuples become lists, as in the file
        self.model, self.optimizer, self.objective = model, optimizer, objective
        self.newest: Path | None = None
        #: Where the run goes on within an epoch; known after `resume`.
        self.within: Within | None = None
        if output is not None:
            encode(self._state(), {})

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other runs out of the folder, once it is sure that it can be written to."""
        with ExitStack() as stack:
            of_main(lambda: self._hold(stack))
            yield

    def _hold(self, stack: ExitStack) -> None:
        """By process 0, until the stack is left."""
        if self.output is not None:
            stack.callback(self._lock(self.output).release)
            self._check_room(self.output)

    def _lock(self, output: Path) -> FileLock:
        try:
            (output / FOLDER).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=output / FOLDER) as file:
                file.write(bytes(4096))
            lock = FileLock(output / LOCK)
            lock.acquire(timeout=SECONDS_TO_WAIT)
        except Timeout as error:
            raise CheckpointError(
                f"fit: another run writes into {str(output)!r} now. Wait for its end, or pass another `output`."
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"fit: argument `output` must be a folder that can be written to, but {str(output)!r} can't be: "
                f"{error}. Pass another folder, or None to write nothing."
            ) from error
        return lock

    def _check_room(self, output: Path) -> None:
        """The least that an epoch writes is the model, twice; what the optimiser keeps comes on top."""
        tensors = chain(self.model.parameters(), self.model.buffers())
        needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        free = shutil.disk_usage(output).free
        if free < needed:
            raise CheckpointError(
                f"fit: argument `output` must have room for checkpoints of at least {needed / 1e6:.1f} MB, but "
                f"{str(output)!r} has {free / 1e6:.1f} MB left. Free some, or pass a folder on another disk."
            )

    def save(self, history: Sequence[Mapping[str, Any]], within: Within | None = None) -> None:
        """Saves the state after len(history) epochs, or within the next one, then renames it into place.

        Checkpoints of later epochs, which are there where the run went back to an earlier one, are removed.

        Raises:
            CheckpointError: the state can't be written; the last checkpoint is whole.
        """
        if self.output is None:
            return
        name = f"epoch_{len(history):04d}" + ("" if within is None else f"_step_{within.updates:08d}")
        folder = self.output / FOLDER / name
        state = self._state()  # by all, for they may hold a part each
        of_main(lambda: self._replace(folder, history, within, state))
        self.newest = folder

    def _replace(
        self, folder: Path, history: Sequence[Mapping[str, Any]], within: Within | None, state: dict[str, Any]
    ) -> None:
        """The newest checkpoint and what is exported, in the place of older ones."""
        output = folder.parent.parent
        with self._writing(output):
            self._write(folder, history, within, state)
            if within is None:
                self._export(history, output)
            for old in whole_checkpoints(output)[: -self.kept]:
                _remove(old)

    def _write(
        self, folder: Path, history: Sequence[Mapping[str, Any]], within: Within | None, state: dict[str, Any]
    ) -> None:
        for leftover in folder.parent.glob("epoch_*.*"):  # of a run that was killed while it wrote or removed
            shutil.rmtree(leftover)
        partial = folder.with_name(folder.name + PARTIAL)
        partial.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        encoded = encode(state, tensors)
        save_model(self.model, str(partial / MODEL))
        save_file(tensors, partial / STATE)
        files = {name: digest_of_file(partial / name) for name in (MODEL, STATE)}
        record = {"settings": self.settings, "history": list(history), "files": files, "state": encoded}
        record["within"] = None if within is None else within._asdict()
        text = json.dumps({"digest": digest_of_json(record), "record": record}, indent=1)
        (partial / RECORD).write_text(text)
        for later in reversed(whole_checkpoints(folder.parent.parent)):
            if _place(later) >= _place(folder):
                _remove(later)
        os.replace(partial, folder)

    def _export(self, history: Sequence[Mapping[str, Any]], output: Path) -> None:
        """Writes what users read: the model, or its average, and the history."""
        with nullcontext() if self.average is None else self.average.in_place():
            write_model(self.model, output)
            if self.best is not None:
                self.best.write(self.model, history)
        write_summary(history, output)

    def _state(self) -> dict[str, Any]:
        """What changes in training, beside the model."""
        scaler = self.accelerator.scaler
        of_optimizer = self.optimizer.state_dict()
        return {
            "optimizer": of_optimizer if self.shards is None else gathered(of_optimizer),
            "objective": self.objective.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    @contextmanager
    def _writing(self, output: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            whole = whole_checkpoints(output)
            kept = f"The checkpoint {whole[-1].name} is whole" if whole else "No epoch was kept"
            raise CheckpointError(
                f"fit: the run can't be written to {str(output)!r}: {error}. {kept}. Make room there, and go on with "
                "resume='auto'."
            ) from error

    def resume(self, resume: str | Path | None) -> list[dict[str, Any]]:
        """Restores the state that `resume` names and returns its history; an empty one where the run starts anew.

        The model and the summary in the run's folder are written again, as the run may have ended before it wrote them.
        Process 0 chooses the checkpoint, and each must have that very one: where disks belong to nodes, their newest
        may be others.
        """
        found = of_main(lambda: self._chosen(resume))
        if found is None:
            return []
        folder, digest = found
        of_all(lambda: self._check_present(folder, digest))
        record = read_record(folder)
        self._check_settings(folder, record["settings"])
        if self.accelerator.is_main_process:
            _log.info("goes on from %s", folder)
        try:
            load_model(self.model, folder / MODEL)
            state = decode(record["state"], load_file(folder / STATE))
            if self.shards is not None:
                self.shards.scatter()
                state["optimizer"] = self.shards.scattered(state["optimizer"], self.optimizer)
            self.optimizer.load_state_dict(state["optimizer"])
            self.objective.load_state_dict(state["objective"])
            if self.average is not None:
                self.average.load_state_dict(state["average"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # whatever the many readers above raise
            raise CheckpointError(
                f"fit: the checkpoint {str(folder)!r} does not fit this model, optimiser and objective: "
                f"{shortened(error).rstrip('.')}. "
                "Build the model as the run did, or start another run in another folder."
            ) from error
        self.newest = folder
        self.within = None if record["within"] is None else Within(**record["within"])
        if self.within is None:
            of_main(lambda: self._export_again(record["history"]))
        return record["history"]

    def _chosen(self, resume: str | Path | None) -> tuple[Path, str] | None:
        folder = find_checkpoint(self.output, resume)
        return None if folder is None else (folder, digest_of_json(read_record(folder)))

    def _check_present(self, folder: Path, digest: str) -> None:
        process, count = self.accelerator.process_index, self.accelerator.num_processes
        if (folder / RECORD).is_file() and digest_of_json(read_record(folder)) == digest:
            return
        what = "has another checkpoint in" if folder.exists() else "has no checkpoint"
        raise CheckpointError(
            f"fit: process {process} of {count} {what} {str(folder)!r}, from which process 0 goes on. Let `output` be "
            "on a disk that all processes share, or copy this folder of process 0 to the node of each."
        )

    def _export_again(self, history: Sequence[Mapping[str, Any]]) -> None:
        if self.output is not None:
            with self._writing(self.output):
                self._export(history, self.output)

    def _check_settings(self, folder: Path, saved: Mapping[str, Any]) -> None:
        before, now = _decisive(saved), _decisive(self.settings)
        changed = [
            f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
        if changed:
            raise CheckpointError(
                f"fit: the checkpoint {str(folder)!r} is of a run with other settings: {'; '.join(changed)}. "
                "Resume with the same settings, or load its model and start another run in another folder."
            )


def _decisive(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those that make a run another one: how batch and model are split, and who loads the data, do not."""
    found = {name: value for name, value in settings.items() if name not in ("workers", "fsdp")}
    split = [found.pop(name, None) for name in SPLIT]
    return found | {" × ".join(SPLIT): math.prod(split) if all(isinstance(part, int) for part in split) else split}


def find_checkpoint(output: Path | None, resume: str | Path | None) -> Path | None:
    """The checkpoint that `resume` names; None where the run starts anew, which an output that holds one forbids."""
    if not isinstance(resume, (str, os.PathLike, type(None))):
        raise ValueError(
            "fit: argument `resume` must be None, 'auto', or the path of a run or one of its checkpoints, but it is "
            f"{resume!r}."
        )
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
    if not (folder / RECORD).is_file():
        inner = whole_checkpoints(folder)
        if not inner:
            raise CheckpointError(
                f"fit: there is no checkpoint in {str(folder)!r}. Pass a run's folder, one of its "
                f"{FOLDER}/epoch_* folders, or resume=None to start anew."
            )
        folder = inner[-1]
    if own and folder.parent.resolve() != own[-1].parent.resolve():
        raise CheckpointError(
            f"fit: {str(output)!r} already holds a run, and {str(folder)!r} is of another one. Pass another output "
            "folder to go on with that one."
        )
    return folder


def whole_checkpoints(output: Path) -> list[Path]:
    """Oldest first. A folder gets its name only when it is whole."""
    found = (output / FOLDER).glob("epoch_*")
    return sorted((path for path in found if re.fullmatch(r"epoch_\d+(_step_\d+)?", path.name)), key=_place)


def _place(checkpoint: Path) -> tuple[int, ...]:
    """Epochs and updates by number: the names of ten thousand epochs and more are longer."""
    return tuple(int(number) for number in re.findall(r"\d+", checkpoint.name))


def _remove(checkpoint: Path) -> None:
    """Takes the name away first: what is half removed is no checkpoint."""
    removed = checkpoint.with_name(checkpoint.name + REMOVED)
    os.replace(checkpoint, removed)
    shutil.rmtree(removed)
