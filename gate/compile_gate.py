"""Compiles every GPU kernel without a GPU and holds it to gate/budget.json: `make gate`.

No spills and no local memory; registers and shared memory within a tenth of the budget; wide loads in the kernels
that stream, matrix instructions in those that multiply. --write makes the present figures the budget: do so when a
change of them is meant. Figures depend on the compiler: with other versions of nvcc or Triton than the budget's,
only what is absolute is held.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import cuda_kernels
import triton
import triton_kernels
from resources import Resources

BUDGET = Path(__file__).parent / "budget.json"
TOLERANCE = 0.1

#: {backend: {architecture: {kernel: resources}}}
Table = dict[str, dict[str, dict[str, Resources]]]


def versions() -> dict[str, str]:
    """Of the compilers that the figures depend on."""
    home = re.search(r"release ([\d.]+)", subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout)
    return {"triton": triton.__version__, "cuda": home[1] if home else "none"}


def measure(backends: list[str], only: str | None) -> tuple[Table, list[str]]:
    """Compiles; returns the table and every problem that is one whatever the budget says."""
    table: Table = {}
    problems: list[str] = []
    if "triton" in backends:
        table["triton"] = {}
        for rows, missing in triton_kernels.compile_all(only):
            for architecture, kernels in rows.items():
                table["triton"].setdefault(architecture, {}).update(kernels)
            problems += missing
    if "cuda" in backends:
        cuda_kernels.build()
        table["cuda"], missing = cuda_kernels.read(only)
        problems += [*missing, *cuda_kernels.missing_operators()]
    for where, resources in rows_of(table).items():
        if resources.spills or resources.local:
            problems.append(f"{where}: {resources.spills} bytes of spills, {resources.local} of local memory")
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


def show(table: Table) -> None:
    print(f"{'registers':>9} {'shared':>7}  kernel")
    for where, resources in sorted(rows_of(table).items()):
        print(f"{resources.registers:>9} {resources.shared:>7}  {where}")


def load_budget() -> tuple[dict[str, str], Table]:
    data = json.loads(BUDGET.read_text()) if BUDGET.exists() else {"versions": {}, "kernels": {}}
    table = {
        backend: {
            architecture: {kernel: Resources(**figures) for kernel, figures in kernels.items()}
            for architecture, kernels in architectures.items()
        }
        for backend, architectures in data["kernels"].items()
    }
    return data["versions"], table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["triton", "cuda"], help="only this one")
    parser.add_argument("--only", metavar="FILE", help="only the kernels of this file, such as mask_patches")
    parser.add_argument("--write", action="store_true", help="make the present figures the budget")
    options = parser.parse_args()
    backends = [options.backend] if options.backend else ["triton", "cuda"]
    table, problems = measure(backends, options.only)
    show(table)
    built_with, budget = load_budget()
    if options.write:
        for backend, architectures in table.items():
            for architecture, kernels in architectures.items():
                known = budget.setdefault(backend, {}).setdefault(architecture, {})
                if options.only is None:
                    known.clear()
                known.update(kernels)
        kernels = {
            backend: {
                architecture: {name: asdict(row) for name, row in sorted(rows.items())}
                for architecture, rows in architectures.items()
            }
            for backend, architectures in budget.items()
        }
        BUDGET.write_text(json.dumps({"versions": versions(), "kernels": kernels}, indent=1) + "\n")
    else:
        for backend in backends:
            if built_with.get(backend) != versions()[backend]:
                print(f"{backend}: budget of {built_with.get(backend)}, compiler {versions()[backend]}: not compared")
                table.pop(backend)
        budget = {backend: budget[backend] for backend in table}
        problems += compare(table, budget, options.only is not None)
    print(*problems, sep="\n")
    print(f"{len(rows_of(table))} kernels, {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
