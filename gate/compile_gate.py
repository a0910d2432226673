"""Compiles every GPU kernel without a GPU and holds it to gate/budget.json: `make gate`.

No spills and no local memory; registers and shared memory within a tenth of the budget; wide loads in the kernels
that stream, matrix instructions in those that multiply; every source compiles against the headers of the oldest torch.
--write makes the present figures the budget: do so when a change of them is meant. Figures depend on the compiler, so
each version of nvcc and Triton has a budget of its own; with one that has none, only what is absolute is held.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

import cuda_kernels
import oldest_headers
import triton
import triton_kernels
from resources import Resources

BUDGET = Path(__file__).parent / "budget.json"
TOLERANCE = 0.1

PARTS = ("triton", "cuda", "headers")

#: {backend: {architecture: {kernel: resources}}}
Table = dict[str, dict[str, dict[str, Resources]]]
#: {backend: {version of its compiler: {architecture: {kernel: [registers, shared memory]}}}}
Budget = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


def versions() -> dict[str, str]:
    """Of the compilers that the figures depend on."""
    home = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return {"triton": triton.__version__, "cuda": home[1] if home else "none"}


def measure(parts: Collection[str], only: str | None) -> tuple[Table, list[str]]:
    """Compiles; returns the table and every problem that is one whatever the budget says."""
    table: Table = {}
    problems: list[str] = []
    if "triton" in parts:
        table["triton"] = {}
        for rows, missing in triton_kernels.compile_all(only):
            for architecture, kernels in rows.items():
                table["triton"].setdefault(architecture, {}).update(kernels)
            problems += missing
    if "cuda" in parts:
        cuda_kernels.build()
        table["cuda"], missing = cuda_kernels.read(only)
        problems += [*missing, *cuda_kernels.missing_operators()]
    if "headers" in parts:
        problems += oldest_headers.problems(oldest_headers.sources(only), oldest_headers.fetch())
    for where, resources in rows_of(table).items():
        if resources.local:
            problems.append(f"{where}: {resources.local} bytes of local memory, where registers spill")
    return table, problems


def rows_of(table: Table) -> dict[str, Resources]:
    return {
        f"{backend} {architecture} {kernel}": resources
        for backend, architectures in table.items()
        for architecture, kernels in architectures.items()
        for kernel, resources in kernels.items()
    }


def compare(table: Table, budget: Table, partial: bool) -> list[str]:
    """Every figure that is a tenth or more from the budget, and every kernel that only one of them has."""
    now, before = rows_of(table), rows_of(budget)
    problems = [f"{where}: not in the budget" for where in now if where not in before]
    if not partial:
        problems += [f"{where}: in the budget, but there is no such kernel" for where in before if where not in now]
    for where in now.keys() & before.keys():
        for name in ("registers", "shared"):
            new, old = getattr(now[where], name), getattr(before[where], name)
            if abs(new - old) > TOLERANCE * max(old, 1):
                problems.append(f"{where}: {name} {new}, budget {old}")
    return sorted(problems)


def hold_to_budget(table: Table, budget: Budget, built_with: dict[str, str], partial: bool) -> list[str]:
    """Compares each backend with the budget of its compiler's version; says so where there is none."""
    problems = []
    for backend, found in table.items():
        of_version = budget.get(backend, {}).get(built_with[backend])
        if of_version is None:
            known = ", ".join(budget.get(backend, {}))
            print(f"{backend}: compiler {built_with[backend]}, budgets of {known}: only what is absolute is held")
            continue
        rows = {
            architecture: {kernel: Resources(*figures) for kernel, figures in kernels.items()}
            for architecture, kernels in of_version.items()
        }
        problems += compare({backend: found}, {backend: rows}, partial)
    return problems


def record(table: Table, budget: Budget, built_with: dict[str, str], partial: bool) -> None:
    """Puts the present figures in place of those of the same compilers, or of the same kernels where `partial`."""
    for backend, architectures in table.items():
        of_version = budget.setdefault(backend, {}).setdefault(built_with[backend], {})
        for architecture, kernels in architectures.items():
            known = of_version.setdefault(architecture, {})
            if not partial:
                known.clear()
            known.update({kernel: [row.registers, row.shared] for kernel, row in kernels.items()})


def as_text(budget: Budget) -> str:
    """JSON with one kernel a line, so that a change of one is a change of one line."""
    text = json.dumps(budget, indent=1, sort_keys=True)
    return re.sub(r"\[\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2]", text) + "\n"


def show(table: Table) -> None:
    print(f"{'registers':>9} {'shared':>7}  kernel")
    for where, resources in sorted(rows_of(table).items()):
        print(f"{resources.registers:>9} {resources.shared:>7}  {where}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="only this one")
    parser.add_argument("--only", metavar="FILE", help="only what is made of this file, such as mask_patches")
    parser.add_argument("--write", action="store_true", help="make the present figures the budget")
    options = parser.parse_args()
    table, problems = measure([options.part] if options.part else PARTS, options.only)
    show(table)
    budget: Budget = json.loads(BUDGET.read_text())
    partial = options.only is not None
    if options.write:
        record(table, budget, versions(), partial)
        BUDGET.write_text(as_text(budget))
    else:
        problems += hold_to_budget(table, budget, versions(), partial)
    print(*problems, sep="\n")
    print(f"{len(rows_of(table))} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
