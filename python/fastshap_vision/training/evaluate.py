"""Accuracy and cross-entropy, and what a batch must hold."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from timm.models import get_model_input_config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, default_collate

from fastshap_kernels._checks import check_count, describe, fail

from .._modes import evaluation_mode
from .._runtime.errors import SendableErrors
from .._runtime.signals import leaving_to_main
from ..data.recorded import RecordedCoalitions
from ..models.self_explaining import SelfExplainingClassifier
from .agreement import of_all

_MOST = 2**31 - 1


class Evaluation(NamedTuple):
    """Accuracy in percent and mean cross-entropy, as `evaluate` defines them.

    Example:
        >>> accuracy, loss = fv.evaluate(model, data)
        >>> accuracy in (0.0, 25.0, 50.0, 75.0, 100.0)  # of four images
        True
    """

    accuracy: float
    loss: float


def evaluate(
    model: nn.Module,
    data: Dataset,
    batch_size: int = 256,
    *,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> Evaluation:
    """Accuracy (percent) and mean cross-entropy of `model` on `data`.

    Labels are class numbers, (B,). Where they have the shape of the logits, (B, K), each is a yes or no of its own, 1
    or 0: the accuracy is the share of all B·K labels that the sign of their logit says, and the cross-entropy is
    binary, its mean over all of them. The same for a single logit (K = 1), with labels (B,) or (B, 1).

    Args:
        model: takes images and returns logits (B, K); in eval mode for the while.
        data: a dataset of (image, label), or what `record_coalitions` returned.
        batch_size: images a step (and process).
        workers: processes that load data.
        accelerator: spreads the work over its processes, in its precision; without one the model's device is used.

    Returns:
        `Evaluation`.

    Raises:
        ValueError: an argument out of its range, labels of another shape, or labels that are none of the K classes.

    Example:
        >>> logits = torch.utils.data.TensorDataset(torch.eye(4), torch.tensor([0, 1, 2, 0]))
        >>> fv.evaluate(torch.nn.Identity(), logits).accuracy
        75.0
    """
    if not isinstance(model, nn.Module):
        fail("evaluate", "model", "a torch.nn.Module", model)
    batch_size = check_count("evaluate", "batch_size", batch_size, 1, _MOST)
    workers = check_count("evaluate", "workers", workers, 0, _MOST)
    check_data(model, data, "evaluate", "data")
    data = data.data if isinstance(data, RecordedCoalitions) else data
    batches = [list(batch) for batch in BatchSampler(range(len(data)), batch_size, drop_last=False)]  # type: ignore[arg-type]
    if accelerator is None:
        parts = [_summed(model, data, batches, workers, nullcontext)]
    else:
        own = batches[accelerator.process_index :: accelerator.num_processes]
        parts = of_all(lambda: _summed(model, data, own, workers, accelerator.autocast))
    loss, *counts = torch.tensor(parts, dtype=torch.float64).sum(0).tolist()
    correct, impossible, count, logits = map(int, counts)
    if impossible:
        classes = logits // len(data)  # type: ignore[arg-type]
        raise ValueError(
            f"evaluate: {impossible} labels of the data are impossible for the model's {classes} logits. They must be "
            f"class numbers from 0 to {classes - 1}, or 1 and 0 for each logit. Build the model with as many classes "
            "as there are labels."
        )
    return Evaluation(accuracy=100 * correct / count, loss=loss / count)


def _summed(
    model: nn.Module, data: Any, batches: list[list[int]], workers: int, precision: Callable[[], Any]
) -> list[float]:
    """Over these batches: the cross-entropies; how many labels are right, impossible, and there; numbers of logits."""
    # A generator of its own: the loader draws a seed for its workers, and the process's generator stays as it was.
    options: dict[str, Any] = {"num_workers": workers, "collate_fn": Batch(), "generator": torch.Generator()}
    options["worker_init_fn"] = leaving_to_main()
    like = next((weight for weight in model.parameters() if weight.is_floating_point()), torch.empty(0))
    losses, counts = (
        torch.zeros(len(batches), device=like.device),
        torch.zeros(4, dtype=torch.int64, device=like.device),
    )
    with evaluation_mode(model), torch.inference_mode():
        for row, (images, labels) in enumerate(DataLoader(SendableErrors(data), batch_sampler=batches, **options)):
            with precision():
                logits = model(images.to(like.device, like.dtype)).float()
            loss, *found = _scores(logits, labels.to(like.device))
            losses[row] = loss
            counts += torch.stack([*found, torch.tensor(logits.numel(), device=like.device)])
    return [losses.cpu().double().sum().item(), *counts.tolist()]


def _scores(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of a batch: the sum of the cross-entropies; how many labels are right, impossible, and there in all."""
    of_one = logits.ndim == 2 and logits.shape[1] == 1 and labels.shape == logits.shape[:1]
    if logits.ndim == 2 and (labels.shape == logits.shape or of_one):
        wanted = labels.view_as(logits).float()
        impossible = (wanted < 0) | (wanted > 1)
        right = (logits > 0) == (wanted > 0.5)
        loss = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")
    elif logits.ndim == 2 and labels.shape == logits.shape[:1] and not labels.is_floating_point():
        impossible = (labels < 0) | (labels >= logits.shape[1])
        right = logits.argmax(dim=1) == labels
        loss = functional.cross_entropy(logits, labels.long().masked_fill(impossible, 0), reduction="sum")
    else:
        raise ValueError(
            "evaluate: labels must be class numbers (B,), or a yes or no (1 or 0) for each logit (B, K), but they are "
            f"{describe(labels)} for logits {tuple(logits.shape)}. Let the dataset return such labels."
        )
    return loss, right.sum(), impossible.sum(), torch.tensor(right.numel(), device=logits.device)


class Batch:
    """Stacks items to a batch, or says what is wrong with them.

    Args:
        classes: of labels that are class numbers. They are checked here, on the CPU: on a GPU the loss would end the
            process's use of it. −100, which cross-entropy leaves out, may stand among them. None checks nothing.
        all_count: whether −100 is no label either.
    """

    def __init__(self, classes: int | None = None, all_count: bool = False) -> None:
        self.classes, self.left_out = classes, None if all_count else -100

    def __call__(self, items: list[Any]) -> Any:
        try:
            images, labels = default_collate(items)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"The data's items can't be stacked to a batch: {error}. Let the dataset return (image, label), all "
                "images of one size, as fv.load_dataset does."
            ) from error
        if self.classes is not None and isinstance(labels, Tensor) and labels.dtype == torch.int64 and labels.ndim == 1:
            is_possible = (labels >= 0) & (labels < self.classes)
            impossible = labels[~is_possible if self.left_out is None else ~is_possible & (labels != self.left_out)]
            if len(impossible):
                raise ValueError(
                    f"fit: `train_data` has the label {int(impossible[0])}, but the model's {self.classes} classes "
                    f"count from 0 to {self.classes - 1}. Build the model with as many classes as there are labels."
                )
        return images, labels


def check_data(model: nn.Module, data: Any, function: str, argument: str, mixed_precision: str = "") -> None:
    """A dataset of (image, label), with as many classes as the model."""
    if isinstance(data, DataLoader):
        raise ValueError(
            f"{function}: argument `{argument}` must be a dataset, but it is a DataLoader. Pass its dataset "
            "(loader.dataset) and `batch_size`."
        )
    if isinstance(data, IterableDataset) or not (
        hasattr(data, "__len__") and hasattr(data, "__getitem__") and not isinstance(data, Tensor)
    ):
        raise ValueError(
            f"{function}: argument `{argument}` must be a dataset with a length whose items can be indexed, but it is "
            f"a {type(data).__name__}. Wrap it in a torch.utils.data.Dataset."
        )
    if len(data) == 0:
        raise ValueError(f"{function}: argument `{argument}` must hold images, but it is empty.")
    classes, outputs = getattr(data, "classes", None), getattr(model, "num_classes", None)
    # Two classes may also be the no and yes of a single logit.
    if classes is not None and outputs is not None and len(classes) not in (outputs, 2 * (outputs == 1)):
        raise ValueError(
            f"{function}: `{argument}` has {len(classes)} classes, but the model has {outputs} outputs. "
            f"Build the model with num_classes={len(classes)}."
        )
    _check_item(model, data[0], function, argument, mixed_precision)


def _check_item(model: nn.Module, item: Any, function: str, argument: str, mixed_precision: str) -> None:
    """One item of a dataset, which stands for all."""
    remedy = "Let the dataset turn pictures into normalised tensors, as fv.load_dataset does."
    expected = "a dataset of (image, label), each image a tensor of floating-point numbers"
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        fail(function, argument, expected, type(item), remedy)
    image = torch.as_tensor(item[0]) if isinstance(item[0], np.ndarray) else item[0]
    if not isinstance(image, Tensor) or not image.is_floating_point():
        fail(function, argument, expected, image if isinstance(image, Tensor) else type(image), remedy)
    if isinstance(model, SelfExplainingClassifier) and get_model_input_config(model.backbone)["fixed_input_size"]:
        size = model.game.input_size
        if tuple(image.shape) != size:
            remedy = "Let the dataset resize them, or create the model with another img_size or in_chans."
            fail(function, argument, f"of images {size}, the only size that the model takes", image, remedy)
    weights = next((weight for weight in model.parameters() if weight.is_floating_point()), image)
    if weights.is_meta:
        raise ValueError(f"{function}: argument `model` has no weights yet (device meta). Create it on a real device.")
    if mixed_precision == "no" and weights.dtype != image.dtype:
        raise ValueError(
            f"{function}: the images of `{argument}` are {image.dtype}, but the model's weights are {weights.dtype}. "
            "Make both float32 (model.float(), image.float()); mixed_precision='bf16' is for speed."
        )
