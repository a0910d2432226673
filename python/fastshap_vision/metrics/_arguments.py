"""What the metrics ask of a game, and the arguments that they share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from fastshap_kernels import pack_bits
from fastshap_kernels._checks import check_dense, check_tensor, fail

from .._checks import check_classes, check_finite, check_game, check_images, check_values
from .._modes import evaluating
from .._runtime.precision import at_least_float32


class Game(Protocol):
    """The game v_x(S): a `SelfExplainingClassifier`, a `FastSHAPExplainer`, a `MaskedImageGame`, or anything like them.

    Its attribute `link` says what v is: "logit" (also where it has none), "probability" or "log_probability".
    """

    @property
    def players(self) -> int: ...

    def coalition_values(self, images: Tensor, bits: Tensor) -> Tensor: ...


def values_with_full(op: str, game: Game, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """v(N) (B, K) and v(S) (B, M, K) of coalitions bool (B, M, P): in evaluation mode, without gradients."""
    present = torch.cat([torch.ones_like(present[:, :1]), present], 1)
    with evaluating(game):
        values = game.coalition_values(images, pack_bits(present))
    check_values(op, values, *present.shape[:2])
    check_finite(op, "v(S)", values)
    values = at_least_float32(values)
    return values[:, 0], values[:, 1:]


def check_attributions(op: str, game: Game, images: Tensor, attributions: Tensor) -> Tensor:
    """Attributions float64 (B, P) on the images' device."""
    players = check_game(op, "game", game, "coalition_values")
    check_images(op, images)
    shape = f"(B, P) = ({len(images)}, {players})"
    if check_dense(op, "attributions", attributions, shape).shape != (len(images), players):
        fail(
            op, "attributions", f"{shape}, of one class per image", attributions, "Take explanation.values_for(target)."
        )
    check_tensor(op, "attributions", attributions, shape, 2)
    if attributions.is_meta or not attributions.isfinite().all():
        got = attributions if attributions.is_meta else "one with NaN or infinite values"
        fail(op, "attributions", f"finite {shape}", got, "An explanation that is not finite ranks nothing.")
    return attributions.detach().to(images.device).double()


def choose_target(op: str, argument: str, target: int | Tensor | None, full: Tensor) -> Tensor:
    """int64 (B,): the class per image that `target` means; None for the predicted one of logits `full` (B, K)."""
    if target is None:
        return full.argmax(1)
    batch, classes = full.shape
    return check_classes(op, argument, target, batch, classes, "None, ").to(full.device)
