"""Labels as shares of the classes: timm's mixup, cutmix and label smoothing."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from fastshap_kernels._checks import fail

#: The settings of a run that make labels soft; all 0 leaves them as they are.
NAMES = ("smoothing", "mixup", "cutmix")


class SoftLabels:
    """Mixes the images of a batch in pairs and gives labels as shares of the classes, float (B, K).

    Args:
        classes: K.
        smoothing: share of a label that is spread over all classes.
        mixup, cutmix: alpha of the beta distribution that the share of an image is drawn from, by numpy's generator;
            0 for none. Where both are on, each batch is mixed in one of the two ways, as likely as the other.
    """

    def __init__(self, classes: int, smoothing: float, mixup: float, cutmix: float) -> None:
        self.classes, self.smoothing = classes, smoothing
        options = {"mixup_alpha": mixup, "cutmix_alpha": cutmix, "label_smoothing": smoothing, "num_classes": classes}
        self.mix = Mixup(**options) if mixup or cutmix else None

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if self.mix is not None:
            images, labels = self.mix(images.clone(), labels)
            return images, labels
        return images, mixup_target(labels, self.classes, smoothing=self.smoothing)


def soft_labels(model: Any, item: Any, settings: dict[str, Any]) -> SoftLabels | None:
    """As the settings say; None where they leave labels as they are.

    Args:
        model: with `num_classes`.
        item: the first of the data, which stands for all.
        settings: of the run.

    Raises:
        ValueError: where labels are no class numbers, or a batch can't be mixed in pairs.
    """
    asked = {name: settings[name] for name in NAMES if settings[name]}
    if not asked:
        return None
    name = next(iter(asked))
    classes = getattr(model, "num_classes", None)
    label = item[1]
    if classes is None or classes < 2 or not _is_class_number(label):
        remedy = "Leave it out."
        fail("fit", name, "0 for labels that are no class numbers of a model with num_classes", asked[name], remedy)
    if settings["batch_size"] % 2 and ("mixup" in asked or "cutmix" in asked):
        fail("fit", "batch_size", "even, as mixup and cutmix take images in pairs", settings["batch_size"])
    return SoftLabels(classes, *(settings[name] for name in NAMES))


def _is_class_number(label: Any) -> bool:
    is_scalar = getattr(label, "ndim", 0) == 0 and isinstance(label, (numbers.Real, Tensor, np.ndarray))
    return is_scalar and float(label).is_integer()
