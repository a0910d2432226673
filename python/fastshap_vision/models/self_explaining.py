"""A timm model that explains itself: per-patch, per-class Shapley values from the same forward pass as the logits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import all_finite
from .._modes import evaluation_mode
from .._runtime.precision import at_least_float32, lowered
from ..explanations.explanation import Explanation
from ..games.base import Features, JointPass
from ..games.coalitions import Coalitions, coalitions_of
from ..games.factory import make_game
from ..games.hooks import check_backbone
from ..images.batch import as_batch
from ..images.preprocessing import Preprocessing
from ..streaming.stream import stream
from .arguments import check_choices, check_name, checked_gradient, checked_model_kwargs, checked_size, checked_width
from .backbone import (
    check_classes_unchanged,
    check_unchanged,
    create_backbone,
    input_size_of,
    other_size,
    preprocessing_of,
    settings_of,
)
from .head import SharesHead, VotesHead
from .input import check_images, chosen_classes
from .null import KeptNull
from .pretrained import Pretrained
from .refine import Calibration, calibrate, calibration_of, checked_evaluations, with_errors

_log = logging.getLogger(__name__)


class SelfExplainingClassifier(Pretrained):
    """A timm classifier whose Shapley values add up to its logits: Σ_p Φ_p = f(x) − v(∅).

    Heads (E are the features of the patches, (B, P, L)):

    - "shares": the model's own classifier, untouched; Φ_p = base_p + δ_p with δ = G(E) W_sᵀ minus its mean over p
      and G `head_depth` blocks of the model's own kind. `base` is "even", (f − v(∅))/P, or "votes", where patches
      vote. Exact for every model.
    - "votes": Φ_p = (W e_p + b)/P, and the logits are their sum. Exact where the model averages its patches before
      a linear classifier; otherwise the logits change and need fine-tuning (see `is_exact_conversion`).

    Args:
        model_name: a timm model name.
        num_classes: K, outputs explained.
        img_size: image size in pixels, one number or (H, W); default the timm model's.
        head: "shares" or "votes".
        base: "even" or "votes"; default "votes" where patches vote. Of the shares head only.
        head_depth: blocks between the features and the shares, 0, 1 or 2. Of the shares head only.
        head_width: features of these blocks. None for the model's own, up to 256, or so many that the head has at most
            13 % of the model's parameters, but 96 (of a feature map 128, or its own) at least. Of the shares head only.
        intermediates: whether these blocks read the features of every stage of the encoder (each block of a
            transformer), added up by a linear layer, instead of the last ones alone. Of the shares head only.
        backbone_gradient: γ in [0, 1], how much of the regression's gradient goes on into the encoder. Default 0 with
            shares: the encoder trains as if nothing were explained (with μ = 0, to the same bits); 1 with votes.
        removal: how a patch that is not in a coalition is removed: "token", its token is taken out of the sequence
            (VisionTransformer and Eva models; where packing does not know their blocks, by attention masks);
            "cell", its pixels become 0, and where the model averages its patches, present ones alone count;
            "stem", the same with what a convolutional network's stem makes of it; "pixel", its pixels become 0, and
            the model sees the masked image as any other (of the shares head only). Default "token" where the model
            can, else "cell"; the log says so once where that is slower.
        pretrained: load timm's weights (needs the network or timm's cache).
        model_kwargs: further JSON-able arguments of `timm.create_model`.
        preprocessing: how `explain` makes inputs of pictures, a `Preprocessing` or its dict; default timm's.
        calibration: how wrong explanations are, a `Calibration` or its dict; `train_explainer` and `calibrate` find it.
        backbone: a timm model to convert instead of creating one; see `convert`.

    Attributes:
        grid, players: (h, w) and P = h·w; players count row by row.
        seen: the share of an image's height and width, from the top left, that the grid covers.
        removal: the removal in force, chosen where none was asked for.
        preprocessing: what `explain` does with pictures; None where images are neither greyscale nor RGB.
        is_exact_conversion: whether the logits are the timm model's; with "shares" they are bit-identical.

    The head has the dtype and device of the backbone. Shapley values are float32 at least, also where the model
    computes in half precision or under autocast: rounded to it, their sum would miss the logits.

    Raises:
        UnsupportedModelError: for a family that has no game; the message names what is supported.
        ValueError: for arguments out of range, an impossible image size, or `model_kwargs` that JSON can't hold.

    Source: Fan, Yang, Ma, AAAI 2026, arXiv 2512.14354 (the votes head); the shares head is this package's.

    Example:
        >>> model = fv.SelfExplainingClassifier("test_vit", num_classes=10, img_size=48)
        >>> model.grid, model(images).shape
        ((3, 3), torch.Size([4, 10]))
    """

    def __init__(
        self,
        model_name: str,
        num_classes: int = 1000,
        *,
        img_size: int | tuple[int, int] | None = None,
        head: str = "shares",
        base: str | None = None,
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
        super().__init__()
        check_name(model_name, num_classes)
        check_choices(head, base, head_depth, intermediates, removal)
        head_width = checked_width(head_width)
        backbone_gradient = checked_gradient(backbone_gradient, head)
        size, arguments = checked_size(img_size), checked_model_kwargs(model_kwargs)
        if backbone is None:
            backbone = create_backbone(model_name, num_classes, size, arguments, pretrained)
        self.backbone = backbone
        wants_earlier = intermediates and head == "shares"
        self.game, self.removal = make_game(
            backbone, head == "votes", input_size_of(backbone, size), removal, wants_earlier
        )
        if size is not None and self.game.input_size[1:] != size:
            raise other_size(backbone, self.game.input_size[1:], size)
        if base == "votes" and not self.game.patches_vote:
            raise ValueError(
                "Argument `base` can be 'votes' where the model averages its patches before a linear classifier; this "
                "one does not. Use base='even'."
            )
        self.num_classes: int = self.game.vote_weight()[0].shape[0]
        self.base = base or ("votes" if self.game.patches_vote else "even")
        self.head: SharesHead | VotesHead
        if head == "shares":
            self.head = SharesHead(self.game, self.num_classes, self.base, head_depth, head_width, backbone_gradient)
            head_width = self.head.explainer.width
        else:
            self.head = VotesHead(self.game, backbone_gradient)
        self._converted = settings_of(backbone)
        self._null = KeptNull(self.game)
        self._says_untrained = True
        # What is saved beside the weights; they replace timm's own, which need not be fetched again. A checkpoint's
        # game is the one that its weights were trained in, whatever is chosen elsewhere.
        self._hub_mixin_config: dict[str, Any] = {
            **(self._hub_mixin_config or {}),
            "num_classes": self.num_classes,
            "img_size": None if size is None else list(size),
            "head_depth": int(head_depth),
            "head_width": head_width,
            "removal": self.removal,
            "pretrained": False,
            "model_kwargs": arguments,
        }
        self.preprocessing = preprocessing_of(backbone, self.game.input_size, preprocessing)
        self.calibration = calibration_of(calibration)

    @property
    def trained_as(self) -> dict[str, Any]:
        """JSON-able, by name: what decides how the model is trained and is not in its weights."""
        names = ("model_name", "head", "head_depth", "intermediates", "removal", "model_kwargs")
        decided = {"base": self.base, "backbone_gradient": self.head.backbone_gradient}
        return {name: self.config[name] for name in names if name in self.config} | decided

    @property
    def grid(self) -> tuple[int, int]:
        return self.game.grid

    @property
    def players(self) -> int:
        return self.game.players

    @property
    def seen(self) -> tuple[float, float]:
        _, height, width = self.game.input_size
        return self.game.view[0] / height, self.game.view[1] / width

    @property
    def is_exact_conversion(self) -> bool:
        return self.game.is_exact_conversion

    def calibrate(self, images: Tensor, coalitions: int = 64, seed: int = 0) -> None:
        """Finds how wrong explanations are, from coalitions of images that the explainer was not trained on.

        Args:
            images: (B, C, H, W), normalised as in training; some dozens.
            coalitions: of each image, even.
            seed: of the coalitions.

        Example:
            >>> model.calibrate(images, coalitions=8)
            >>> model.explain(images, evaluations=8).standard_error.shape
            torch.Size([4, 9])
        """
        calibrate(self, images, coalitions, seed)

    @property
    def is_untrained(self) -> bool:
        """Whether the shares are still the zeros that they start from: nothing was learnt. False for a votes head."""
        return isinstance(self.head, SharesHead) and self.head.is_untrained

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters that timm's optimisers don't decay."""
        names = getattr(self.backbone, "no_weight_decay", set)
        return {f"backbone.{name}" for name in names()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Computes the backbone's activations again in the backward pass instead of keeping them, as in timm."""
        backbone: Any = self.backbone
        backbone.set_grad_checkpointing(enable)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, K) of images (B, C, H, W)."""
        check_unchanged(self)
        if self.is_exact_conversion:
            logits = self.backbone(images)
            if isinstance(logits, tuple):
                check_backbone(self.backbone)  # of a distilled model in training; it says what to do
            return logits
        return self.game.features_and_logits(images)[1]

    def shapley_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Shapley values (B, P, K) of every patch and class, and logits (B, K), from one forward pass.

        Example:
            >>> values, logits = model.shapley_values(images)
            >>> torch.allclose(values.sum(1), logits - model.null_value(), atol=1e-5)
            True
        """
        self._check_images(images)
        return self._explained(images, "all")[:2]

    def _explained(self, images: Tensor, target: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Shapley values (B, P, K) or (B, P), logits (B, K), the classes that were chosen (B,) and v(∅) (K,)."""
        null = self.null_value()
        if not len(images):  # which not every model takes
            logits = null.new_zeros(0, self.num_classes)
            chosen = chosen_classes("explain", target, logits)
            values = at_least_float32(null.new_zeros(0, self.players, self.num_classes))
            return values if chosen is None else values[..., 0], logits, chosen, null
        features, logits = self.game.features_and_logits(images)
        check_classes_unchanged(self, logits)
        chosen = chosen_classes("explain", target, logits)
        return self.head(features, logits, null, chosen), logits, chosen, null

    def preprocess(self, images: Any) -> Tensor:
        """The input (B, C, H, W) that `explain` makes of images, with the same errors: for calls, plots, metrics."""
        like = next(self.parameters())
        batch = as_batch(images, self.game.input_size, self.preprocessing, like)
        self._check_images(batch)
        if not all_finite(batch):
            raise ValueError("Argument `images` must be finite, but it holds NaN or infinite pixels. Clean the input.")
        return batch

    @torch.no_grad()
    def explain(
        self,
        images: Any,
        target: int | Sequence[int] | Tensor | str | None = None,
        *,
        evaluations: int = 0,
        seed: int = 0,
    ) -> Explanation:
        """Explains images in one forward pass, in evaluation mode; in a few more where it is to be better.

        Where patches do not vote, it takes a pass of one empty image more, unless v(∅) is known from an earlier call.

        Args:
            images: (B, C, H, W) or one image (C, H, W), normalised as in training, finite: a tensor or an array; or
                pictures, which are resized, cropped and normalised as `preprocessing` says: a PIL image, or uint8
                pixels (channels first in a tensor, last in an array); or a list of single images of these kinds.
            target: the class to explain: None for the predicted one, a class, (B,) classes, or "all".
            evaluations: coalitions of each image, even, by which its explanation is refined; see `calibrate`.
            seed: of these coalitions.

        Returns:
            Explanation with values (B, P), or (B, P, K) for "all", in units of the logits. Values are float32 at least;
            `logits` and `null` are as the model computes them, and the values sum to their difference. Where the model
            is calibrated, `standard_error` and `expected_error` say how far to believe it.

        Raises:
            TypeError: for images of another type.
            ValueError: for images of the wrong shape or with NaN or infinite pixels, or a target out of range.

        Example:
            >>> explanation = model.explain(images, target="all")
            >>> explanation.values.shape, explanation.efficiency_gap() < 1e-5
            (torch.Size([4, 9, 10]), True)
        """
        evaluations, seed = checked_evaluations(evaluations, seed, self.players)
        images = self.preprocess(images)
        with evaluation_mode(self):
            phi, logits, chosen, null = self._explained(images, target)
            phi, error = with_errors(self, images, phi, chosen, evaluations, seed)
        found = Explanation(phi, logits, chosen, self.grid, null, seen=self.seen, untrained=self._warn_if_untrained())
        return replace(found, standard_error=error, evaluations=evaluations)

    def _warn_if_untrained(self) -> bool:
        """`is_untrained`, which the log says once."""
        untrained = self.is_untrained
        if untrained and self._says_untrained:
            self._says_untrained = False
            _log.warning(
                "This model was never trained to explain: its Shapley values are %s. Train it with fit first.",
                "an even split" if self.base == "even" else "the votes of the patches",
            )
        return untrained

    def coalition_values(
        self,
        images: Tensor,
        coalitions: Coalitions | Tensor,
        *,
        max_rows: int | str = "auto",
        precision: str = "same",
        progress: bool = False,
    ) -> Tensor:
        """v(S) of every coalition, however many: they run in chunks whose size follows from the free memory.

        Args:
            images: (B, C, H, W), normalised as in training.
            coalitions: M of every image, `Coalitions` or their bits alone, int32 (B, M, W); empty and full ones are
                allowed. On the images' device, or on the CPU, where counting them waits for no GPU.
            max_rows: rows computed at once: present tokens of a transformer that drops the absent ones, all patches
                of other models; at least one coalition. "auto" takes half of the free memory at most, and no more
                than makes a difference.
            precision: "same" (the model's own), "bf16", "fp8" (without gradients only) or "auto"; see
                `_runtime.precision.lowered`.
            progress: show a progress bar.

        Returns:
            values (B, M, K). Gradients flow to the model where grad mode is on; where there are several chunks, each
            is computed again for its gradient, with the same dropout, so that memory does not grow with M. Batch
            norms in training mode normalise each chunk by itself, and count it once.

        Raises:
            ValueError: for images or coalitions of the wrong shape, or `max_rows` below 1.

        Deterministic: yes, for equal `max_rows`; chunks of another size differ by rounding.

        Example:
            >>> bits = fk.sample_coalitions(4, 6, model.players, seed=0)
            >>> model.coalition_values(images, fv.Coalitions(bits, model.players, paired=True)).shape
            torch.Size([4, 6, 10])
        """
        self._check_images(images)
        coalitions = coalitions_of(images, coalitions, self.players, "coalition_values", or_on_cpu=True)
        with lowered(self, precision):
            return stream(self.game, images, coalitions, max_rows, progress, variant=precision)

    def joint(self, images: Tensor, coalitions: Coalitions | Tensor) -> JointPass:
        """Full images and coalitions in one forward pass: features (B, P, L), logits (B, K), values (B, M, K).

        Example:
            >>> joint = model.joint(images, fk.sample_coalitions(4, 2, model.players, seed=0))
            >>> joint.logits.shape, joint.values.shape
            (torch.Size([4, 10]), torch.Size([4, 2, 10]))
        """
        self._check_images(images)
        return self.game.joint(images, coalitions_of(images, coalitions, self.players, "joint"))

    def null_value(self) -> Tensor:
        """v(∅): (K,); exactly zero where patches vote. In evaluation it is kept from one call to the next."""
        return self._null()

    def regression_loss(
        self,
        features: Features,
        logits: Tensor,
        coalitions: Coalitions | Tensor,
        values: Tensor,
        null: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², with no (B, P, K) tensor.

        Features and logits (B, K) are those of the full images. With the shares head, logits and base are detached: the
        regression moves the shares, and the encoder as far as `backbone_gradient` says. `classes`, int64 (B, k), are
        those of each image that count; None for all.
        """
        coalitions = coalitions_of(features.last, coalitions, self.players, "regression_loss")
        return self.head.regression_loss(features, logits, coalitions, values, null, classes)

    def _check_images(self, images: Tensor) -> None:
        check_unchanged(self)
        check_images(self, self.game.input_size, images)
