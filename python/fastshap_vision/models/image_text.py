"""An image tower that explains its scores of texts: zero-shot classifiers, retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from .._runtime.precision import at_least_float32
from ..explanations.explanation import Explanation
from ..games.coalitions import Coalitions
from ..games.score_texts import TextGame, TextScores, unit_texts
from ..images.preprocessing import Preprocessing
from .file import Header
from .head import SharesHead, linear_of
from .input import chosen_classes
from .null import KeptNull
from .refine import Calibration, calibration_of
from .self_explaining import SelfExplainingClassifier

if TYPE_CHECKING:
    from typing_extensions import Self


class ImageTextClassifier(SelfExplainingClassifier):
    """An image tower whose K outputs are its scores of texts, which may be others at every call.

    score_t(x) = exp(`logit_scale`)·⟨e(x)/‖e(x)‖, t⟩ + `logit_bias`, and Σ_p Φ_p = score(x) − score(∅).

    The game is that of the *unit* embedding: each coalition's embedding is normalised before anything is averaged. A
    score is linear in it, so the Shapley values of a text's score are those of the unit embedding, (B, P, D), times
    the text: exactly, for every text. The explainer predicts them, and a new text costs a dot product. What is
    approximate is the explainer alone, as for any classifier; the L2 norm is part of the game and adds nothing. (An
    explanation of the embedding before its norm would be another game's: its sum is e(x) − e(∅), which no factor
    turns into a difference of cosines.) What the explainer leaves of e(x)/‖e(x)‖ − e(∅)/‖e(∅)‖ is shared evenly by the
    patches, so values add up for every text too.

    Trained on its texts (`train_explainer`), it explains these best. To explain any, train it on
    `texts=torch.eye(D)`, the dimensions of the embedding themselves, and set `texts` afterwards.

    Args:
        model_name: a timm model name.
        num_classes: D, the width of the embedding.
        texts: (K, D), what the text tower makes of the texts; normalised here. They are saved with the model.
        logit_scale: the *logarithm* of the scale, as CLIP's and SigLIP's parameter of that name. Default 0: the score
            is the cosine.
        logit_bias: SigLIP's parameter of that name; CLIP has none.
        img_size, head_depth, head_width, intermediates, backbone_gradient, removal, pretrained, model_kwargs,
        preprocessing, calibration, backbone: as in `SelfExplainingClassifier`.

    Attributes:
        texts: (K, D), normalised; may be set. Error bars are those of the texts that were calibrated, and go with
            them: call `calibrate` again.

    Raises:
        UnsupportedModelError: for a tower that has no game.
        ValueError: for texts of another width than the embedding, or a scale that can't be a logarithm.

    Source: Radford et al., CLIP (2021); Zhai et al., SigLIP (2023): the scores.

    Example:
        >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
        >>> model = fv.convert(tower, texts=torch.randn(3, 16), logit_scale=2.0)
        >>> model.explain(images, target="all", texts=torch.randn(2, 16)).values.shape
        torch.Size([4, 9, 2])
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int,
        *,
        texts: Tensor,
        logit_scale: float | Tensor = 0.0,
        logit_bias: float | Tensor = 0.0,
        img_size: int | tuple[int, int] | None = None,
        head_depth: int = 1,
        head_width: int | None = None,
        intermediates: bool = False,
        backbone_gradient: float | None = None,
        removal: str | None = None,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | Preprocessing | None = None,
        calibration: dict[str, Any] | Calibration | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__(
            model_name,
            num_classes,
            img_size=img_size,
            base="even",
            head_depth=head_depth,
            head_width=head_width,
            intermediates=intermediates,
            backbone_gradient=backbone_gradient,
            removal=removal,
            pretrained=pretrained,
            model_kwargs=model_kwargs,
            preprocessing=preprocessing,
            backbone=backbone,
        )
        embedding, made = self.game, cast(SharesHead, self.head)
        self.scores = TextScores(texts, logit_scale, logit_bias)
        self._hub_mixin_config |= {"logit_scale": self.scores.logit_scale, "logit_bias": self.scores.logit_bias}
        self.game = TextGame(embedding, self.scores)
        width = made.explainer.width
        self.head = TextShares(self.game, self.num_classes, "even", head_depth, width, made.backbone_gradient)
        self._null = KeptNull(embedding)  # the embedding of nothing, whatever the texts
        self.texts = texts
        self.calibration = calibration_of(calibration)

    @property
    def texts(self) -> Tensor:
        return self.scores.texts

    @texts.setter
    def texts(self, texts: Tensor) -> None:
        self.scores.texts = self._checked(texts, "texts")
        self.num_classes = len(self.scores.texts)
        self.calibration = None

    def _checked(self, texts: object, op: str) -> Tensor:
        """Texts of norm 1, as wide as the embedding, where the model is and of its precision (float32 at least)."""
        weight = self.game.embedding.vote_weight()[0]  # type: ignore[attr-defined]
        return unit_texts(texts, op, at_least_float32(weight.detach().mT[:1]))

    @contextmanager
    def _scoring(self, op: str, texts: Tensor | None) -> Iterator[None]:
        """For the while, with other texts, if they are given, and without error bars, which are its own texts'."""
        if texts is None:
            yield
            return
        with self._replaced(self._checked(texts, op), self.scores.logit_scale, self.scores.logit_bias):
            yield

    @contextmanager
    def _replaced(self, texts: Tensor, logit_scale: float, logit_bias: float) -> Iterator[None]:
        before = self.num_classes, self._calibration
        self.num_classes, self._calibration = len(texts), None
        try:
            with self.scores.replaced(texts, logit_scale, logit_bias):
                yield
        finally:
            self.num_classes, self._calibration = before

    def null_value(self) -> Tensor:
        """score(∅): (K,). In evaluation the embedding of nothing is kept from one call to the next."""
        return self.scores(self._null())

    def forward(self, images: Tensor, texts: Tensor | None = None) -> Tensor:
        """Scores (B, K) of images (B, C, H, W)."""
        if texts is None:
            return self.scores(super().forward(images))
        with self._scoring("forward", texts):
            return self.scores(super().forward(images))

    def shapley_values(self, images: Tensor, texts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Shapley values (B, P, K) of every patch and text, and scores (B, K), from one forward pass.

        Example:
            >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
            >>> values, scores = fv.convert(tower, texts=torch.randn(3, 16)).shapley_values(images)
            >>> values.shape, scores.shape
            (torch.Size([4, 9, 3]), torch.Size([4, 3]))
        """
        with self._scoring("shapley_values", texts):
            return super().shapley_values(images)

    @torch.no_grad()
    def explain(
        self,
        images: Any,
        target: int | Sequence[int] | Tensor | str | None = None,
        *,
        texts: Tensor | None = None,
        evaluations: int = 0,
        seed: int = 0,
    ) -> Explanation:
        """As `SelfExplainingClassifier.explain`: the classes are the texts, or others for this one call.

        Args:
            images, target, evaluations, seed: as there.
            texts: (K, D); None for the model's own. Others have no error bars, and are not refined.

        Example:
            >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
            >>> model = fv.convert(tower, texts=torch.randn(3, 16))
            >>> model.explain(images, target=0, texts=torch.randn(1, 16)).values.shape
            torch.Size([4, 9])
        """
        with self._scoring("explain", texts):
            return super().explain(images, target, evaluations=evaluations, seed=seed)

    def coalition_values(
        self,
        images: Tensor,
        coalitions: Coalitions | Tensor,
        *,
        texts: Tensor | None = None,
        max_rows: int | str = "auto",
        precision: str = "same",
        progress: bool = False,
    ) -> Tensor:
        """As `SelfExplainingClassifier.coalition_values`, of the texts, or of others (K, D) for this one call.

        Example:
            >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
            >>> model = fv.convert(tower, texts=torch.randn(3, 16))
            >>> model.coalition_values(images, fk.sample_coalitions(4, 2, model.players, seed=0)).shape
            torch.Size([4, 2, 3])
        """
        with self._scoring("coalition_values", texts):
            options: dict[str, Any] = {"max_rows": max_rows, "precision": precision, "progress": progress}
            return super().coalition_values(images, coalitions, **options)

    @torch.no_grad()
    def explain_embedding(self, images: Any) -> EmbeddingExplanation:
        """Explains the unit embedding, once for every text: `.of(texts)` is then a dot product.

        Args:
            images: as in `explain`.

        Example:
            >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
            >>> explained = fv.convert(tower, texts=torch.randn(3, 16)).explain_embedding(images)
            >>> explained.values.shape, explained.of(torch.randn(1000, 16)).values.shape
            (torch.Size([4, 9, 16]), torch.Size([4, 9]))
        """
        with self._replaced(torch.eye(self.texts.shape[1]).to(self.texts), 0.0, 0.0):
            found = super().explain(images, "all")
        return EmbeddingExplanation(found, self.scores.logit_scale, self.scores.logit_bias)

    @classmethod
    def _build(cls, arguments: dict[str, Any], header: Header) -> Self:
        if arguments.get("texts") is not None:
            raise ValueError("`texts` are saved with the model. Load it, and then set `model.texts`")
        shape = header.shapes.get("scores.texts", (0, 0))
        return super()._build({**arguments, "texts": torch.ones(shape)}, header)


class TextShares(SharesHead):
    """The shares of the unit embedding, Φ (B, P, D), times the texts, and then an even part of what they leave."""

    def _weight(self) -> Tensor:
        """(K, width): one row a text."""
        game: Any = self.game
        return game.scores.weigh(super()._weight())

    def _shares_of(self, explained: Tensor, target: Tensor | None) -> Tensor:
        return linear_of(explained, self._weight().to(explained.dtype), None, target)


@dataclass(eq=False)
class EmbeddingExplanation:
    """Shapley values of an image's unit embedding, from which those of any text's score follow.

    Args:
        explanation: of the unit embedding's D dimensions, as if each were a class.
        logit_scale, logit_bias: of the scores; the scale as its logarithm.

    Example:
        >>> tower = timm.create_model("test_vit", num_classes=16, img_size=48)
        >>> model, texts = fv.convert(tower, texts=torch.randn(3, 16)), torch.randn(5, 16)
        >>> found, expected = model.explain_embedding(images).of(texts, 2), model.explain(images, 2, texts=texts)
        >>> torch.allclose(found.values, expected.values, atol=1e-5)
        True
    """

    explanation: Explanation
    logit_scale: float
    logit_bias: float

    @property
    def values(self) -> Tensor:
        """(B, P, D): their sum over P is e(x)/‖e(x)‖ − e(∅)/‖e(∅)‖."""
        return self.explanation.values

    def of(self, texts: Tensor, target: int | Sequence[int] | Tensor | str | None = None) -> Explanation:
        """The explanation of the scores of K texts, by a dot product.

        Args:
            texts: (K, D).
            target: as in `ImageTextClassifier.explain`.

        Returns:
            what `explain(images, target, texts=texts)` gives.
        """
        found = self.explanation
        like = at_least_float32(found.logits)
        scores = TextScores(unit_texts(texts, "of", like), self.logit_scale, self.logit_bias)
        logits, null = (scores.of_unit(at_least_float32(part)) for part in (found.logits, found.null))
        chosen = chosen_classes("of", target, logits)
        weight = scores.weigh(torch.eye(like.shape[1]).to(like))
        values = linear_of(found.values, weight.to(found.values.dtype), None, chosen)
        return replace(found, values=values, logits=logits, null=null, target=chosen)
