"""What an explanation costs beside the prediction: python -m bench.explanation.

Pretrained or not, the time is the same: networks of timm at 224 pixels with random weights, their heads as the recipe
makes them. One image, its predicted class, by turns; and the parameters that the head adds.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch

import fastshap_vision as fv
from bench.lib import machine
from bench.lib.results import RESULTS, Results
from bench.lib.timer import CPU, Timer

NETWORKS = ("efficientnet_lite0", "resnet50", "vit_tiny_patch16_224", "vit_small_patch16_224")
#: An explanation adds so much at most, of the prediction's time and of the model's parameters.
MOST_TIME, MOST_PARAMETERS = 1.2, 0.2


@torch.no_grad()
def measure(name: str, seconds: float) -> dict[str, object]:
    torch.manual_seed(0)
    network = timm.create_model(name).eval()
    model = fv.convert(network, **fv.recipe.MODEL).eval()
    torch.nn.init.normal_(model.head.shares.weight, std=0.01)  # one that was trained
    image = torch.randn(1, *model.game.input_size)
    calls = {"prediction": lambda: network(image), "explanation": lambda: model.explain(image)}
    for call in calls.values():
        call()
        call()
    times = Timer(CPU, seconds, least=15, most=400, by="wall").measure(calls)
    count = {part: sum(p.numel() for p in part_of.parameters()) for part, part_of in model.named_children()}
    # Turn by turn: other guests of the machine slow both sides of a turn alike.
    pairs = zip(times["explanation"].turns, times["prediction"].turns, strict=True)
    ratios = sorted(explained / predicted for explained, predicted in pairs)
    time, parameters = ratios[len(ratios) // 2], count["head"] / count["backbone"]
    return {
        "network": name,
        "width": model.head.explainer.width,
        "prediction_ms": round(times["prediction"].median, 2),
        "explanation_ms": round(times["explanation"].median, 2),
        "time": round(time, 3),
        "parameters": round(parameters, 4),
        "met": bool(time <= MOST_TIME and parameters <= MOST_PARAMETERS),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each network")
    parser.add_argument("--output", type=Path, default=RESULTS / "explanation" / f"{machine.processor_slug()}.json")
    options = parser.parse_args()
    results = Results(options.output, ("network",))
    for name in options.networks:
        row = measure(name, options.seconds)
        print(f"{name}: {row['time']:.2f} times the prediction's time, {row['parameters']:+.1%} parameters", flush=True)
        results.replace([row])
        results.content = machine.header() | {"rows": results.rows}
        results.write()


if __name__ == "__main__":
    main()
