"""Writes the tables of README.md and docs/ from the results: python -m bench.tables; `--check` only compares them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.fidelity.report import NETWORKS, Findings, best_of_models, r2_of
from bench.fidelity.report import judge as judge_fidelity
from bench.lib.machine import ROOT
from bench.lib.results import PAIRS, RESULTS, STEPS, Row, newest, read
from bench.lib.targets import shown
from bench.scale import disk_table, imagenet_table, kept_table, table
from fastshap_kernels import testing

README = ROOT / "README.md"
FIDELITY = ROOT / "docs" / "fidelity.md"
KERNELS = ROOT / "docs" / "kernels.md"
MODELS = ROOT / "docs" / "models.md"
FIGURES = ROOT / "docs" / "results.md"
SCALE = ROOT / "docs" / "scale.md"


def targets_table(name: str, bars: list[dict[str, Any]]) -> str:
    """Each target beside its figure."""
    met = {True: "yes", False: "no", None: "–"}
    rows = [f"{bar['what']} | {bar['promise']} | {shown(bar['measured'])} | {met[bar['met']]}" for bar in bars]
    return table(f"{name} | bar | measured | met", rows)


def pairs_table(results: dict[str, Any]) -> str:
    """Ratios of every op beside its plain version, with freed memory returned to the system and kept."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in results["rows"]:
        if r["threads"] == results["threads"]:
            ratios.setdefault((r["op"], r["shape"], r["against"]), {})[r["memory"]] = r["ratio"]
    rows = [
        " | ".join([f"`{op}`" if "_" in op else op, shape, against])
        + "".join(f" | {found[memory]:.2f}×" if memory in found else " | -" for memory in ("returned", "kept"))
        for (op, shape, against), found in ratios.items()
    ]
    about = f"{results['threads']} {results['device']} cores, torch {results['torch']}; {results['method']}."
    header = "op | shape | against | times as fast | … with freed memory kept"
    return table(header, rows) + f"\n\n{about} Made by `make bench`."


def digits_table(results: list[dict[str, Any]]) -> str:
    """Accuracy and fidelity, means over seeds."""
    names = {"vit": "vision transformer", "cnn": "convolutional network"}
    rows = [
        f"{names[r['model']]} | `{r['head']}` | {r['seeds']} | {r['plain_accuracy']:.2f} % | {r['accuracy']:.2f} % | "
        f"{r['r2_exact']:.3f} | {r['correlation']:.3f} | {r['ms_per_explanation']:.1f}"
        for result in results
        for r in result["means"]
    ]
    header = "digits | head | seeds | plain accuracy | accuracy | R², all classes | correlation, predicted class | ms"
    return (
        table(header, rows) + "\n\nMeans over the seeds; R² and correlation against the exact Shapley values of test "
        "images (65 536 coalitions each); ms for one image, all classes, on the CPU. Made by `make bench-digits`."
    )


def refinement_table(results: dict[str, Any]) -> str:
    """What evaluations make of an explanation, and whether its errors are what it says."""

    def shown(value: float | None, digits: int = 3) -> str:
        return "–" if value is None else f"{value:.{digits}f}"

    networks = {"vit": "ViT", "cnn": "CNN"}
    rows = [
        f"{networks[r['network']]} | {r['evaluations']} | {shown(r['r2'], 4)} | {shown(r['kernel_shap_r2'], 4)} | "
        f"{r['coverage']:.1%} | {shown(r['expected_error'])} | {shown(r['true_error'])} | "
        f"{shown(r['rank_correlation'], 2)}"
        for r in results["rows"]
    ]
    header = (
        "digits | evaluations | R² | of KernelSHAP | true values in 90 % intervals | expected error | true error | "
        "rank correlation of the two"
    )
    images = results["rows"][0]["images"]
    return table(header, rows) + (
        f"\n\nOf {images} test images and every class, against exact values; errors are of an image and class, in "
        "logits. KernelSHAP has as many coalitions, and –: not enough for one of the images. Made by `make "
        "bench-refinement`."
    )


#: What the tables show of an op, and what they call it.
BACKENDS = {"reference": "plain PyTorch", "cpu": "C++", "triton": "Triton", "cuda": "CUDA"}


def coverage_table() -> str:
    """Which backends every op has."""
    rows = []
    for op in sorted(path.stem for path in (ROOT / "fastshap_kernels" / "ops").glob("[a-z]*.py")):
        listed = ["reference", *(testing.backends(op, *BACKENDS) if op in testing.OPS else [])]
        name = "`pack_bits`, `unpack_bits`" if op == "pack_bits" else f"`{op}`"
        rows.append(" | ".join([name, *("yes" if backend in listed else "–" for backend in BACKENDS)]))
    return table(" | ".join(["op", *BACKENDS.values()]), rows)


def gpu_table(results: dict[str, Any] | None) -> str:
    """The promises, and the times of every op's backends and rivals."""
    if results is None or "ceilings" not in results:
        return "No GPU has run these kernels yet, so there are no figures: `make gpu` checks and measures them."
    found: dict[tuple[str, ...], dict[str, dict[str, dict[str, Any]]]] = {}
    for row in results["rows"]:
        modes = found.setdefault((row["op"], row["shape"], row["dtype"]), {}).setdefault(row["backend"], {})
        modes[row["mode"]] = row
    columns = {"triton": "Triton", "cuda": "CUDA", "reference": "plain PyTorch", "reference, compiled": "torch.compile"}
    rows = []
    for (op, shape, dtype), backends in found.items():
        own = [times(backends.get(name, {}), "ms_p50", ".3f") for name in columns]
        others = [f"{name} {times(backends[name], 'ms_p50', '.3f')}" for name in backends if name not in columns]
        shares = [times(backends.get(name, {}), "of_ceiling", ".0%") for name in ("triton", "cuda")]
        rows.append(" | ".join([f"`{op}`", f"{shape}, {dtype}", *own, "; ".join(others) or "–", *shares]))
    header = " | ".join(["op | shape", *columns.values(), "others | Triton, of the ceiling | CUDA, of the ceiling"])
    ceilings = results["ceilings"]
    about = (
        f"Milliseconds forward / backward. {results['device']}, driver {results['driver']}, CUDA {results['cuda']}, "
        f"torch {results['torch']}, Triton {results['triton']}, commit {results['commit']}; ceilings: copy "
        f"{ceilings['copy_gb_s']:.0f} GB/s, bfloat16 products {ceilings['bfloat16_tflop_s']:.0f} TFLOP/s. "
        "Made by `make gpu`, which keeps the method, memory and errors beside the times."
    )
    return "\n\n".join([targets_table("op", results["bars"]), table(header, rows), about])


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
        about = f"{results['device']}, torch {results['torch']}, commit {results['commit']}. Made by `make {target}`."
        parts += [targets_table("training step", results["bars"]), about]
    return "\n\n".join(parts) or "Not measured yet: `make bench-step`, or `make gpu-step` on a GPU."


def precision_table(results: dict[str, Any]) -> str:
    """What lower precision of the coalition values changes."""
    names = {"same": "float32", "bf16": "bfloat16", "fp8": "8-bit products"}
    trained = {row["targets"]: row for row in results["training"]}
    rows = [
        f"{names[r['precision']]} | {r['value_error']:.2%} | {r['phi_r2']:.5f} | {r['explanation_r2']:.4f} | "
        f"{trained[r['precision']]['r2']:.3f} | {trained[r['precision']]['accuracy']:.1f} %"
        for r in results["values"]
    ]
    header = "precision of v(S) | error of v(S), of its spread | R² of its Shapley values against float32's"
    header += " | R² of the explanation against them | R² of a model trained on them | its accuracy"
    about = (
        f"{results['method']}; {results['epochs']} epochs; {results['images']} test images, {results['coalitions']:,} "
        f"coalitions each; {results['device']}, torch {results['torch']}. Made by `make bench-precision`."
    )
    return table(header, rows) + "\n\n" + about[0].upper() + about[1:]


def families_table(results: list[dict[str, Any]]) -> str:
    """Each timm family's smallest model: the game that it has, or why it has none."""
    rows = []
    for r in results:
        removal, base, explained = "–", "–", f"no: {r.get('reason')}"
        if "reason" not in r:
            removal = f"`{r['removal']}`" + (f", {r['attention']}" if r["attention"] else "")
            base, explained = f"`{r['base']}`", "yes"
        rows.append(f"`{r['family']}` | `{r['model']}`, {r['image_size']} px | {removal} | {base} | {explained}")
    accepted = sum("reason" not in r for r in results)
    about = f"{accepted} of {len(results)} families. Made by `python -m bench.families`."
    return table("family | model | removal | base | explained", rows) + "\n\n" + about


def newest_findings() -> tuple[Findings, str] | None:
    """Of the experiment on photographs: the largest budget that was run to its comparison of methods, and its name."""
    for name in ("full", "medium", "small"):
        findings = Findings(RESULTS / "fidelity" / name)
        trained = {network for network, _ in findings.runs}
        if trained and trained == set(findings.methods):
            return findings, name
    return None


def summary_table() -> str:
    """What the recipe gives, a row a network."""
    if (found := newest_findings()) is None:
        return NO_FIDELITY
    findings, budget = found
    bars = {bar["what"]: bar["measured"] for bar in judge_fidelity(findings)}
    rows = []
    for network, name in NETWORKS.items():
        key = (network, "recipe")
        r2, correlation = (
            plus_minus(findings.over_seeds(*key, figure), ".3f")
            for figure in (r2_of, lambda run: run["fidelity"]["correlation_predicted"])
        )
        change = plus_minus(findings.accuracy_difference(*key), "+.2f")
        faster = bars[f"{name}: times as fast as KernelSHAP, 2048"]
        rows.append(f"{name} | {change} | {r2} | {correlation} | {faster:.0f}×")
    header = "network | accuracy, points | R² to Shapley values | correlation, predicted class | faster than KernelSHAP"
    return table(header, rows) + "\n\n" + about_fidelity(findings, budget)


def speed_table(steps: dict[str, Any] | None, explanations: dict[str, Any] | None) -> str:
    """Few figures: coalition values and steps beside dense ones, an explanation beside the prediction."""
    bars = {bar["what"]: bar["measured"] for bar in (steps or {}).get("bars", [])}
    base = "ViT-S/16 at 224, "
    names = {
        "v(S) of 8 coalitions an image": (f"{base}v(S), M 8, float32: times as fast as dense-mask", "masked attention"),
        "joint training step, 4 coalitions": (
            f"{base}joint step, M 4, float32: times as fast as the faster dense way",
            "the faster dense way",
        ),
    }
    rows = [
        f"{name} | {bars[what]:.1f}× as fast as {against}"
        for name, (what, against) in names.items()
        if bars.get(what) is not None
    ]
    costs = {row["network"]: row["time"] for row in (explanations or {}).get("rows", [])}
    if "vit_small_patch16_224" in costs:
        rows.append(f"explanation of an image | {costs['vit_small_patch16_224']:.2f}× the time of the prediction alone")
    if not rows:
        return "Not measured yet: `make bench-step`."
    return table("ViT-S/16 at 224 pixels, on 2 CPU cores | measured", rows)


def explanation_table(results: list[dict[str, Any]]) -> str:
    """What an explanation costs beside the prediction, a row a network and processor."""
    rows = [
        f"`{r['network']}` | {r['width']} | {r['time']:.2f}× | {r['parameters']:+.1%} | {result['device']}, "
        f"{result['threads']} threads"
        for result in results
        for r in result["rows"]
    ]
    if not rows:
        return "Not measured yet: `make bench-explanation`."
    return table("network | width of the head | time | parameters | measured on", rows)


def fidelity_tables() -> str:
    """The recipe beside the plain model and FastSHAP, and the targets."""
    if (found := newest_findings()) is None:
        return NO_FIDELITY
    judged = targets_table("fidelity", judge_fidelity(found[0]))
    return "\n\n".join([settings_table(found[0], COMPARED), judged, about_fidelity(*found)])


def fidelity_methods_table() -> str:
    found = newest_findings()
    return "\n\n".join([methods_table(found[0]), about_fidelity(*found)]) if found else NO_FIDELITY


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

        def over_seeds(figure: Callable[[Row], float], style: str, key: tuple[str, str] = (network, setting)) -> str:
            return plus_minus(findings.over_seeds(*key, figure), style)

        named = [f"`{setting}`"] if settings is None else []
        cells = [NETWORKS[network], *named, runs[0]["about"], str(len(runs))]
        cells.append(over_seeds(lambda run: run["accuracy"], ".2f"))
        cells.append("" if setting == "plain" else plus_minus(findings.accuracy_difference(network, setting), "+.2f"))
        cells += [over_seeds(r2_of, ".3f"), over_seeds(lambda run: run["fidelity"]["correlation_predicted"], ".3f")]
        rows.append(" | ".join(cells))
    name = "network | setting" if settings is None else "network"
    header = f"{name} | trained with | seeds | accuracy, % | minus plain | R² | correlation, predicted class"
    return table(header, rows)


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
            figures = [plus_minus(column.get(method), ".3f") for column in columns]
            evaluations = str(findings.evaluations[network, method])
            rows.append(" | ".join([NETWORKS[network], findings.names[method], evaluations, *figures]))
    removals = ("own removal", "grey pixels")
    header = [f"{figure}, {removal}" for removal in removals for figure in ("insertion − deletion", "AOPC")]
    return table(" | ".join(["network | method | passes", *header]), rows)


def load(name: str) -> Any:
    return read(RESULTS / f"{name}.json")


def tables_of() -> dict[Path, dict[str, str]]:
    """Every table by page and name."""
    pairs = [read(path) for path in PAIRS.glob("*.json")]
    explanations = [read(path) for path in sorted((RESULTS / "explanation").glob("*.json"))]
    steps = newest(STEPS, "*.json")
    readme = {
        "summary": summary_table(),
        "speed": speed_table(steps, newest(RESULTS / "explanation", "*.json")),
    }
    kernels = {
        # Of the processors, the one that most is known of.
        "cpu": pairs_table(max(pairs, key=lambda results: (len(results["rows"]), results["date"]))),
        "coverage": coverage_table(),
        "gpu": gpu_table(newest(RESULTS, "*/[0-9]*.json")),
    }
    figures = {
        "fidelity": fidelity_tables(),
        "digits": digits_table([load("digits_vit"), load("digits_cnn")]),
        "explanation": explanation_table(explanations),
        "step": step_table(steps, newest(RESULTS, "*/step-*.json")),
        "precision": precision_table(load("precision")),
    }
    fidelity = {
        "methods": fidelity_methods_table(),
        "ablation": ablation_table("small"),
        "longer": ablation_table("medium"),
        "refinement": refinement_table(load("refinement")),
    }
    families = {"families": families_table(load("families"))}
    recordings = load("recordings")
    scale = {
        "kept": kept_table(recordings),
        "disk": disk_table(recordings),
        "imagenet": imagenet_table([read(path) for path in sorted(STEPS.glob("*.json"))], recordings),
    }
    return {
        README: readme,
        KERNELS: kernels,
        FIGURES: figures,
        FIDELITY: fidelity,
        MODELS: families,
        SCALE: scale,
    }


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
            raise SystemExit(f"{page.name}'s tables differ from bench/results: run python -m bench.tables")


if __name__ == "__main__":
    main()
