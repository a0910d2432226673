"""What the metrics ask of a game, and the arguments that they share."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, nn

from fastshap_kernels import pack_bits
from fastshap_kernels._checks import fail

from .._checks import check_classes
from ..fidelity import check_images, evaluating


class Game(Protocol):
    """The game v_x(S): a `SelfExplainingClassifier`, an `AmortizedExplainer`, a `PixelGame`, or anything like them.

    Its attribute `link` says what v is: "logit" (also where it has none), "probability" or "log_probability".
    """

    @property
    def players(self) -> int: ...

    def coalition_values(self, images: Tensor, bits: Tensor) -> Tensor: ...


def values_with_full(op: str, game: Game, images: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    """v(N) (B, K) and v(S) (B, M, K) of coalitions bool (B, M, P): in evaluation mode, without gradients."""
    present = torch.cat([torch.ones_like(present[:, :1]), present], 1)
    mode: AbstractContextManager = evaluating(game) if isinstance(game, nn.Module) else torch.no_grad()
    with mode:
        values = game.coalition_values(images, pack_bits(present))
    if not values.isfinite().all():
        raise ValueError(f"{op}: the game's values are not all finite. Check the model's weights and the images.")
    values = values if values.dtype == torch.float64 else values.float()
    return values[:, 0], values[:, 1:]


def check_attributions(op: str, game: Game, images: Tensor, attributions: Tensor) -> Tensor:
    """Attributions float64 (B, P) on the images' device."""
    check_images(op, images)
    expected = f"finite floating-point (B, P) = ({len(images)}, {game.players}), one class per image"
    if not isinstance(attributions, Tensor) or not attributions.is_floating_point():
        fail(op, "attributions", expected, attributions)
    if attributions.shape != (len(images), game.players):
        fail(op, "attributions", expected, attributions, "Take explanation.values_for(target).")
    if not attributions.isfinite().all():
        fail(op, "attributions", expected, "one with NaN or infinite values")
    return attributions.detach().to(images.device).double()


def choose_target(op: str, argument: str, target: int | Tensor | None, full: Tensor) -> Tensor:
    """int64 (B,): the class per image that `target` means; None for the predicted one of logits `full` (B, K)."""
    if target is None:
        return full.argmax(1)
    batch, classes = full.shape
    return check_classes(op, argument, target, batch, classes, "None, ").to(full.device)
