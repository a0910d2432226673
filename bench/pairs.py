"""Every op, and what makes training quick, beside plain PyTorch; the ratio of the two is what counts.

    python -m bench.pairs                  holds every pair against the committed ratios
    python -m bench.pairs --short          those that CI runs
    python -m bench.pairs --runs 3 --write commits this processor's, the median of three runs

pytest-benchmark runs the pairs (bench/**/bench_*.py). A ratio below `TOLERANCE` of the committed one fails: absolute
times drift on a shared machine, ratios less so. They do drift: of each side the fastest turn counts, since other guests
only add time, and a pair that fails is measured again, best of `ATTEMPTS`. Each processor has a file of its own. A pair
that it lacks is shown beside the lowest ratio of all processors, and does not fail: on one processor a loss was 2.8
times as fast as plain PyTorch, on another half as fast.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from bench.lib import machine, targets
from bench.lib.results import PAIRS, Results, Row, read

#: What tells pairs apart. With other numbers of threads, or memory kept, a ratio is another.
KEY = ("op", "shape", "against", "memory", "threads")
#: Of the lowest of the committed runs. Ten runs of the short set with six processes on two cores: no pair's ratio fell
#: below 0.73 of its median, 0.85 as the best of three (of medians in place of the fastest turns: 0.31 and 0.69). Three
#: runs while others did less: none below 0.84 of the lowest of the ten, but 0.66 of their median.
TOLERANCE = 0.65
#: Whose ratio it is that a pair can fail.
HERE = "this processor"
ATTEMPTS = 3
#: With what environment variables all pairs run, and those that CI runs: on one thread, since two of them wait for one
#: another whenever somebody else takes a core.
WHOLE = ({"FASTSHAP_BENCH_MEMORY": "returned"}, {"FASTSHAP_BENCH_MEMORY": "kept"})
SHORT = ({"FASTSHAP_BENCH_MEMORY": "returned", "OMP_NUM_THREADS": "1"},)
METHOD = "both sides by turns in one process, the fastest turn of each; ratio = plain / ours"


class Baseline(NamedTuple):
    """What a pair's ratio is held against, and whose it is."""

    ratio: float | None
    whose: str


def measure(tests: list[str], environment: dict[str, str]) -> list[Row]:
    """One run of some tests, in a process of its own: a row a pair."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "benchmarks.json"
        options = [f"--benchmark-json={path}", "--benchmark-columns=min,median,rounds"]
        command = [sys.executable, "-m", "pytest", *tests, *options]
        done = subprocess.run(command, cwd=machine.ROOT, env=os.environ | environment, check=False)
        if done.returncode:
            sys.exit(done.returncode)
        return rows_of(json.loads(path.read_text())["benchmarks"])


def rows_of(benchmarks: list[dict[str, Any]]) -> list[Row]:
    """pytest-benchmark's rows, two by two."""
    sides: dict[str, dict[str, dict[str, Any]]] = {}
    for benchmark in benchmarks:
        about = benchmark["extra_info"]
        sides.setdefault(about["test"], {})[about["side"]] = benchmark
    rows = []
    for pair in sides.values():
        ours, plain = (pair[side]["stats"]["min"] * 1e3 for side in ("fused", "plain"))
        about = {name: value for name, value in pair["fused"]["extra_info"].items() if name != "side"}
        rows.append(about | {"ours_ms": ours, "plain_ms": plain, "ratio": plain / ours})
    return rows


def key_of(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def middle(rows: list[Row]) -> Row:
    """Of several runs of a pair, the one of the median ratio, with the lowest and highest."""
    ratios = sorted(row["ratio"] for row in rows)
    found = min(rows, key=lambda row: abs(row["ratio"] - statistics.median_low(ratios)))
    return found | ({"spread": [ratios[0], ratios[-1]], "runs": len(rows)} if len(rows) > 1 else {})


def lowest(row: Row) -> float:
    """The lowest ratio of a pair's committed runs."""
    return row.get("spread", [row["ratio"]])[0]


def baseline(row: Row, committed: dict[str, list[Row]], here: str) -> Baseline:
    """The lowest of this processor's committed runs; else of all processors'."""
    for other in committed.get(here, []):
        if key_of(other) == key_of(row):
            return Baseline(lowest(other), HERE)
    alike = [
        (lowest(other), name, other["threads"])
        for name, rows in committed.items()
        for other in rows
        if key_of(other | {"threads": row["threads"]}) == key_of(row)
    ]
    # Of the same number of threads, where anybody has such a row.
    alike = [found for found in alike if found[2] == row["threads"]] or alike
    return Baseline(*min(alike)[:2]) if alike else Baseline(None, "nobody")


def falls_short(row: Row, committed: dict[str, list[Row]], here: str) -> bool:
    """Whether a pair fails: on a processor that was measured before, since another's ratios may be others by far."""
    ratio, whose = baseline(row, committed, here)
    return ratio is not None and whose == HERE and row["ratio"] < TOLERANCE * ratio


def hold(
    tests: list[str], environment: dict[str, str], runs: int, committed: dict[str, list[Row]], here: str
) -> list[Row]:
    """Measures pairs, those that fall short again."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for _ in range(runs):
        for row in measure(tests, environment):
            found.setdefault(key_of(row), []).append(row)
    rows = {key: middle(several) for key, several in found.items()}
    for _ in range(ATTEMPTS - 1):
        short = [row for row in rows.values() if falls_short(row, committed, here)]
        if not short:
            break
        print(f"again, since the ratio fell short: {', '.join(row['test'] for row in short)}", flush=True)
        for row in measure([row["test"] for row in short], environment):
            rows[key_of(row)] = max(rows[key_of(row)], row, key=lambda one: one["ratio"])
    return list(rows.values())


def figures(rows: list[Row]) -> dict[str, float]:
    """The lowest figure of each target."""
    found: dict[str, list[float]] = {}
    known = {target.what for target in targets.TARGETS["pairs"]}
    for row in rows:
        specific = f"{row['op']}, {row['against']}"
        what = specific if specific in known else row["op"]
        if what in known:
            found.setdefault(what, []).append(row["ratio"])
        if "memory_ratio" in row:
            found.setdefault(f"{row['op']}, peak memory", []).append(row["memory_ratio"])
    return {what: min(ratios) for what, ratios in found.items()}


def describe(row: Row, committed: dict[str, list[Row]], here: str) -> str:
    ratio, whose = baseline(row, committed, here)
    name = f"{row['op']}, {row['shape']}, against {row['against']}, memory {row['memory']}"
    if ratio is None:
        return f"new   {row['ratio']:6.2f}x, with nothing to hold it against: {name}"
    if whose != HERE:
        return f"other {row['ratio']:6.2f}x, {ratio:.2f}x on {whose}, which is no floor here: {name}"
    word = "SHORT" if falls_short(row, committed, here) else "holds"
    return f"{word} {row['ratio']:6.2f}x, committed {ratio:.2f}x, at least {TOLERANCE * ratio:.2f}x: {name}"


def commit(rows: list[Row], here: str) -> Path:
    """Puts rows into this processor's file."""
    results = Results(PAIRS / f"{here}.json", KEY, lambda every: targets.judge("pairs", figures(every)))
    results.content |= machine.header() | {"method": METHOD}
    results.replace(rows)
    results.content["rows"] = sorted(results.rows, key=lambda row: str(key_of(row)))
    results.write()
    return results.path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the pairs that CI runs, on one thread, memory returned")
    parser.add_argument("--runs", type=int, default=1, help="of each pair, the median of so many")
    parser.add_argument("--write", action="store_true", help="put what does not fall short into this processor's file")
    options = parser.parse_args()
    here, committed = machine.processor_slug(), {path.stem: read(path)["rows"] for path in sorted(PAIRS.glob("*.json"))}
    tests = ["bench", *(["-m", "short"] if options.short else [])]
    rows = []
    for environment in SHORT if options.short else WHOLE:
        rows += hold(tests, environment, options.runs, committed, here)
    print(*(describe(row, committed, here) for row in rows), sep="\n")
    print(*targets.lines(targets.judge("pairs", figures(rows))), sep="\n")
    if here not in committed:
        print(f"{here} has no committed results: no pair can fail. Write them with --write")
    short = [row for row in rows if falls_short(row, committed, here)]
    if options.write:
        print(commit([row for row in rows if row not in short], here))
    sys.exit(f"{len(short)} of {len(rows)} pairs fell short" if short else 0)


if __name__ == "__main__":
    main()
