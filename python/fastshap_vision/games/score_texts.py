"""The game of an image tower: v(S) is how well what is left of the image matches each of some texts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastshap_kernels._checks import check_dense, fail

from .._runtime.precision import at_least_float32
from .base import Features, Game, JointPass
from .coalitions import Coalitions

#: ln of the largest scale that can be meant: CLIP's is at most 100, SigLIP's about 118.
_LARGEST_LOG_SCALE = 10.0


class TextScores(nn.Module):
    """score_t(e) = exp(`logit_scale`)·⟨e/‖e‖, t⟩ + `logit_bias`, of embeddings e (…, D) and K texts t: (…, K).

    In float32 at least, outside of autocast: a scale of 100 leaves little of a half-precision cosine.

    Args:
        texts (floating point): (K, D), which are brought to norm 1.
        logit_scale, logit_bias: numbers, or tensors of one.
    """

    texts: Tensor

    def __init__(self, texts: Tensor, logit_scale: Any = 0.0, logit_bias: Any = 0.0) -> None:
        super().__init__()
        self.logit_scale = _checked_number("logit_scale", logit_scale)
        self.logit_bias = _checked_number("logit_bias", logit_bias)
        if self.logit_scale > _LARGEST_LOG_SCALE:
            remedy = f"Of a factor of {self.logit_scale:g}, pass math.log({self.logit_scale:g})."
            fail("convert", "logit_scale", f"a logarithm, {_LARGEST_LOG_SCALE:g} at most", self.logit_scale, remedy)
        self.register_buffer("texts", unit_texts(texts))

    def forward(self, embedding: Tensor) -> Tensor:
        with torch.autocast(embedding.device.type, enabled=False):
            return self.of_unit(functional.normalize(at_least_float32(embedding), dim=-1))

    def of_unit(self, unit: Tensor) -> Tensor:
        """The same of what is normalised already."""
        with torch.autocast(unit.device.type, enabled=False):
            return math.exp(self.logit_scale) * (unit @ self.texts.to(unit.dtype).T) + self.logit_bias

    def weigh(self, weight: Tensor) -> Tensor:
        """Of a linear map to unit embeddings, (D, L), that to the scores, (K, L), without their bias."""
        return math.exp(self.logit_scale) * (self.texts.to(weight.dtype) @ weight)

    @contextmanager
    def replaced(self, texts: Tensor, logit_scale: float, logit_bias: float) -> Iterator[None]:
        """For the while, other texts (K', D) of norm 1."""
        before = self.texts, self.logit_scale, self.logit_bias
        self.texts, self.logit_scale, self.logit_bias = texts, logit_scale, logit_bias
        try:
            yield
        finally:
            self.texts, self.logit_scale, self.logit_bias = before


def unit_texts(texts: object, op: str = "convert", like: Tensor | None = None) -> Tensor:
    """Texts (K, D) of norm 1, in float32 at least; as wide as others, in their dtype and on their device, if given.

    Raises:
        ValueError: for another shape, or a text that is 0, infinite or NaN.
    """
    width = "D" if like is None else str(like.shape[-1])
    expected = f"floating-point text features (K, {width}), K at least 1"
    features = check_dense(op, "texts", texts, expected, "Pass what the text tower makes of the texts.")
    if features.ndim != 2 or not features.numel() or not features.is_floating_point():
        fail(op, "texts", expected, features)
    if like is not None and features.shape[1] != like.shape[1]:
        fail(op, "texts", expected, features, "Pass the features of the text tower that belongs to this image tower.")
    features = at_least_float32(features.detach())
    if not bool((features.norm(dim=1).isfinite() & features.any(1)).all()):
        fail(op, "texts", "finite, and no text 0", "one that is 0, infinite or NaN", "Leave that text out.")
    features = functional.normalize(features, dim=1)
    return features if like is None else features.to(like)


def _checked_number(argument: str, value: object) -> float:
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(number, Real) or isinstance(number, bool) or not math.isfinite(number):
        fail("convert", argument, "a finite number", value)
    return float(number)


class TextGame:
    """v_x(S) = the scores of the K texts for the image embedding of S, normalised: a game of an embedding's game.

    Scores are linear in the unit embedding, so that their Shapley values are those of the unit embedding times the
    texts, whatever the texts.

    Args:
        embedding: the game of the image tower, whose outputs are the embedding (D).
        scores: of that embedding.
    """

    patches_vote = False
    is_exact_conversion = True

    def __init__(self, embedding: Game, scores: TextScores) -> None:
        self.embedding: Any = embedding
        self.scores = scores
        self.backbone: Any = embedding.backbone
        self.grid, self.players, self.view = embedding.grid, embedding.players, embedding.view
        self.input_size, self.feature_width = embedding.input_size, embedding.feature_width
        self.prefix: int = getattr(embedding, "prefix", 0)

    @property
    def intermediate_widths(self) -> list[int]:
        return self.embedding.intermediate_widths

    @intermediate_widths.setter
    def intermediate_widths(self, widths: list[int]) -> None:
        self.embedding.intermediate_widths = widths

    @property
    def packs(self) -> bool:
        return self.embedding.packs

    def features_and_logits(self, images: Tensor) -> tuple[Features, Tensor]:
        features, embedding = self.embedding.features_and_logits(images)
        return features, self.scores(embedding)

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor:
        """v(S) of every coalition: (B, M, K)."""
        return self.scores(self.embedding.values(images, coalitions))

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass:
        """Full images and coalitions in one batch."""
        found: JointPass = self.embedding.joint(images, coalitions)
        null = None if found.null is None else self.scores(found.null)
        return JointPass(found.features, self.scores(found.logits), self.scores(found.values), null)

    def null(self) -> Tensor:
        """v(∅): (K,)."""
        return self.scores(self.embedding.null())

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(K, L), without the norm: nothing but its shape is read, since patches do not vote."""
        return self.scores.weigh(self.embedding.vote_weight()[0]), None

    def explanation_block(self, width: int) -> nn.Module:
        return self.embedding.explanation_block(width)
