"""What explaining many images costs beside predicting them: python -m bench.offline.

Images a second of `fv.explain_images`, five classes of each image into a Parquet file, and of the bare network's loop
over the same loader, by turns in one process: JPEG files of 500 x 375 pixels, networks of timm at 224 pixels with
random weights, their heads as the recipe makes them. The loader reads in the process itself, so that its seconds of
processor time, which other guests of the machine take least part in, are what one core would take alone. Without the
digest of the weights, which a call takes once for all its images; its seconds are in the row.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from PIL import Image

import fastshap_vision as fv
from bench.lib import machine
from bench.lib.results import RESULTS, Results
from fastshap_vision.offline.explain_images import digest_of_model, loader_of
from fastshap_vision.offline.stored import find_images

NETWORKS = ("vit_small_patch16_224", "vit_base_patch16_224", "resnet50")
#: Of the bare loop's images a second.
LEAST = 0.9


def write_images(folder: Path, count: int) -> None:
    """Photographs' sizes, in pixels and about in bytes: blurred noise and a little sharp noise."""
    generator = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375), 3)
        noise = generator.integers(-12, 13, (375, 500, 3))
        pixels = np.clip(np.asarray(coarse, dtype=np.int64) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:05d}.jpg", quality=90)


def measure(name: str, images: Path, batch_size: int, turns: int) -> dict[str, object]:
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    model = fv.convert(network, **fv.recipe.MODEL).eval()
    torch.nn.init.normal_(model.head.shares.weight, std=0.01)  # one that was trained
    count = len(find_images(images))
    begun = time.process_time()
    digest = digest_of_model(model)
    digest_seconds = time.process_time() - begun

    @torch.inference_mode()
    def predict() -> None:
        for batch in loader_of(model, find_images(images), batch_size, workers=0):
            network(batch.inputs).argmax(1)

    def explain() -> None:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "out.parquet"
            assert fv.explain_images(model, images, output, batch_size=batch_size, progress=False).unreadable == 0

    calls = {"prediction": predict, "explanation": explain}
    found: dict[str, list[float]] = {side: [] for side in calls}
    with mock.patch("fastshap_vision.offline.explain_images.digest_of_model", return_value=digest):
        for turn in range(turns + 1):
            for side in list(calls)[:: -1 if turn % 2 else 1]:
                begun = time.process_time()
                calls[side]()
                if turn:  # the first one warms up
                    found[side].append(count / (time.process_time() - begun))
    # Turn by turn: other guests of the machine slow both sides of a turn alike.
    pairs = zip(found["explanation"], found["prediction"], strict=True)
    ratio = statistics.median(explained / predicted for explained, predicted in pairs)
    return {
        "network": name,
        "images": count,
        "batch_size": batch_size,
        "turns": turns,
        "digest_s": round(digest_seconds, 2),
        "prediction_images_s": round(statistics.median(found["prediction"]), 2),
        "explanation_images_s": round(statistics.median(found["explanation"]), 2),
        "ratio": round(ratio, 3),
        "met": bool(ratio >= LEAST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, help="of timm")
    parser.add_argument("--images", type=int, default=192, help="in each turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS / "offline.json")
    options = parser.parse_args()
    results = Results(options.output, ("network",))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder), options.images)
        for name in options.networks:
            row = measure(name, Path(folder), options.batch_size, options.turns)
            rates = f"{row['explanation_images_s']} images/s explained, {row['prediction_images_s']} predicted"
            print(f"{name}: {rates}: {row['ratio']}", flush=True)
            results.replace([row])
            results.content = machine.header() | {"least": LEAST, "rows": results.rows}
            results.write()


if __name__ == "__main__":
    main()
