"""What lower precision costs in fidelity: python -m bench.precision.

Digits vision transformers (bench/digits.py, 16 patches, fewer epochs) are trained three times with one seed: with
coalition values in the task's float32, in bfloat16 and in 8-bit products as the fixed targets of the regression (no
masked task: with it, values and task are one pass). Then all 65 536 coalitions of some test images, of the model with
float32 targets, are valued in each precision, and their exact Shapley values compared. On the CPU `torch._scaled_mm`
computes the 8-bit products too, only no faster: the rounding is the real one, no emulation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastshap_kernels as fk
import fastshap_vision as fv
from bench import digits
from bench.lib import machine
from bench.lib.results import RESULTS, write
from bench.lib.timer import timed

PRECISIONS = ("same", "bf16", "fp8")


def train(precision: str, epochs: int, device: torch.device) -> tuple[fv.SelfExplainingClassifier, dict[str, Any]]:
    """A model whose targets have this precision, and its accuracy in percent."""
    model = digits.build("vit", "shares", seed=0)
    objective = fv.JointObjective(4, 3.0, masked_task_weight=0.0, target_precision=precision, seed=0)
    data, test = fv.load_dataset("digits", "train"), fv.load_dataset("digits", "test")
    recipe = digits.TRAINING | {"epochs": epochs}
    result = fv.fit(model, data, test, objective=objective, seed=0, progress=False, **recipe)
    row = {"targets": precision, "accuracy": result.accuracy, "seconds": round(result.seconds, 1)}
    return model.to(device).eval(), row


@torch.no_grad()
def all_values(model: fv.SelfExplainingClassifier, image: Tensor, precision: str) -> tuple[Tensor, float]:
    """v of all 2^P coalitions of one image, float64 (2^P, K), and the seconds they took."""
    bits = torch.arange(2**model.players, dtype=torch.int32, device=image.device).view(1, -1, 1)
    values, taken = timed(lambda: model.coalition_values(image, bits, precision=precision)[0].double(), image.device)
    return values, taken


def reference(values: list[Tensor], seconds: float) -> fv.ReferenceValues:
    """Exact Shapley values of images from their values (2^P, K)."""
    phi = torch.stack([fk.exact_shapley(v) for v in values])
    null, grand = torch.stack([v[0] for v in values]), torch.stack([v[-1] for v in values])
    return fv.ReferenceValues(phi, None, null, grand, sum(map(len, values)), seconds)


def compare(model: fv.SelfExplainingClassifier, images: Tensor) -> list[dict[str, Any]]:
    """Values and Shapley values of one model in each precision, beside those in its own."""
    rows: list[dict[str, Any]] = []
    exact: Tensor = torch.empty(0)
    exact_phi = exact
    for precision in PRECISIONS:
        pairs = [all_values(model, image, precision) for image in images.split(1)]
        values, seconds = [v for v, _ in pairs], sum(s for _, s in pairs)
        found = reference(values, seconds)
        together = torch.cat(values)
        if precision == "same":
            exact, exact_phi = together, found.phi
        spread = (exact - exact.mean(0)).square().mean()
        residual = (found.phi - exact_phi).square().sum()
        rows.append(
            {
                "precision": precision,
                "value_error": float(((together - exact).square().mean() / spread).sqrt()),
                "phi_r2": float(1 - residual / (exact_phi - exact_phi.mean()).square().sum()),
                "phi_correlation": float(torch.corrcoef(torch.stack([found.phi.flatten(), exact_phi.flatten()]))[0, 1]),
                "explanation_r2": fv.fidelity(model, images, found).r2,
                "seconds": round(seconds, 1),
            }
        )
        print(rows[-1], flush=True)
    return rows


def measure(epochs: int, count: int, device: torch.device) -> dict[str, Any]:
    """All that the results file holds."""
    test = fv.load_dataset("digits", "test")
    images = torch.stack([test[i][0] for i in range(count)]).to(device)
    trained, compared = [], []
    for precision in PRECISIONS:
        model, row = train(precision, epochs, device)
        if precision == "same":
            compared = compare(model, images)
            row["r2"] = compared[0]["explanation_r2"]
        else:
            row["r2"] = fv.fidelity(model, images).r2
        trained.append(row)
        print(row, flush=True)
    return machine.header(device) | {
        "method": "digits ViT, shares head, 4 coalitions an image and step, detached targets, no masked task, one "
        "seed; 8-bit products by torch._scaled_mm",
        "epochs": epochs,
        "images": count,
        "coalitions": 2**16,
        "values": compared,
        "training": trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=25)
    parser.add_argument("--images", type=int, default=3, help="test images, 65 536 coalitions each")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.json")
    options = parser.parse_args()
    write(options.output, measure(options.epochs, options.images, torch.device(options.device)))


if __name__ == "__main__":
    main()
