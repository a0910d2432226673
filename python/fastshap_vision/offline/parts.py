"""A long task in parts, each a file that is whole or absent: any process may be killed, and the next run goes on."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout

from .._files import write_whole
from .._runtime.errors import sendable
from .._runtime.processes import processes
from .rows import ParquetFile, Rows, ShardFiles, facts_of

SETTINGS, LOCK = "settings.json", ".lock"
#: Workers of a killed run hold its lock until they notice, and a network's disk shows a new file late.
SECONDS_TO_WAIT = 10.0


class Parts:
    """The parts of one output, and which of them are this process's.

    Args:
        output: a Parquet file, or the folder of the shards.
        form: how rows are written.
        facts: what must be the same for a later run to go on with the parts that are there; JSON-able.
        count: parts in all.
    """

    def __init__(self, output: Path, form: ParquetFile | ShardFiles, facts: Mapping[str, Any], count: int) -> None:
        self.output, self.form, self.facts = output, form, json.loads(json.dumps(facts))
        self.state = processes()
        merges = isinstance(form, ParquetFile)
        self.folder = output.with_name(f"{output.name}.parts") if merges else output
        self.paths = [self.folder / f"{part:06d}{form.suffix}" for part in range(count)]

    @contextmanager
    def pending(self) -> Iterator[list[int]]:
        """The parts that this process is to write. All processes come here together; the first one says which."""
        lock: FileLock | None = None
        said: list[Any] = [None, None, self.facts]
        try:
            if self.state.is_main_process:
                try:
                    lock, said[0] = self._begin()
                except Exception as error:
                    said[1] = sendable(error)
            broadcast_object_list(said)
            if said[1] is not None:
                raise said[1]
            if said[0]:
                self._check_seen(said[2])
            yield said[0][self.state.process_index :: self.state.num_processes]
        finally:
            if lock is not None:
                lock.release()

    def _begin(self) -> tuple[FileLock | None, list[int]]:
        """Of the first process: what is left to do, once it is sure that this is the same task."""
        if self.folder != self.output and self.output.exists():
            self._check_same(facts_of(self.output), self.output)
            shutil.rmtree(self.folder, ignore_errors=True)
            return None, []
        self._check_folder()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / LOCK)
            lock.acquire(timeout=SECONDS_TO_WAIT)
        except Timeout as error:
            raise ValueError(
                f"explain_images: another run writes {str(self.output)!r} now. Wait for its end, or pass another "
                "`output`."
            ) from error
        except OSError as error:
            raise ValueError(
                f"explain_images: argument `output` must be in a folder that can be written to, but "
                f"{str(self.folder)!r} can't be made: {error}. Pass another path."
            ) from error
        try:
            self._check_folder()
            write_whole(self.folder / SETTINGS, json.dumps(self.facts, indent=1).encode())
            for start in ("0", f"{SETTINGS}."):
                for leftover in self.folder.glob(f".{start}*"):  # of a process that was killed while it wrote
                    leftover.unlink()
            return lock, [part for part, path in enumerate(self.paths) if not path.exists()]
        except BaseException:
            lock.release()
            raise

    def _check_folder(self) -> None:
        """The folder is of this task, or has nothing in it."""
        path = self.folder / SETTINGS
        if path.exists():
            try:
                found = json.loads(path.read_text())
            except ValueError:
                found = None
            self._check_same(found, self.folder)
        elif self.folder.is_dir():
            # A run that was killed at once leaves its lock, and settings that it had not finished.
            names = {inner.name for inner in self.folder.iterdir() if not inner.name.startswith(f".{SETTINGS}.")}
            if names - {LOCK}:
                self._check_same(None, self.folder)

    def _check_same(self, found: Any, path: Path) -> None:
        if not isinstance(found, dict):
            raise ValueError(
                f"explain_images: argument `output`: {str(path)!r} exists, and explain_images did not write it. Pass "
                "another path."
            )
        changed = [
            f"{name} was {_short(found.get(name))} and is {_short(self.facts.get(name))}"
            for name in sorted(found.keys() | self.facts.keys())
            if found.get(name) != self.facts.get(name)
        ]
        if changed:
            raise ValueError(
                f"explain_images: argument `output`: {str(path)!r} is of another task: {'; '.join(changed)}. Pass "
                "another path, or delete it to begin anew."
            )

    def _check_seen(self, facts: Any) -> None:
        """Whether this process sees the images and the folder of the first one."""
        if facts != self.facts:
            raise ValueError(
                "explain_images: every process must find the same images and model, but process "
                f"{self.state.process_index} finds others than the first. Keep them where all processes read the same."
            )
        path = self.folder / SETTINGS
        until = time.monotonic() + SECONDS_TO_WAIT
        while not path.exists():
            if time.monotonic() > until:
                raise ValueError(
                    f"explain_images: argument `output` must be on a disk that all processes share, but process "
                    f"{self.state.process_index} does not see {str(path)!r}. Pass a path on such a disk."
                )
            time.sleep(0.1)

    def write(self, part: int, rows: Rows) -> None:
        self.form.write(self.paths[part], rows)

    def finish(self) -> tuple[int, int]:
        """Waits until every part is there, however long others take, and merges; images, and those not read.

        No collective call: its time would be limited.
        """
        merges = self.folder != self.output
        if merges and not self.state.is_main_process:
            _wait_for([self.output])
        elif not (merges and self.output.exists()):
            _wait_for(self.paths)
        if isinstance(self.form, ParquetFile) and self.state.is_main_process and not self.output.exists():
            self.form.merge(self.paths, self.output)
            shutil.rmtree(self.folder)
        return self.form.count([self.output] if merges else self.paths)


def _short(value: Any) -> str:
    """One value in a message: lists of a thousand classes have no room there."""
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "…"


def _wait_for(paths: list[Path]) -> None:
    for path in paths:
        while not os.path.exists(path):
            time.sleep(0.2)
