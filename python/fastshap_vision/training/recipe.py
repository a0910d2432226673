"""How the explainer of a trained model is trained: the one recipe that docs/fidelity.md measures, and its one call.

The command line, the examples and the benchmarks take it from here, and the docs are compared with it.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

from fastshap_kernels._checks import check_count, fail

from .._modes import evaluation_mode
from .._runtime.processes import processes
from ..data.mirrored import WithMirrorImages
from ..data.recorded import RecordedCoalitions, record_coalitions
from ..games.coalitions import Coalitions
from ..games.mask_cells_cnn import CellRemoval
from ..images.preprocessing import Preprocessing
from ..models.convert import convert
from ..models.head import SharesHead
from ..models.refine import calibrated
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.explainer import ExplainerObjective
from .checkpoint import write_model
from .fit import FitResult, fit

_log = logging.getLogger(__name__)

#: Of `fv.convert`.
MODEL: dict[str, Any] = {"head_depth": 2, "intermediates": True}
#: Of `fv.record_coalitions`: M of each image, and of its mirror image.
COALITIONS = 64
#: Of `fv.fit`. The epochs are passes over the images and their mirror images.
TRAINING: dict[str, Any] = {
    "epochs": 12,
    "batch_size": 64,
    "opt": "muon",
    "lr": 5e-3,
    "weight_decay": 0.05,
    "warmup_epochs": 1,
    "clip_grad": 1.0,
}
#: Of `fv.fit`, where a convolutional network has other values.
CONVOLUTIONAL: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.3}


def training(model: SelfExplainingClassifier, mirrored: bool = True) -> dict[str, Any]:
    """Arguments of `fit` for the explainer of `model`; images that are not mirrored take as many steps.

    Args:
        model: the self-explaining model.
        mirrored: whether the coalitions are those of `WithMirrorImages`.

    Returns:
        the arguments by name.

    Example:
        >>> fv.recipe.training(model)["epochs"], fv.recipe.training(model, mirrored=False)["epochs"]
        (12, 24)
    """
    found = TRAINING | (CONVOLUTIONAL if isinstance(model.game, CellRemoval) else {})
    return found if mirrored else found | {"epochs": 2 * found["epochs"]}


#: The share of the images whose coalitions are held out, where no other data are given for it.
HELD_OUT = 0.1
#: Held-out images by which the model is calibrated, at most.
CALIBRATED = 512
#: The recorded coalitions in a run's folder: those that are trained on, and those that are held out.
RECORDED = ("coalitions.safetensors", "held_out.safetensors")


def train_explainer(
    model: nn.Module | str,
    data: Dataset,
    eval_data: Dataset | None = None,
    *,
    coalitions: int = COALITIONS,
    mirror: bool | None = None,
    precision: str = "auto",
    seed: int = 0,
    workers: int = 0,
    output: str | Path | None = None,
    resume: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> FitResult:
    """Explains a model that is trained already: its logits stay as they are, to the bit.

    Evaluates coalitions of every image once, trains the shares on them, and keeps the epoch whose explanations predict
    held-out coalitions best; the explanation before training is one of the candidates. The held-out images calibrate
    the model too, so that its explanations say how far to believe them.

    Args:
        model: a timm model, a `SelfExplainingClassifier` with the shares head, or the name of a pretrained timm model.
        data: a dataset of (image, label), images (C, H, W) that are the same whenever they are read: no augmentation.
            Labels have no part in it.
        eval_data: images to hold out; None for a tenth of `data`.
        coalitions: M, even, of each image and of its mirror image.
        mirror: whether mirror images are explained too, which helps wherever they could be seen. None: for colour
            images, which are photographs, and not for greyscale ones, which may be writing.
        precision: of the coalitions' values; see `record_coalitions`.
        seed: of the coalitions, of what is held out, of new layers and of the training.
        workers: processes that load data.
        output: the run's folder, as in `fit`, with the recorded coalitions in it.
        resume: as in `fit`; what was recorded in `output` is read.
        progress: shows bars on a terminal.
        options: of `fit`, in place of the recipe's.

    Returns:
        as `fit`, with `model`, and the best epoch; 0 where no epoch was better than the explanation before training.
        The history's eval_value_r2 is of held-out images.

    Raises:
        ValueError: for a model with the votes head, an odd number of coalitions, fewer than two images, images that
            change as they are read, and as `fit` does.
        UnsupportedModelError: for a model that can't be converted.

    Example:
        >>> classifier = timm.create_model("test_vit", num_classes=10, img_size=48)
        >>> result = fv.train_explainer(classifier, data, coalitions=8, epochs=1)
        >>> result.model.explain(images).values.shape
        torch.Size([4, 9])
    """
    explained = _as_explainable(model, seed)
    known = getattr(data, "preprocessing", None)
    if isinstance(known, Preprocessing) and known.input_size == explained.game.input_size:
        explained.preprocessing = known
    explained.to(processes().device)
    mirror = explained.game.input_size[0] == 3 if mirror is None else mirror
    kept, held_out = (data, eval_data) if eval_data is not None else _divided(data, seed)
    recorded = []
    for part, name in zip((WithMirrorImages(kept) if mirror else kept, held_out), RECORDED, strict=True):
        path = None if output is None else Path(output) / name
        read = path if resume is not None else None
        recording = {"seed": seed, "precision": precision, "workers": workers, "progress": progress}
        recorded.append(_recorded(explained, part, coalitions, path, read, recording))
    settings = training(explained, mirror)
    settings["batch_size"] = min(settings["batch_size"], len(recorded[0]))
    settings |= {"seed": seed, "workers": workers, "output": output, "resume": resume, "progress": progress} | options
    objective = ExplainerObjective(keep_best=True)
    before = objective.evaluate(explained, recorded[1], batch_size=settings["batch_size"])["eval_value_r2"]
    result = fit(explained, recorded[0], recorded[1], objective=objective, **settings)
    best = objective.restore_best(explained)
    found = [row["eval_value_r2"] for row in result.history]
    epoch = found.index(best) + 1 if best in found else 0
    _calibrate(explained, recorded[1])
    if output is not None and processes().is_main_process:
        write_model(explained, Path(output))
    if epoch:
        shares = f"{best:.3f} of the variance of coalition values on {len(recorded[1])} held-out images"
        _log.info("explained: %s, %.3f before training (epoch %d)", shares, before, epoch)
    else:
        _log.warning(
            "No epoch explained the held-out images better than the explanation before training, which was kept. Give "
            "more images, or train longer."
        )
    return replace(result, best_epoch=epoch)


def _as_explainable(model: nn.Module | str, seed: int) -> SelfExplainingClassifier:
    """The model itself, or one made of it, whose new layers follow from the seed."""
    if not isinstance(model, nn.Module | str):
        fail("train_explainer", "model", "a timm model, a SelfExplainingClassifier or the name of a timm model", model)
    seed = check_count("train_explainer", "seed", seed, 0, 2**32 - 1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if isinstance(model, str):
            model = SelfExplainingClassifier(model, pretrained=True, **MODEL)
        elif not isinstance(model, SelfExplainingClassifier):
            model = convert(model, **MODEL)
    if not isinstance(model.head, SharesHead):
        raise ValueError(
            "train_explainer: argument `model` must have the shares head, but its votes are its explanation already. "
            "Use fv.convert(model.backbone)."
        )
    return model


@torch.no_grad()
def _calibrate(model: SelfExplainingClassifier, held_out: RecordedCoalitions) -> None:
    """By the coalitions of images that were held out, which are recorded already."""
    rows = torch.arange(min(len(held_out), CALIBRATED))
    with evaluation_mode(model):
        parts = [model.shapley_values(held_out.images(part.tolist(), model))[0].cpu() for part in rows.split(64)]
    coalitions = Coalitions(held_out.bits[rows], model.players, paired=True)
    model.calibration = calibrated(torch.cat(parts), coalitions, held_out.values[rows])


def _divided(data: Any, seed: int) -> tuple[Dataset, Dataset]:
    """The data without some images, and these."""
    if not hasattr(data, "__len__") or len(data) < 2:
        fail("train_explainer", "data", "a dataset of at least two images, of which some are held out", data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(HELD_OUT * len(data)))
    return Subset(data, sorted(order[count:])), Subset(data, sorted(order[:count]))


def _recorded(
    model: SelfExplainingClassifier,
    data: Any,
    coalitions: int,
    path: Path | None,
    read: Path | None,
    options: dict[str, Any],
) -> RecordedCoalitions:
    """Coalitions of the data: read where a run goes on, else recorded, and written where there is a folder."""
    if read is not None and read.exists():
        recorded = RecordedCoalitions.load(read, data)
        kept = recorded.bits.shape[1]
        if kept != coalitions:
            raise ValueError(f"train_explainer: argument `coalitions`: this run has recorded {kept} of each image.")
        return recorded
    recorded = record_coalitions(model, data, coalitions, **options)
    if path is not None and processes().is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        recorded.save(path)
    return recorded
