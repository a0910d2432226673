"""What is measured of one trained model: accuracy, and its Shapley values beside converged ones."""

from __future__ import annotations

import hashlib
import itertools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

import fastshap_vision as fv
from bench.lib.timer import Timer, milliseconds_of

#: KernelSHAP's evaluations an image that a model's own values are set beside.
EVALUATIONS = (64, 128, 256, 512, 2048)
#: Fewer than this many a player may not determine its values.
FEWEST = 4
#: One image's explanation is timed so often, after a few that are not.
TIMED, UNTIMED = 50, 5
#: Many images' explanation and KernelSHAP's, in turn so often: of so many images at once, and of so many evaluations.
TURNS, BATCH, KERNEL_SHAP_BATCH, KERNEL_SHAP_EVALUATIONS = 7, 64, 4, 2048


def first_images(data: Dataset, count: int, device: torch.device) -> Tensor:
    return torch.stack([data[index][0] for index in range(count)]).to(device)


def check_model(
    model: Any, test: Dataset, explained: int, evaluations: int, device: torch.device, games: Path
) -> dict[str, Any]:
    """Accuracy, fidelity to the Shapley values of the model's own game, and what KernelSHAP takes to be as close.

    `games` is the folder of what is known of games already: of all models that share an encoder, one pays for it.
    """
    model.eval()
    accuracy = fv.evaluate(model, test)
    images = first_images(test, explained, device)
    path = games / f"{game_key(model, explained, evaluations)}.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(_evaluate(model, images, evaluations), unfinished)
        unfinished.replace(path)
    stored = torch.load(path, map_location=device)
    fidelity = fv.fidelity(model, images, fv.ReferenceValues(**stored["reference"]))
    return {
        "accuracy": accuracy.accuracy,
        "task_loss": accuracy.loss,
        "fidelity": fidelity.as_dict(),
        "kernel_shap": stored["kernel_shap"],
        "ms_per_explanation": one_explanation(model, images),
        "time": time_in_turn(model, images),
    }


def game_key(model: Any, *asked: int) -> str:
    """All that a game depends on, and what is computed of it; of an explainer that is trained apart, a surrogate's."""
    player = getattr(model, "surrogate", model)
    about = (type(model).__name__, type(player.head).__name__, player.removal, *asked)
    digest = hashlib.sha256(repr(about).encode())
    for name, weight in player.backbone.state_dict().items():
        digest.update(name.encode() + weight.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _evaluate(model: Any, images: Tensor, evaluations: int) -> dict[str, Any]:
    """The converged values of the images, and how far KernelSHAP with fewer evaluations is from them."""
    reference = converge(model, images, evaluations)
    counts = [count for count in EVALUATIONS if FEWEST * model.players <= count <= evaluations]
    errors = [_kernel_shap(model, images, reference, count) for count in counts]
    return {"reference": reference._asdict(), "kernel_shap": errors}


def converge(model: Any, images: Tensor, evaluations: int) -> fv.ReferenceValues:
    """Standard errors below 2 % of the values' spread, or with the most evaluations allowed what they come to.

    In bfloat16, as the models were trained: that changes v(S) by half a percent of its spread (`make bench-precision`).
    v(N) is the float32 one, which the explanations add up to.
    """
    options = {"relative_error": 0.02, "coalitions": min(2048, evaluations), "most": evaluations}
    with torch.autocast(images.device.type, torch.bfloat16):
        found = fv.kernel_shap_values(model, images, **options)
    with torch.no_grad():
        grand = torch.cat([model.shapley_values(part)[1] for part in images.split(BATCH)])
    return found._replace(grand=grand.double())


def _kernel_shap(
    model: fv.SelfExplainingClassifier, images: Tensor, reference: fv.ReferenceValues, evaluations: int
) -> dict[str, float]:
    """How far KernelSHAP with so many evaluations of an image is from the reference."""
    # Other coalitions than the reference's own.
    found = fv.kernel_shap_values(model, images, evaluations, seed=1)
    error = (found.phi - reference.phi).square().mean((1, 2))
    return {"evaluations": evaluations, "mean_squared_error": float(error.mean())}


def one_explanation(model: fv.SelfExplainingClassifier, images: Tensor) -> float:
    """Median of the milliseconds of one image, every class explained."""
    return milliseconds_of(lambda turn: _explain(model, images, turn, 1), TIMED, UNTIMED)


def time_in_turn(model: fv.SelfExplainingClassifier, images: Tensor) -> dict[str, float]:
    """Median milliseconds an image of our values and of KernelSHAP's, in turn, each in batches that suit it."""
    turn = itertools.count()
    calls = {
        "ours": lambda: _explain(model, images, next(turn), BATCH),
        "theirs": lambda: fv.kernel_shap_values(
            model, _batch(images, next(turn), KERNEL_SHAP_BATCH), KERNEL_SHAP_EVALUATIONS
        ),
    }
    times = Timer(images.device, 0.0, TURNS, TURNS, by="wall").measure(calls)
    return {
        "ms_per_image": times["ours"].median / BATCH,
        "kernel_shap_evaluations": KERNEL_SHAP_EVALUATIONS,
        "kernel_shap_ms_per_image": times["theirs"].median / KERNEL_SHAP_BATCH,
    }


def _batch(images: Tensor, turn: int, count: int) -> Tensor:
    """The turn's next `count` images, from the first again after the last."""
    return images[torch.arange(turn * count, (turn + 1) * count, device=images.device) % len(images)]


def _explain(model: fv.SelfExplainingClassifier, images: Tensor, turn: int, count: int) -> Tensor:
    return model.explain(_batch(images, turn, count), target="all").values.cpu()
