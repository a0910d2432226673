"""How the explainer of a trained model is trained: the one recipe that docs/fidelity.md measures.

The command line, the examples and the benchmarks take it from here, and the docs are compared with it.
"""

from __future__ import annotations

from typing import Any

from ..games.mask_cells_cnn import CellRemoval
from ..models.self_explaining import SelfExplainingClassifier

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
    """
    found = TRAINING | (CONVOLUTIONAL if isinstance(model.game, CellRemoval) else {})
    return found if mirrored else found | {"epochs": 2 * found["epochs"]}
