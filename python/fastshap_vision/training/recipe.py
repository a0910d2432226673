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
from .._runtime.processes import processes, together
from ..data.mirrored import WithMirrorImages
from ..data.record import record_coalitions
from ..data.recorded import RecordedCoalitions
from ..data.shards import kept_as
from ..games.coalitions import Coalitions
from ..games.mask_cells_cnn import CellRemoval
from ..images.preprocessing import Preprocessing
from ..models.convert import convert
from ..models.head import SharesHead
from ..models.refine import calibrated
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.explainer import ExplainerObjective, values_of
from .export import write_model
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
    found = TRAINING | (CONVOLUTIONAL if isinstance(getattr(model.game, "embedding", model.game), CellRemoval) else {})
    return found if mirrored else found | {"epochs": 2 * found["epochs"]}


#: The share of the images whose coalitions are held out, where no other data are given for it.
HELD_OUT = 0.1
#: Held-out images by which the model is calibrated, at most.
CALIBRATED = 512
#: The folders of recorded coalitions in a run's: those that are trained on, and those that are held out.
RECORDED = ("coalitions", "held_out")


def record(
    model: SelfExplainingClassifier,
    data: Dataset,
    eval_data: Dataset | None = None,
    *,
    coalitions: int = COALITIONS,
    mirror: bool = True,
    seed: int = 0,
    output: str | Path | None = None,
    **options: Any,
) -> tuple[RecordedCoalitions, RecordedCoalitions]:
    """Records what `train_explainer` learns from, and what it holds out; in its `output`, it then finds them.

    Args:
        model: as `convert` returns.
        data, eval_data, coalitions, mirror, seed: as in `train_explainer`.
        output: the run's folder, or None to keep all in memory.
        options: of `record_coalitions`. With `classes`, the images that are held out keep all of theirs all the same:
            error bars need them.

    Returns:
        the coalitions of `data`, and those of the images that are held out.

    Example:
        >>> recorded, held_out = fv.recipe.record(model, data, coalitions=8, output="run", store="features")
        >>> result = fv.train_explainer(model, data, coalitions=8, output="run", epochs=1)
    """
    trained, held_out = (data, eval_data) if eval_data is not None else _divided(data, seed)
    found = []
    for part, name in zip((WithMirrorImages(trained) if mirror else trained, held_out), RECORDED, strict=True):
        folder = None if output is None else Path(output) / name
        kept = {} if folder is None else kept_as(folder)  # how it is kept is decided where it is recorded first
        more = options | ({"classes": None} if part is held_out else {})
        found.append(record_coalitions(model, part, coalitions, seed=seed, output=folder, **kept | more))
    return found[0], found[1]


def train_explainer(
    model: nn.Module | str,
    data: Dataset,
    eval_data: Dataset | None = None,
    *,
    coalitions: int = COALITIONS,
    mirror: bool | None = None,
    precision: str | None = None,
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
            Labels have no part in it. Or what `record_coalitions` returned for this model.
        eval_data: images to hold out, of the same kind; None for a tenth of `data`.
        coalitions: M, even, of each image and of its mirror image.
        mirror: whether mirror images are explained too, which helps wherever they could be seen. None: for colour
            images, which are photographs, and not for greyscale ones, which may be writing.
        precision: of the coalitions' values; see `record_coalitions`. None: as in what is recorded, else "auto".
        seed: of the coalitions, of what is held out, of new layers and of the training.
        workers: processes that load data.
        output: the run's folder, as in `fit`, with the recorded coalitions in it: what is there is not recorded again,
            and where several processes run, they divide the images.
        resume: as in `fit`.
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
    if isinstance(data, RecordedCoalitions):
        recorded, mirror = _as_recorded(data, eval_data), True
    else:
        mirror = explained.game.input_size[0] == 3 if mirror is None else mirror
        settings: dict[str, Any] = {"workers": workers, "progress": progress}
        settings |= {"coalitions": coalitions, "mirror": mirror, "seed": seed, "output": output}
        settings |= {} if precision is None else {"precision": precision}
        recorded = record(explained, data, eval_data, **settings)
    settings = training(explained, mirror)
    settings["batch_size"] = max(1, min(settings["batch_size"], len(recorded[0]) // processes().num_processes))
    settings |= {"seed": seed, "workers": workers, "output": output, "resume": resume, "progress": progress} | options
    objective = ExplainerObjective(keep_best=True)
    with together():
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
    rows, phi, bits, values = torch.arange(min(len(held_out), CALIBRATED)), [], [], []
    if "classes" in held_out.rows([0]):
        _log.warning("The explanations have no error bars: the values of all classes of held-out images are needed.")
        return
    with evaluation_mode(model):
        for part in rows.split(64):
            phi.append(model.shapley_values(held_out.images(part.tolist(), model))[0].cpu())
            recorded = held_out.rows(part.tolist())
            bits.append(recorded["bits"])
            recorded = {name: tensor.to(next(model.parameters()).device) for name, tensor in recorded.items()}
            values.append(values_of(model, recorded)[0].cpu())
    coalitions = Coalitions(torch.cat(bits), model.players, paired=True)
    model.calibration = calibrated(torch.cat(phi), coalitions, torch.cat(values))


def _divided(data: Any, seed: int) -> tuple[Dataset, Dataset]:
    """The data without some images, and these."""
    if not hasattr(data, "__len__") or len(data) < 2:
        fail("train_explainer", "data", "a dataset of at least two images, of which some are held out", data)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(HELD_OUT * len(data)))
    return Subset(data, sorted(order[count:])), Subset(data, sorted(order[:count]))


def _as_recorded(data: RecordedCoalitions, eval_data: Any) -> tuple[RecordedCoalitions, RecordedCoalitions]:
    if not isinstance(eval_data, RecordedCoalitions):
        remedy = "Record some images apart: a row of mirror images must not be held out from its twin."
        fail("train_explainer", "eval_data", "recorded coalitions, as `data` is", eval_data, remedy)
    return data, eval_data
