"""Results files: where they are, and how they are written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.lib import targets
from bench.lib.machine import ROOT

RESULTS = ROOT / "bench" / "results"
#: Of each processor a file: the pairs of `python -m bench.ops`, the steps of `python -m bench.step`.
PAIRS, STEPS = RESULTS / "pairs", RESULTS / "steps"
Row = dict[str, Any]


def read(path: Path, default: Any = None) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def write(path: Path, content: Any) -> None:
    """Replaces the file at once; rows, those of a list or under "rows", which come last, are a line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(_text(content) + "\n")
    unfinished.replace(path)


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in content) + "\n]"
    if "rows" not in content:
        return json.dumps(content, indent=1, ensure_ascii=False)
    about = {name: value for name, value in content.items() if name != "rows"} | {"rows": []}
    return json.dumps(about, indent=1, ensure_ascii=False).removesuffix("[]\n}") + _text(content["rows"]) + "\n}"


def newest(folder: Path, pattern: str) -> Any:
    """The latest of the results files of a pattern, by their own date; None where there are none."""
    found = [json.loads(path.read_text()) for path in folder.glob(pattern)]
    return max(found, key=lambda results: results.get("date", ""), default=None)


class Results:
    """A file of rows; read if it exists. `key` tells rows apart, `judge` holds them against the targets."""

    def __init__(self, path: Path, key: tuple[str, ...], judge: Callable[[list[Row]], list[Row]] | None = None) -> None:
        self.path, self.key, self.judge = path, key, judge
        self.content: dict[str, Any] = read(path, {})
        self.content.setdefault("rows", [])

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def key_of(self, row: Row) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self.key)

    def has(self, row: Row) -> bool:
        """Whether there is a row of the same key."""
        return self.key_of(row) in map(self.key_of, self.rows)

    def replace(self, rows: Iterable[Row]) -> None:
        """Adds rows, in the place of those of the same key."""
        keys = {self.key_of(row) for row in rows}
        self.content["rows"] = [row for row in self.rows if self.key_of(row) not in keys] + list(rows)

    def drop(self, op: str) -> None:
        """Forgets the rows of an op."""
        self.content["rows"] = [row for row in self.rows if row["op"] != op]

    def write(self) -> None:
        if self.judge is not None:
            self.content["bars"] = self.judge(self.rows)
        write(self.path, self.content)

    def summary(self, *fields: str) -> str:
        """The rows and the targets as text, a line each."""
        found = []
        for row in self.rows:
            figures = [f"{name} {row[name]:.4g}" for name in fields if row.get(name) is not None]
            about = row.get("error") or ", ".join(figures)
            found.append(f"{', '.join(str(part) for part in self.key_of(row))}: {about}"[:200])
        return "\n".join(found + targets.lines(self.content["bars"]))
