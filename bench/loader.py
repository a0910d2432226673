"""How many pictures a core reads: python -m bench.loader.

Images a second of processor time, one thread, of JPEG files of 500 x 375 pixels: decoded, resized, cropped to 224 and
normalised, by turns in three ways: timm's transform after a decoding that copies (what this package did first), ours,
which makes the same bits, and `resize="torch"`, which makes nearly the same.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform

import fastshap_vision as fv
from bench.lib import machine
from bench.lib.results import RESULTS, Results
from bench.offline import write_images
from fastshap_vision.images.decode import read_image

#: Images a second and core.
LEAST = 600
#: timm's preprocessing without a model, and of a pretrained ResNet-50.
CONFIGURATIONS = {
    "0.875 bilinear": {"crop_pct": 0.875, "interpolation": "bilinear"},
    "0.95 bicubic": {"crop_pct": 0.95, "interpolation": "bicubic"},
}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def ways(options: dict[str, Any]) -> dict[str, Callable[[Path], torch.Tensor]]:
    """Each from a path to an input."""
    preprocessing = fv.Preprocessing((3, 224, 224), **IMAGENET, **options)
    theirs = create_transform((3, 224, 224), **IMAGENET, **options)
    exact, fast = (preprocessing.transform(resize=resize) for resize in ("pillow", "torch"))

    def before(path: Path) -> torch.Tensor:
        with Image.open(path) as image:
            image.load()
            return theirs(ImageOps.exif_transpose(image).convert("RGB"))

    return {
        "before": before,
        "pillow": lambda path: exact(read_image(path, "RGB")),
        "torch": lambda path: fast(read_image(path, "RGB")),
    }


def rate(read: Callable[[Path], torch.Tensor], paths: list[Path]) -> float:
    """Images a second of processor time: other guests of the machine take none of it."""
    started = time.process_time()
    for path in paths:
        read(path)
    return len(paths) / (time.process_time() - started)


def measure(name: str, paths: list[Path], turns: int) -> list[dict[str, Any]]:
    calls = ways(CONFIGURATIONS[name])
    found: dict[str, list[float]] = {way: [] for way in calls}
    for turn in range(turns + 1):
        for way in list(calls)[:: -1 if turn % 2 else 1]:
            taken = rate(calls[way], paths)
            if turn:  # the first one warms up
                found[way].append(taken)
    std = np.reshape(IMAGENET["std"], (3, 1, 1))
    images = {way: np.stack([calls[way](path).numpy() for path in paths[:16]]) for way in calls}
    rows = []
    for way, rates in found.items():
        levels = np.abs(255 * std * (images[way] - images["before"])).round()
        median = statistics.median(rates)
        ratio = statistics.median(ours / theirs for ours, theirs in zip(rates, found["before"], strict=True))
        rows.append(
            {
                "preprocessing": name,
                "way": way,
                "images": len(paths),
                "turns": turns,
                "images_s": round(median, 1),
                "fastest_images_s": round(max(rates), 1),
                "ratio": round(ratio, 3),
                "pixels_that_differ": round(float((levels > 0).mean()), 5),
                "most_levels": int(levels.max()),
                "met": bool(median >= LEAST),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64, help="in each turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--output", type=Path, default=RESULTS / "loader.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = Results(options.output, ("preprocessing", "way"))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        for name in CONFIGURATIONS:
            rows = measure(name, sorted(Path(folder).iterdir()), options.turns)
            for row in rows:
                print(f"{name}, {row['way']}: {row['images_s']} images/s, {row['ratio']} of before", flush=True)
            results.replace(rows)
    results.content = machine.header() | {"least": LEAST, "rows": results.rows}
    results.write()


if __name__ == "__main__":
    main()
