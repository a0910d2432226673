"""Explanations in the shapes that captum and shap users know; neither package is needed to import this one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from fastshap_kernels._checks import check_tensor, fail

from .pixels import spread


class _Explains(Protocol):
    """What an adapter asks of a model: `explain`, as `SelfExplainingClassifier` has it."""

    def explain(self, images: Tensor, target: Any = None) -> Any: ...


class Attribution:
    """A model's own Shapley values behind captum's `attribute(inputs, baselines, target)`.

    Args:
        model: a `SelfExplainingClassifier`, or anything with its `explain`.

    Example:
        >>> fv.Attribution(model).attribute(images, target=3).shape
        torch.Size([4, 3, 48, 48])
    """

    def __init__(self, model: _Explains) -> None:
        self.model = model

    def attribute(
        self,
        inputs: Any,
        baselines: tuple[None] | None = None,
        target: int | Sequence[int] | Tensor | None = None,
    ) -> Any:
        """Attributes the logit of one class per image to its pixels.

        The Shapley value of a patch is spread evenly over its pixels and channels,
        out[b, c, y, x] = φ_b,p / (C · H/h · W/w), so that summed over the pixels and channels of patch p it is φ_b,p
        again, and summed over the image it is the logit minus its value with no patch present. Pixels that the model
        does not see, right of and below the last whole patches, get 0.

        Args:
            inputs (floating point): (B, C, H, W) images; or a tuple of one such tensor, as captum passes it.
            baselines: None. What stands in for an absent patch was settled when the model was trained.
            target: a class, or B classes; None for each image's predicted class.

        Returns:
            (B, C, H, W), float32 at least, without gradient; a tuple of it where `inputs` is one.

        Raises:
            ValueError: for baselines, or for images that the grid does not divide.

        Example:
            >>> pixels = fv.Attribution(model).attribute(images)
            >>> torch.allclose(pixels.sum((1, 2, 3)), model.explain(images).values.sum(1), atol=1e-5)
            True
        """
        if isinstance(inputs, tuple | list):
            if len(inputs) != 1 or not isinstance(inputs[0], Tensor):
                fail("Attribution.attribute", "inputs", "a tensor (B, C, H, W), or a tuple of one", type(inputs))
            baselines = baselines[0] if isinstance(baselines, tuple) and len(baselines) == 1 else baselines
            return (self.attribute(inputs[0], baselines, target),)
        check_tensor("Attribution.attribute", "inputs", inputs, "(B, C, H, W)", 4)
        if baselines is not None:
            remedy = "Choose what absence means when the model is made and trained (its removal and baseline)."
            got = baselines if isinstance(baselines, Tensor | int | float) else type(baselines)
            fail("Attribution.attribute", "baselines", "None", got, remedy)
        explanation = self.model.explain(inputs, target)
        return spread(explanation.values_for().detach(), inputs, explanation.grid, explanation.seen)
