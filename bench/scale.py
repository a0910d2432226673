"""What ImageNet takes, from what was measured: the tables of docs/scale.md."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

IMAGES, CLASSES, COALITIONS = 1_281_167, 1000, 64
DEVICES = (1, 8, 64)
#: Features of a ViT-B and the share of the bias.
FEATURES = 769


def table(header: str, rows: Iterable[str]) -> str:
    """Columns are told apart by " | "."""
    lines = [header, " | ".join(["---"] * (header.count(" | ") + 1)), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def kept_table(results: dict[str, Any]) -> str:
    """What is lost in what is kept."""
    networks = {"vit": "ViT", "cnn": "CNN"}
    data = {"digits": "digits", "cifar10": "CIFAR-10"}
    found = [row for row in results["rows"] if row["part"] == "kept"]
    first = {(row["data"], row["network"]): row["r2"] for row in found if row["kept"] == "float32"}
    rows = [
        f"{data[r['data']]}, {networks[r['network']]} | {r['kept']} | {r['bytes_an_image'] / 1e3:.1f} kB | "
        f"{r['r2']:.4f} | {r['r2'] - first[r['data'], r['network']]:+.4f}"
        for r in found
    ]
    return table("data, network | kept | an image | R² of the explainer | beside float32", rows) + (
        "\n\nOne seed; 64 coalitions of each image; 10 classes, so that features are more than values here. R² to "
        "exact values (digits) or converged ones (CIFAR-10). Made by `make bench-recordings`."
    )


def disk_table(results: dict[str, Any]) -> str:
    """Speed and memory of recordings in a folder."""
    by_what = {row["what"]: row for row in results["rows"] if row["part"] == "memory"}
    rows = []
    if "recording" in by_what:
        r = by_what["recording"]
        about = f"{r['images']} images, {r['coalitions']} coalitions, {r['classes']} classes (v(S) simulated)"
        rows.append(f"recording {about}: files | {r['files_gb']} GB")
        rows.append(f"… without the model's time: images/s | {r['images_a_second']}")
        rows.append(f"… memory beyond the model's | {r['grown_mb']} MB")
    if "training from the files" in by_what:
        r = by_what["training from the files"]
        rows.append(f"training from these files: memory beyond the model's | {r['grown_mb']} MB")
        rows.append(f"… images/s beside those from memory | {r['ratio']:.2f}")
        rows.append(f"reading shuffled rows, one process: rows/s | {r['rows_a_second']}")
    for r in (row for row in results["rows"] if row["part"] == "processes"):
        equal = "equal" if r["equal_digests"] else "other"
        rows.append(f"two processes beside one, a core each: images/s, bits | {r['ratio']:.2f}×, {equal}")
    return table(f"{results['processor']['model']}, {results['threads']} threads | measured", rows)


def imagenet_table(steps: Sequence[dict[str, Any]], recordings: dict[str, Any] | None) -> str:
    """Hours of recording ImageNet on so many devices, and its bytes."""
    coalitions = COALITIONS * IMAGES
    rows = []
    for result in steps:
        for r in result["rows"]:
            if r["mode"] == "value" and r["way"] == "packed" and "error" not in r and r["image_size"] == 224:
                rate = 1e3 * r["batch"] * r["coalitions"] / r["ms_p50"]
                hours = [f"{coalitions / rate / devices / 3600:,.1f} h" for devices in DEVICES]
                rows.append(
                    f"{r['model']}, {r['dtype']}, {result['device']} | {rate:,.0f} coalitions/s | {' | '.join(hours)}"
                )
    if not any(result.get("kind") == "cuda" for result in steps):
        rows.append("any model on a GPU | not measured | – | – | –")
    header = f"recording {IMAGES:,} images, {COALITIONS} coalitions of each | rate of one | " + " | ".join(
        f"{devices} device{'s' * (devices > 1)}" for devices in DEVICES
    )
    words = 4 * 7 * COALITIONS  # of 196 players
    sizes = [
        f"{name}: {IMAGES * (COALITIONS * 2 * width + words + more) / 1e9:,.0f} GB"
        for name, width, more in (
            (f"all {CLASSES} classes", CLASSES, 0),
            ("features of a ViT-B", FEATURES, 0),
            ("the 50 likeliest classes", 50, 4 * 50),
        )
    ]
    text = (
        "\n\nRates are those of `bench/results/steps`, each device alone: devices record apart and exchange nothing. "
        f"In float16, without mirror images, {'; '.join(sizes)}: bytes of bits and values, counted"
    )
    measured = next((r for r in (recordings or {"rows": []})["rows"] if r.get("what") == "recording"), None)
    if measured:
        each = measured["files_gb"] * 1e6 / measured["images"]
        text += f" (measured with {CLASSES} classes: {each:.0f} kB an image)"
    return table(header, rows) + text + "."
