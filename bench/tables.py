"""Writes the tables of README.md and docs/ from the results; `--check` fails where they drifted."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fidelity_report import NETWORKS, Findings, best_of_models
from fidelity_report import bars as fidelity_bars

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
FIDELITY = ROOT / "docs" / "fidelity.md"
MODELS = ROOT / "docs" / "models.md"
RESULTS = Path(__file__).parent / "results"


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cpu_table(results: dict[str, Any]) -> str:
    """Ratios of every op beside its plain version, with freed memory returned to the system and kept."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in results["rows"]:
        if "ratio" in r:
            ratios.setdefault((r["op"], r["shape"], r["against"]), {})[r["memory"]] = r["ratio"]
    rows = [
        [f"`{op}`" if "_" in op else op, shape, against]
        + [f"{found[memory]:.2f}×" if memory in found else "-" for memory in ("returned", "kept")]
        for (op, shape, against), found in ratios.items()
    ]
    versions, machine = results["versions"], results["machine"]
    about = f"{machine['threads']} {machine['processor']} cores, torch {versions['torch']}; {results['method']}."
    header = ["op", "shape", "against", "times as fast", "… with freed memory kept"]
    return table(header, rows) + f"\n\n{about} Made by `make bench`."


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


#: What the tables show of an op, and what they call it.
BACKENDS = {"reference": "plain PyTorch", "cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


def kernels(op: Path) -> tuple[str, ...]:
    """The `_KERNELS` of an op's file, read without importing it; those that it takes from another op's file."""
    names = {}
    for statement in ast.parse(op.read_text()).body:
        if isinstance(statement, ast.Assign):
            names |= {target.id: statement.value for target in statement.targets if isinstance(target, ast.Name)}
        if isinstance(statement, ast.ImportFrom) and any(name.name == "select_pool" for name in statement.names):
            names["_KERNELS"] = kernels(op.with_name(f"{statement.module}.py"))
    found = names.get("_KERNELS", ())
    return ast.literal_eval(found) if isinstance(found, ast.expr) else found


def coverage_table() -> str:
    """Which backends every op has."""
    rows = []
    for op in sorted((ROOT / "fastshap_kernels" / "ops").glob("[a-z]*.py")):
        listed = ("reference", *kernels(op))
        name = "`pack_bits`, `unpack_bits`" if op.stem == "pack_bits" else f"`{op.stem}`"
        rows.append([name, *("yes" if backend in listed else "–" for backend in BACKENDS)])
    return table(["op", *BACKENDS.values()], rows)


def newest_gpu() -> dict[str, Any] | None:
    """The latest results of a GPU; None where there are none."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*/[0-9]*.json")]
    complete = [results for results in found if results.get("rows") and "ceilings" in results]
    return max(complete, key=lambda results: results["date"], default=None)


def gpu_table(results: dict[str, Any] | None) -> str:
    """The promises, and the times of every op's backends and rivals."""
    if results is None:
        return "No GPU has run these kernels yet, so there are no figures: `make gpu` checks and measures them."
    promises = [
        [f"`{bar['op']}`", bar["promise"], f"{bar['bar']:g}", f"{bar['measured']:.3g}", "yes" if bar["met"] else "no"]
        for bar in results["bars"]
    ]
    found: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in results["rows"]:
        modes = found.setdefault((row["op"], row["shape"], row["dtype"]), {}).setdefault(row["backend"], {})
        modes[row["mode"]] = row
    shown = {"triton": "Triton", "cuda": "CUDA", "reference": "plain PyTorch", "reference, compiled": "torch.compile"}
    rows = []
    for (op, shape, dtype), backends in found.items():
        columns = [times(backends.get(name, {}), "ms_p50", ".3f") for name in shown]
        others = [f"{name} {times(backends[name], 'ms_p50', '.3f')}" for name in backends if name not in shown]
        shares = [times(backends.get(name, {}), "of_ceiling", ".0%") for name in ("triton", "cuda")]
        rows.append([f"`{op}`", f"{shape}, {dtype}", *columns, "; ".join(others) or "–", *shares])
    header = ["op", "shape", *shown.values(), "others", "Triton, of the ceiling", "CUDA, of the ceiling"]
    ceilings = results["ceilings"]
    about = (
        f"Milliseconds forward / backward. {results['device']}, driver {results['driver']}, CUDA {results['cuda']}, "
        f"torch {results['torch']}, Triton {results['triton']}, commit {results['commit']}; ceilings: copy "
        f"{ceilings['copy_gb_s']:.0f} GB/s, bfloat16 products {ceilings['bfloat16_tflop_s']:.0f} TFLOP/s. "
        "Made by `make gpu`, which keeps the method, memory and errors beside the times."
    )
    return "\n\n".join([table(["op", "promise", "bar", "measured", "met"], promises), table(header, rows), about])


def times(modes: dict[str, dict[str, Any]], name: str, style: str) -> str:
    """A field of the forward and backward rows; – where there is none."""
    values = [modes[mode].get(name) for mode in ("forward", "backward") if mode in modes]
    return " / ".join("–" if value is None else format(value, style) for value in values) or "–"


def step_table(cpu: dict[str, Any] | None, gpu: dict[str, Any] | None) -> str:
    """Each promise about a whole training step beside its figure."""
    parts = []
    for results, target in ((cpu, "bench-step"), (gpu, "gpu-step")):
        if results is None:
            continue
        rows = [
            [
                bar["what"],
                bar["promise"],
                "not measured" if bar["measured"] is None else f"{bar['measured']:.3g}",
                {True: "yes", False: "no", None: "–"}[bar["met"]],
            ]
            for bar in results["bars"]
        ]
        about = f"{results['device']}, torch {results['torch']}, commit {results['commit']}. Made by `make {target}`."
        parts += [table(["training step", "bar", "measured", "met"], rows), about]
    return "\n\n".join(parts) or "Not measured yet: `make bench-step`, or `make gpu-step` on a GPU."


def precision_table(results: dict[str, Any]) -> str:
    """What lower precision of the coalition values changes."""
    names = {"same": "float32", "bf16": "bfloat16", "fp8": "8-bit products"}
    trained = {row["targets"]: row for row in results["training"]}
    rows = [
        [
            names[r["precision"]],
            f"{r['value_error']:.2%}",
            f"{r['phi_r2']:.5f}",
            f"{r['explanation_r2']:.4f}",
            f"{trained[r['precision']]['r2']:.3f}",
            f"{trained[r['precision']]['accuracy']:.1f} %",
        ]
        for r in results["values"]
    ]
    header = [
        "precision of v(S)",
        "error of v(S), of its spread",
        "R² of its Shapley values against float32's",
        "R² of the explanation against them",
        "R² of a model trained on them",
        "its accuracy",
    ]
    about = (
        f"{results['method']}; {results['epochs']} epochs; {results['images']} test images, {results['coalitions']:,} "
        f"coalitions each; {results['device']}, torch {results['torch']}. Made by `make bench-precision`."
    )
    return table(header, rows) + "\n\n" + about[0].upper() + about[1:]


def families_table(results: list[dict[str, Any]]) -> str:
    """Each timm family's smallest model: the game that it has, or why it has none."""
    rows = []
    for r in results:
        size = f"`{r['model']}`, {r['image_size']} px"
        if "reason" in r:
            rows.append([f"`{r['family']}`", size, "–", "–", f"no: {r['reason']}"])
        else:
            removal = f"`{r['removal']}`" + (f", {r['attention']}" if r["attention"] else "")
            rows.append([f"`{r['family']}`", size, removal, f"`{r['base']}`", "yes"])
    accepted = sum("reason" not in r for r in results)
    about = f"{accepted} of {len(results)} families. Made by `python bench/families.py`."
    return table(["family", "model", "removal", "base", "explained"], rows) + "\n\n" + about


def newest_findings() -> tuple[Findings, str] | None:
    """Of the experiment on photographs: the largest budget that was run to its comparison of methods, and its name."""
    for name in ("full", "medium", "small"):
        findings = Findings(RESULTS / "fidelity" / name)
        trained = {network for network, _ in findings.runs}
        if trained and trained == set(findings.methods):
            return findings, name
    return None


def fidelity_tables() -> str:
    """The recipe beside the plain model and FastSHAP, and the promises."""
    if (found := newest_findings()) is None:
        return NO_FIDELITY
    findings, budget = found
    return "\n\n".join([settings_table(findings, COMPARED), promises_table(findings), about_fidelity(findings, budget)])


def fidelity_methods_table() -> str:
    if (found := newest_findings()) is None:
        return NO_FIDELITY
    return "\n\n".join([methods_table(found[0]), about_fidelity(*found)])


def ablation_table(budget: str) -> str:
    """Every setting that the budget trained."""
    findings = Findings(RESULTS / "fidelity" / budget)
    return "\n\n".join([settings_table(findings), about_fidelity(findings, budget)]) if findings.runs else NO_FIDELITY


#: The settings in the README.
COMPARED = ("plain", "recipe", "fastshap")
NO_FIDELITY = "Not measured yet: `make bench-fidelity DATA=folder` (of the CIFAR-10 archives)."


def about_fidelity(findings: Findings, budget: str) -> str:
    plain = next(runs[0]["settings"] for (_, setting), runs in findings.runs.items() if setting == "plain")
    return (
        f"CIFAR-10, budget `{budget}`: {plain['images']:,} training images, {plain['epochs']} epochs; mean ± standard "
        f"deviation over the seeds. Made by `make bench-fidelity DATA=folder BUDGET={budget}`, settings beyond the "
        "budget's with `SETTINGS=…`."
    )


def plus_minus(both: tuple[float, float] | None, style: str) -> str:
    """Mean ± standard deviation; of one seed there is none."""
    if both is None:
        return "–"
    return f"{both[0]:{style}}" + (f" ± {both[1]:{style.removeprefix('+')}}" if both[1] else "")


def settings_table(findings: Findings, settings: Sequence[str] | None = None) -> str:
    """How each setting trains, with its name, or some: what it costs in accuracy, what it gives in fidelity."""
    rows = []
    for network, setting in findings.in_order():
        if settings is not None and setting not in settings:
            continue
        runs = findings.runs[network, setting]
        figures = {
            name: findings.over_seeds(network, setting, lambda run, name=name: run["fidelity"][name])
            for name in ("r2", "correlation_predicted")
        }
        rows.append(
            [
                NETWORKS[network],
                *([f"`{setting}`"] if settings is None else []),
                runs[0]["about"],
                str(len(runs)),
                plus_minus(findings.over_seeds(network, setting, lambda run: run["accuracy"]), ".2f"),
                "" if setting == "plain" else plus_minus(findings.accuracy_difference(network, setting), "+.2f"),
                plus_minus(figures["r2"], ".3f"),
                plus_minus(figures["correlation_predicted"], ".3f"),
            ]
        )
    header = ["network", *(["setting"] if settings is None else []), "trained with", "seeds", "accuracy, %"]
    return table([*header, "minus plain", "R²", "correlation, predicted class"], rows)


def methods_table(findings: Findings) -> str:
    """Every method by two removals, each on the model that suits it best, and what an image costs."""
    rows = []
    for network in [network for network in NETWORKS if network in findings.methods]:
        columns = [
            best_of_models(findings.of_methods(network, game, figure))
            for game in ("own", "pixel")
            for figure in ("difference", "aopc")
        ]
        for method in sorted(columns[0], key=lambda method: -columns[0][method][0]):
            rows.append(
                [
                    NETWORKS[network],
                    findings.names[method],
                    str(findings.evaluations[network, method]),
                    *(plus_minus(column.get(method), ".3f") for column in columns),
                ]
            )
    removals = ("own removal", "grey pixels")
    header = [f"{figure}, {removal}" for removal in removals for figure in ("insertion − deletion", "AOPC")]
    return table(["network", "method", "passes", *header], rows)


def promises_table(findings: Findings) -> str:
    rows = [
        [
            bar["what"],
            f"at least {bar['least']}",
            "not measured" if bar["measured"] is None else f"{bar['measured']:.4g}",
            {True: "yes", False: "no", None: "–"}[bar["met"]],
        ]
        for bar in fidelity_bars(findings)
    ]
    return table(["fidelity", "bar", "measured", "met"], rows)


def newest_gpu_step() -> dict[str, Any] | None:
    """The latest results of bench/step.py on a GPU; None where there are none."""
    found = [json.loads(path.read_text()) for path in RESULTS.glob("*/step-*.json")]
    return max(found, key=lambda results: results["date"], default=None)


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def tables_of() -> dict[Path, dict[str, str]]:
    """Every table by page and name."""
    readme = {
        "cpu": cpu_table(load("cpu")),
        "fidelity": fidelity_tables(),
        "digits": digits_table([load("digits_vit"), load("digits_cnn")]),
        "gpu": gpu_table(newest_gpu()),
        "coverage": coverage_table(),
        "precision": precision_table(load("precision")),
        "step": step_table(load("step-cpu") if (RESULTS / "step-cpu.json").exists() else None, newest_gpu_step()),
    }
    fidelity = {
        "methods": fidelity_methods_table(),
        "ablation": ablation_table("small"),
        "longer": ablation_table("medium"),
    }
    return {README: readme, FIDELITY: fidelity, MODELS: {"families": families_table(load("families"))}}


def render(page: Path, tables: dict[str, str]) -> str:
    """The page with its tables made anew."""
    text = page.read_text()
    for name, body in tables.items():
        pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, body=body: f"{match[1]}{body}\n{match[2]}", text)
        if count != 1:
            raise SystemExit(f"{page.name} has no table named {name}")
    return text


def main() -> None:
    for page, tables in tables_of().items():
        wanted = render(page, tables)
        if "--check" not in sys.argv[1:]:
            page.write_text(wanted)
        elif wanted != page.read_text():
            raise SystemExit(f"{page.name}'s tables differ from bench/results: run python bench/tables.py")


if __name__ == "__main__":
    main()
