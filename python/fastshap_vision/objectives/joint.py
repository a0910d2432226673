"""The training objective: the task, the Shapley regression and the task on masked images."""

from __future__ import annotations

import numbers
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import check_count, check_number, fail

from .._checks import check_choice
from .._modes import evaluating
from .._runtime.precision import PRECISIONS
from ..games.base import JointPass
from ..games.coalitions import Coalitions
from ..models.self_explaining import SelfExplainingClassifier
from .base import ObjectiveTerms, even_split_error, explained_share, in_unit, variance_of
from .sampling import CoalitionObjective, values_of_step
from .task import TaskLoss, TaskObjective, label_classes_of, without_shares

TARGETS = ("detached", "live")
ERRORS = ("uniform", "variance", "raw")


class JointObjective(CoalitionObjective):
    """task(f(x), y) + λ · R + μ · task(f(x_S), y), with one joint forward pass a step.

    R = mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², divided by what `error` says. No (B, P, K) tensor exists.
    Classifier and explainer train together; `ExplainerObjective` trains the explainer of a classifier that stays as it
    is. docs/fidelity.md compares both, and the settings here.

    Args:
        coalitions: M, coalitions per image and step; drawn anew each step.
        regression_weight: λ. It matters where the regression's gradient reaches the encoder (the model's
            `backbone_gradient`), and for optimisers that follow the gradient's size.
        masked_task_weight: μ. With 0 there is no task on masked images, and no gradient flows back through v(S): it is
            evaluated as the trained model will be, and a step is cheaper.
        error: unit of R: "uniform", what the even split (f − v(∅))/P leaves; "variance", the variance of v(S) over
            the batch; "raw", none. The divisor is detached. Where it is no more than the values' rounding, as in a
            game that is constant, there is none either.
        target: "detached", v(S) is a fixed target of R; "live", R's gradient also moves v(S).
        paired: coalitions come as complements, which lowers the variance and keeps shapes static.
        sizes: "shapley" for the Shapley kernel, or "uniform".
        top_classes: how many classes of each image are regressed, those with the largest logits; None for all K.
        regression_ramp: λ is 0 up to the first share of the training and rises linearly to full at the second. A λ
            that is full from the start can collapse the game: v hardly varies, and nothing is left to explain.
        masked_task_ramp: the same for μ.
        target_precision: of v(S) where no gradient flows back through it (a detached target, and μ = 0): "auto",
            bfloat16 autocast for a float32 model on a GPU, else "same", the task's own; "bf16"; "fp8", 8-bit products
            in a transformer's blocks; see `_runtime.precision.lowered`. With μ > 0 or a live target, v(S) and the task
            are one pass, of one precision.
        task_loss: (logits, labels) → scalar; default cross-entropy. Labels are repeated for masked images.
        seed: of the sampler.

    Deterministic: yes, for one seed and sequence of calls. `state_dict` holds the sampler's counter.

    Source: Fan, Yang, Ma, AAAI 2026, arXiv 2512.14354; the regression: Jethani et al., FastSHAP, ICLR 2022.

    Example:
        >>> terms = fv.JointObjective()(model, images, labels, progress=0.25)  # λ has risen to a half
        >>> torch.allclose(terms.loss, terms.task + 0.5 * terms.regression)
        True
    """

    def __init__(
        self,
        coalitions: int = 8,
        regression_weight: float = 1.0,
        masked_task_weight: float = 0.0,
        *,
        error: str = "uniform",
        target: str = "detached",
        paired: bool = True,
        sizes: str = "shapley",
        top_classes: int | None = None,
        regression_ramp: tuple[float, float] = (0.0, 0.5),
        masked_task_ramp: tuple[float, float] = (0.0, 0.0),
        target_precision: str = "auto",
        task_loss: TaskLoss | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("error", error, ERRORS)
        check_choice("target", target, TARGETS)
        check_choice("target_precision", target_precision, PRECISIONS)
        super().__init__(coalitions, paired=paired, sizes=sizes, seed=seed)
        regression_weight = check_number("JointObjective", "regression_weight", regression_weight, 0)
        masked_task_weight = check_number("JointObjective", "masked_task_weight", masked_task_weight, 0)
        if top_classes is not None:
            top_classes = check_count(
                "JointObjective", "top_classes", top_classes, 1, 2**31 - 1, "Pass None for all classes."
            )
        for name, ramp in (("regression_ramp", regression_ramp), ("masked_task_ramp", masked_task_ramp)):
            ends = ramp if isinstance(ramp, (tuple, list)) and len(ramp) == 2 else (None, None)
            if not all(isinstance(end, numbers.Real) for end in ends) or not 0.0 <= ends[0] <= ends[1] <= 1.0:
                fail("JointObjective", name, "(start, end), 0 ≤ start ≤ end ≤ 1", ramp)
        self.regression_weight = regression_weight
        self.masked_task_weight = masked_task_weight
        self.regression_ramp = regression_ramp
        self.masked_task_ramp = masked_task_ramp
        self.error, self.target, self.top_classes = error, target, top_classes
        self.target_precision = target_precision
        self.task_loss = task_loss or nn.functional.cross_entropy
        self._without_coalitions = TaskObjective(task_loss)

    # A compiled step is one call of `terms`, with everything that changes from step to step among its arguments.
    def __call__(
        self, model: SelfExplainingClassifier, images: Tensor, labels: Tensor, *, progress: float = 1.0
    ) -> ObjectiveTerms:
        """The loss of one batch: images (B, C, H, W), labels as `task_loss` takes them, first dimension B.

        `progress`, the share of the training that is done, in [0, 1], is for the ramps; at 1 λ and μ are full.
        """
        regression_weight = self.regression_weight * _rise(self.regression_ramp, progress)
        masked_task_weight = self.masked_task_weight * _rise(self.masked_task_ramp, progress)
        if regression_weight == masked_task_weight == 0:
            return self._without_coalitions(model, images, labels)
        coalitions = self.draw(model, images)
        # In tensors: a compiled step would be compiled anew for each number.
        weights = [torch.full((), weight, device=images.device) for weight in (regression_weight, masked_task_weight)]
        masked = weights[1] if masked_task_weight else None
        return (self._compiled or self.terms)(model, images, labels, coalitions, weights[0], masked)

    def terms(
        self,
        model: SelfExplainingClassifier,
        images: Tensor,
        labels: Tensor,
        coalitions: Coalitions,
        regression_weight: Tensor | float,
        masked_task_weight: Tensor | float | None,
    ) -> ObjectiveTerms:
        """The loss of one batch and given coalitions: a pure function, which `torch.compile` takes whole.

        Args:
            model: whose coalitions are evaluated.
            images, labels: as in a call of the objective.
            coalitions: of every image.
            regression_weight: λ; a tensor where it changes from step to step, so that nothing is compiled anew.
            masked_task_weight: μ, likewise; None for no task on masked images.

        Returns:
            the terms of the loss.
        """
        features, logits, values, null = self._forward(model, images, coalitions, masked_task_weight is not None)
        if null is None:
            null = self._null(model)
        elif self.target != "live":
            null = null.detach()
        target_values = values if self.target == "live" else values.detach()
        classes = None
        if self.top_classes is not None:
            classes = logits.detach().topk(min(self.top_classes, logits.shape[1]), 1).indices
        residual = model.regression_loss(features, logits, coalitions, target_values, null, classes)
        regressed = values.detach()
        if classes is not None:
            regressed = regressed.gather(2, classes.unsqueeze(1).expand(-1, values.shape[1], -1))
        variance = variance_of(regressed)
        regression = residual
        if self.error == "variance":
            regression = in_unit(residual, variance, regressed)
        elif self.error == "uniform":
            even = self._even_split_error(regressed, logits.detach(), null.detach(), coalitions, classes)
            regression = in_unit(residual, even, regressed)
        task = self.task_loss(logits, labels)
        loss = task + regression_weight * regression
        masked_task = None
        if masked_task_weight is not None:
            masked_task = self.task_loss(values.flatten(0, 1), labels.repeat_interleave(coalitions.count, 0))
            loss = loss + masked_task_weight * masked_task
            masked_task = masked_task.detach()
        explained = explained_share(residual.detach(), regressed)
        return ObjectiveTerms(loss, task.detach(), regression.detach(), masked_task, explained, variance.sqrt())

    def compile(self, **options: Any) -> None:
        """Compiles the step in place, as `nn.Module.compile` does; `options` are those of `torch.compile`.

        New coalitions and weights compile nothing anew. A step without coalitions, one without the masked task and
        one with it are compiled apart, and unpaired coalitions once for each size that they are padded to.
        """
        self._without_coalitions.compile(**options)
        super().compile(**options)

    def trained(self, model: Any) -> Iterable[nn.Parameter]:
        """All, but for the shares where λ is 0."""
        return model.parameters() if self.regression_weight else without_shares(model)

    def label_classes(self, model: Any) -> int | None:
        """K, for cross-entropy."""
        return label_classes_of(self.task_loss, model)

    def _forward(
        self, model: SelfExplainingClassifier, images: Tensor, coalitions: Coalitions, masked_task: bool
    ) -> JointPass:
        if self.target == "live" or masked_task:
            return model.joint(images, coalitions)
        # Nothing flows back through v(S): its activations need not be kept, and less precision will do. It is the game
        # of the trained model: without dropout, and no batch norm's running statistics count masked images.
        with evaluating(model):
            values = values_of_step(model, images, coalitions, self.target_precision)
            null = model.null_value()
        features, logits = model.game.features_and_logits(images)
        return JointPass(features, logits, values.to(logits.dtype), null)

    def _null(self, model: SelfExplainingClassifier) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.target == "live"):
            return model.null_value()

    def _even_split_error(
        self, values: Tensor, logits: Tensor, null: Tensor, coalitions: Coalitions, classes: Tensor | None
    ) -> Tensor:
        """What the even split leaves of the values, (B, M, k), which are of `classes`, int64 (B, k), or of all."""
        if classes is not None:
            logits, null = logits.gather(1, classes), null[classes].unsqueeze(1)
        return even_split_error(values, logits, null, coalitions)


def _rise(ramp: tuple[float, float], progress: float) -> float:
    """Share of a weight in force at a share of the training."""
    start, end = ramp
    if progress >= end:
        return 1.0
    if progress <= start:
        return 0.0
    return (progress - start) / (end - start)
