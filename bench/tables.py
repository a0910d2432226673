"""Writes the README's tables from the results: `python bench/tables.py`; `--check` fails where they drifted."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULTS = Path(__file__).parent / "results"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu_table(results: dict[str, Any]) -> str:
    """Ratios of every op beside its plain version."""
    rows = [
        [f"`{r['op']}`" if "_" in r["op"] else r["op"], r["shape"], r["against"], f"{r['ratio']:.2f}×"]
        for r in results["rows"]
        if "ratio" in r
    ]
    versions, machine = results["versions"], results["machine"]
    about = f"{machine['threads']} {machine['processor']} cores, torch {versions['torch']}; {results['method']}."
    return table(["op", "shape", "against", "times as fast"], rows) + f"\n\n{about} Made by `make bench`."


def digits_table(results: list[dict[str, Any]]) -> str:
    """Accuracy and fidelity, means over seeds."""
    names = {"vit": "vision transformer", "cnn": "convolutional network"}
    means = [row for result in results for row in result["means"]]
    rows = [
        [
            names[r["model"]],
            f"`{r['head']}`",
            str(r["seeds"]),
            f"{r['plain_accuracy']:.2f} %",
            f"{r['accuracy']:.2f} %",
            f"{r['r2_exact']:.3f}",
            f"{r['correlation']:.3f}",
            f"{r['ms_per_explanation']:.1f}",
        ]
        for r in means
    ]
    header = [
        "digits",
        "head",
        "seeds",
        "plain accuracy",
        "accuracy",
        "R², all classes",
        "correlation, predicted class",
        "ms",
    ]
    return (
        table(header, rows) + "\n\nMeans over the seeds; R² and correlation against the exact Shapley values of test "
        "images (65 536 coalitions each); ms for one image, all classes, on the CPU. Made by `make bench-digits`."
    )


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def render(text: str) -> str:
    """The README with its tables made anew."""
    tables = {
        "cpu": cpu_table(load("cpu")),
        "digits": digits_table([load("digits_vit"), load("digits_cnn")]),
    }
    for name, body in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"README.md has no table named {name}")
    return text


def main() -> None:
    text = README.read_text()
    wanted = render(text)
    if "--check" in sys.argv[1:]:
        if wanted != text:
            raise SystemExit("README.md's tables differ from bench/results: run python bench/tables.py")
    else:
        README.write_text(wanted)


if __name__ == "__main__":
    main()
