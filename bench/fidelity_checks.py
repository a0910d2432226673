"""What is measured of one trained model: accuracy, and its Shapley values beside converged ones."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastshap_vision as fv

#: KernelSHAP's evaluations an image that a model's own values are set beside.
EVALUATIONS = (64, 128, 256, 512, 2048)
#: Fewer than this many a player may not determine its values.
FEWEST = 4
#: Explanations are timed so often, after a few that are not.
TIMED, UNTIMED = 50, 5


def first_images(data: Dataset, count: int, device: torch.device) -> Tensor:
    return torch.stack([data[index][0] for index in range(count)]).to(device)


def check_model(
    model: fv.SelfExplainingClassifier, test: Dataset, explained: int, evaluations: int, device: torch.device
) -> dict[str, Any]:
    """Accuracy, fidelity to the Shapley values of the model's own game, and what KernelSHAP takes to be as close."""
    model.eval()
    accuracy = fv.evaluate(model, test)
    images = first_images(test, explained, device)
    reference = converge(model, images, evaluations)
    fidelity = fv.fidelity(model, images, reference)
    counts = [count for count in EVALUATIONS if FEWEST * model.players <= count <= evaluations]
    return {
        "accuracy": accuracy.accuracy,
        "task_loss": accuracy.loss,
        "fidelity": fidelity.as_dict(),
        "kernel_shap": [_kernel_shap(model, images, reference, count) for count in counts],
        "ms_per_explanation": milliseconds(model, list(images.split(1))),
        "ms_per_image": milliseconds(model, [images]) / len(images),  # all at once, as KernelSHAP takes them
    }


def converge(model: Any, images: Tensor, evaluations: int) -> fv.ReferenceValues:
    """Standard errors below 2 % of the values' spread, or with the most evaluations allowed what they come to."""
    return fv.converged_values(model, images, relative_error=0.02, coalitions=min(2048, evaluations), most=evaluations)


def _kernel_shap(
    model: fv.SelfExplainingClassifier, images: Tensor, reference: fv.ReferenceValues, evaluations: int
) -> dict[str, float]:
    """How far KernelSHAP with so many evaluations of an image is from the reference, and how long it takes."""
    # Other coalitions than the reference's own.
    found = fv.kernel_shap_values(model, images, evaluations, seed=1)
    error = (found.phi - reference.phi).square().mean((1, 2))
    return {
        "evaluations": evaluations,
        "mean_squared_error": float(error.mean()),
        "ms_per_image": found.seconds / len(images) * 1e3,
    }


def milliseconds(model: fv.SelfExplainingClassifier, batches: list[Tensor]) -> float:
    """Median over batches of the time of one, every class explained."""
    times = []
    for turn in range(UNTIMED + TIMED):
        start = time.perf_counter()
        model.explain(batches[turn % len(batches)], target="all").values.cpu()
        times.append(time.perf_counter() - start)
    return statistics.median(times[UNTIMED:]) * 1e3
