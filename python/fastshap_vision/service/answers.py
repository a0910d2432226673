"""What is answered: an explanation as JSON, or as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..explanations.explanation import Explanation


def as_json(explanation: Explanation, classes: Sequence[str] | None, top: int) -> dict[str, Any]:
    """Of one image and one class: prediction, Shapley values on their grid, and how far to believe them."""
    logits, probabilities = explanation.logits[0].double(), explanation.probabilities[0].double()

    def described(index: int) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index} | ({} if classes is None else {"class": classes[index]})
        return found | {"logit": float(logits[index]), "probability": float(probabilities[index])}

    target, errors = int(explanation.targets()), explanation.standard_error
    expected = explanation.expected_error
    return {
        "predicted": described(int(explanation.predicted)),
        "top": [described(index) for index in logits.topk(min(top, len(logits))).indices.tolist()],
        "explained": described(target),
        "values": explanation.values[0].unflatten(0, explanation.grid).tolist(),
        "null": float(explanation.null[target]),
        "standard_error": None if errors is None else errors[0].unflatten(0, explanation.grid).tolist(),
        "expected_error": None if expected is None else float(expected),
        "grid": list(explanation.grid),
        "seen": list(explanation.seen),
        "unit": explanation.unit,
        "untrained": explanation.untrained,
    }


def as_png(explanation: Explanation, image: Tensor, classes: Sequence[str] | None) -> bytes:
    """The heat map over the image (1, C, H, W), of pixels from 0 to 1."""
    from matplotlib.figure import Figure

    # Not pyplot's figures, which the threads of a process share.
    figure = Figure(figsize=(4.2, 3.6), dpi=150, layout="constrained")
    explanation.plot(image, ax=figure.subplots(), classes=classes)
    written = io.BytesIO()
    figure.savefig(written, format="png")
    return written.getvalue()
