"""A model of images and texts, of transformers or open_clip, that says why they match."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import check_count, fail

from .._checks import check_choice
from .._modes import evaluation_mode
from ..estimators.base import ReferenceValues
from ..estimators.exact import exact_values
from ..estimators.kernel_shap import kernel_shap_values
from ..games.base import Game, UnsupportedModelError
from ..games.coalitions import Coalitions
from ..games.factory import make_game
from ..games.masked_image import MaskedImageGame
from ..games.score_texts import TextScores
from ..images.batch import as_batch
from ..images.preprocessing import Preprocessing
from ..models.backbone import preprocessing_of
from ..models.convert import convert
from ..models.image_text import ImageTextClassifier
from ..models.input import check_images
from ..streaming.stream import stream
from .explanation import PairExplanation
from .image_towers import as_timm
from .pair_game import PairGame
from .text_towers import TextTower

PLAYERS = ("image", "text", "both")
_CELLS = (7, 8, 6, 5, 4, 3, 2)


class ImageTextModel(nn.Module):
    """CLIP or SigLIP of transformers or open_clip, with its tokenizer: what it scores, and why.

    The image tower becomes timm's vision transformer with a copy of its weights, where that computes the same (CLIP's
    and SigLIP's do; it is compared): absent patches then leave the sequence. Other towers see the image with absent
    patches' pixels at 0, the mean colour. Absent words leave the attention of the text tower, and keep their place.

    Args:
        model: transformers' CLIPModel or SiglipModel, or what open_clip.create_model gives; from the Hub or from a
            folder.
        tokenizer: that belongs to it, such as AutoTokenizer.from_pretrained(…) or open_clip.get_tokenizer(…).
        grid: (h, w), the players of an image, for towers that are none of timm's; 7 × 7 where that divides the image.
        preprocessing: how pictures become inputs; default timm's for such a tower.

    Attributes:
        tower: timm's, in evaluation mode, or None.
        grid: (h, w) of the players of an image.

    Raises:
        TypeError: for a model of another kind.

    Example:
        >>> import open_clip
        >>> vision = {"image_size": 48, "patch_size": 16, "width": 64, "layers": 1}
        >>> text = {"context_length": 8, "width": 32, "heads": 2, "layers": 1}
        >>> clip = open_clip.CLIP(16, vision, text)  # or open_clip.create_model("ViT-B-16", pretrained="openai")
        >>> model = fv.ImageTextModel(clip, open_clip.SimpleTokenizer(context_length=8))
        >>> model(images, ["a dog", "a cat"]).shape
        torch.Size([4, 2])
        >>> found = model.explain_pair(images[:1], ["a dog"], players="both")
        >>> found.image.shape, found.words, found.efficiency_gap() < 1e-4
        (torch.Size([1, 9]), [['a', 'dog']], True)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        grid: tuple[int, int] | None = None,
        preprocessing: dict[str, Any] | Preprocessing | None = None,
    ) -> None:
        super().__init__()
        is_known = hasattr(model, "logit_scale") and (
            all(hasattr(model, name) for name in ("vision_model", "text_model", "get_text_features"))
            or all(hasattr(model, name) for name in ("visual", "encode_image", "encode_text"))
        )
        if not isinstance(model, nn.Module) or not is_known:
            expected = "a CLIPModel or SiglipModel of transformers, or a model of open_clip"
            remedy = "Of an image tower alone, pass fv.convert(tower, texts=…) the features of the texts."
            fail("ImageTextModel", "model", expected, type(model), remedy)
        self.model = model
        self.text_tower = TextTower(model, tokenizer)
        self.input_size = _input_size(model)
        noise = torch.randn(2, *self.input_size, generator=torch.Generator().manual_seed(0))
        self.tower: nn.Module | None
        self._refusal: UnsupportedModelError | None = None
        try:
            self.tower = as_timm(model, self._embed, noise.to(next(model.parameters())))
            self._game: Game | MaskedImageGame = make_game(self.tower, False, self.input_size, None)[0]
        except UnsupportedModelError as error:
            self.tower, self._refusal = None, error
            self._game = MaskedImageGame(self._embed, _cells(self.input_size) if grid is None else grid)
        self.grid = self._game.grid
        is_unknown = self.tower is None and preprocessing is None
        self.preprocessing = None if is_unknown else preprocessing_of(self.tower, self.input_size, preprocessing)

    @property
    def logit_scale(self) -> float:
        """The logarithm of the scale."""
        return float(cast(Tensor, self.model.logit_scale).detach())

    @property
    def logit_bias(self) -> float:
        """Of the score; 0 where the model has none."""
        bias: Tensor | None = getattr(self.model, "logit_bias", None)
        return 0.0 if bias is None else float(bias.detach())

    def _embed(self, images: Tensor) -> Tensor:
        """What the model makes of images, (B, D)."""
        model: Any = self.model
        if hasattr(model, "encode_image"):
            return model.encode_image(images)
        found = model.get_image_features(pixel_values=images)
        return found if isinstance(found, Tensor) else found.pooler_output

    def _embed_coalitions(self, image: Tensor, coalitions: Coalitions) -> Tensor:
        if isinstance(self._game, MaskedImageGame):
            return self._game.coalition_values(image, coalitions)
        return stream(self._game, image, coalitions, "auto", False)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """What the text tower makes of K texts: (K, D), not normalised, in evaluation mode."""
        tokens = self.text_tower.tokens("encode_texts", texts)
        with evaluation_mode(self):
            return self.text_tower.encode(tokens.ids)

    @torch.no_grad()
    def forward(self, images: Any, texts: Sequence[str]) -> Tensor:
        """The model's scores (B, K) of images and texts, in evaluation mode."""
        scores = TextScores(self.encode_texts(texts), self.logit_scale, self.logit_bias)
        images = self.preprocess(images)
        with evaluation_mode(self):
            return scores(self._embed(images))

    def preprocess(self, images: Any) -> Tensor:
        """The input (B, C, H, W) that is made of images, as `SelfExplainingClassifier.preprocess` does."""
        batch = as_batch(images, self.input_size, self.preprocessing, next(self.model.parameters()))
        check_images(self.model, self.input_size, batch)
        return batch

    def convert(self, texts: Sequence[str] | Tensor, **options: Any) -> ImageTextClassifier:
        """The image tower as a zero-shot classifier whose explanations are to be trained.

        Args:
            texts: K texts, or the features (K, D) of some.
            options: of `fastshap_vision.convert`.

        Raises:
            UnsupportedModelError: where the image tower is none of timm's; its `reason` says why.
        """
        if self.tower is None:
            raise cast(UnsupportedModelError, self._refusal)
        features = texts if isinstance(texts, Tensor) else self.encode_texts(texts)
        options = {"preprocessing": self.preprocessing} | options
        found = convert(self.tower, texts=features, logit_scale=self.logit_scale, logit_bias=self.logit_bias, **options)
        return cast(ImageTextClassifier, found)

    @torch.no_grad()
    def explain_pair(
        self,
        images: Any,
        texts: Sequence[str],
        players: str = "image",
        *,
        coalitions: int = 4096,
        seed: int = 0,
        progress: bool = False,
    ) -> PairExplanation:
        """Shapley values of the score of each image with its own text, in evaluation mode; no training is needed.

        Exact where the players have no more than `coalitions` coalitions (12 players of the default), else estimated
        by KernelSHAP, with standard errors. A removed word leaves the attention; the start, the end and padding never
        play.

        Args:
            images: B of them, as `SelfExplainingClassifier.explain` takes them.
            texts: B texts, one of each image.
            players: "image", the patches, with the whole text; "text", the words (tokens), with the whole image;
                "both": v(S) has the patches and the words in S.
            coalitions: of each pair; even.
            seed: of these coalitions.
            progress: shows a progress bar.

        Returns:
            `PairExplanation`, whose values add up to score − score(∅).

        Raises:
            ValueError: for another number of texts than images, or a text without words where only words play.
            UnsupportedModelError: where words play and the text tower has no attention mask to leave them out by.
        """
        check_choice("players", players, PLAYERS)
        images = self.preprocess(images)
        tokens = self.text_tower.tokens("explain_pair", texts)
        if len(tokens.ids) != len(images):
            fail("explain_pair", "texts", f"{len(images)} texts, one of each image", list(texts))
        coalitions = check_count("explain_pair", "coalitions", coalitions, 2, 2**31 - 2)
        patches = self.grid[0] * self.grid[1]
        found: list[ReferenceValues] = []
        with evaluation_mode(self):
            for image, ids, plays in zip(images.split(1), tokens.ids, tokens.players, strict=True):
                if players == "text" and not bool(plays.any()):
                    fail("explain_pair", "texts", "texts of one word or more, where only words play", list(texts))
                game = PairGame(
                    self._embed_coalitions,
                    partial(self._embed_words, ids, plays),
                    patches=patches,
                    words=int(plays.sum()),
                    plays_image=players != "text",
                    plays_text=players != "image",
                    logit_scale=self.logit_scale,
                    logit_bias=self.logit_bias,
                )
                found.append(_values_of(game, image, coalitions, seed, progress))
        split = patches if players != "text" else 0
        values = [pair.phi[0, :, 0].float() for pair in found]
        errors = [None if pair.standard_error is None else pair.standard_error[0, :, 0].float() for pair in found]
        return PairExplanation(
            image=torch.stack([pair[:split] for pair in values]) if split else None,
            text=[pair[split:] for pair in values] if players != "image" else None,
            words=tokens.words,
            score=torch.stack([pair.grand[0, 0] for pair in found]).float(),
            null=torch.stack([pair.null[0, 0] for pair in found]).float(),
            grid=self.grid,
            errors=errors,
            evaluations=sum(pair.evaluations for pair in found),
        )

    def _embed_words(self, ids: Tensor, plays: Tensor, words: Tensor) -> Tensor:
        """Embeddings (U, D) of one text (L,) with some of its words, bool (U, n), of the tokens that play (L,)."""
        present = (~plays).repeat(len(words), 1)
        present[:, plays] = words
        whole = None if bool(words.all()) else present
        return self.text_tower.encode(ids.expand(len(words), -1), whole)


def _values_of(game: PairGame, image: Tensor, coalitions: int, seed: int, progress: bool) -> ReferenceValues:
    """Exact values where that takes no more evaluations, else an estimate."""
    if game.players <= 20 and 2**game.players <= coalitions:
        return exact_values(game, image, progress=progress)  # type: ignore[arg-type]
    return kernel_shap_values(game, image, coalitions, seed, progress=progress)  # type: ignore[arg-type]


def _input_size(model: Any) -> tuple[int, int, int]:
    """(C, H, W)."""
    config = model.config.vision_config if hasattr(model, "vision_model") else None
    size = getattr(model.visual if config is None else config, "image_size", None)
    if size is None:
        raise UnsupportedModelError(f"This {type(model).__name__} takes images of any size, of which no grid is known.")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    return (3 if config is None else config.num_channels, height, width)


def _cells(input_size: tuple[int, int, int]) -> tuple[int, int]:
    """A grid of about 7 × 7 cells that divides the image."""
    _, height, width = input_size
    for side in _CELLS:
        if not height % side and not width % side:
            return side, side
    raise ValueError(
        f"ImageTextModel: argument `grid` must be given for images of {(height, width)} pixels, which no usual grid "
        "divides. Pass grid=(h, w), divisors of the height and of the width."
    )
