"""Metrics of explanations: batched, on the device of the images, from the values v(S) of any game.

Attributions are (B, P), of one class per image. A game is a `SelfExplainingClassifier`, which removes patches in its
own way, or a `MaskedImageGame`, of any classifier, by replacing pixels.

Elsewhere: how close values are to the true Shapley values, `fastshap_vision.fidelity`; how far they are from adding up
to the logits, `Explanation.efficiency_gap`.
"""

from ..games.masked_image import MaskedImageGame
from .localization import Segmentation, pointing_game, segmentation
from .protocols import protocol_scores
from .removal import (
    RemovalCurve,
    aopc,
    deletion,
    insertion,
    log_odds,
    perturbation_test,
    removal_curve,
)
from .score import Score
from .sensitivity import SensitivityN, sensitivity_n

__all__ = [
    "MaskedImageGame",
    "RemovalCurve",
    "Score",
    "Segmentation",
    "SensitivityN",
    "aopc",
    "deletion",
    "insertion",
    "log_odds",
    "perturbation_test",
    "pointing_game",
    "protocol_scores",
    "removal_curve",
    "segmentation",
    "sensitivity_n",
]
