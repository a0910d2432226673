"""A timm model that explains itself: per-patch, per-class Shapley values from the same forward pass as the logits."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from fastshap_kernels import coalition_sum, linear_shapley_loss
from fastshap_kernels._checks import check_bits

from ._checks import check_choice
from .coalition_stream import stream
from .cpu_attention import cpu_attention
from .cpu_linear import cpu_linears
from .explanation import Explanation
from .game import JointPass, UnsupportedModelError
from .intermediates import MergedFeatures, probe_widths
from .precision import lowered
from .removal import REMOVALS, make_game
from .stem import evaluation_mode

HEADS = ("shares", "votes")
BASES = ("even", "votes")
HEAD_DEPTHS = (0, 1, 2)


class SelfExplainingClassifier(nn.Module, PyTorchModelHubMixin):
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
        intermediates: whether these blocks read the features of every stage of the encoder (each block of a
            transformer), added up by a linear layer, instead of the last ones alone. Of the shares head only.
        backbone_gradient: γ in [0, 1], how much of the regression's gradient goes on into the encoder. Default 0 with
            shares: the encoder trains as if nothing were explained (with μ = 0 in `fit`, to the same bits); 1 with
            votes, which are the classifier's.
        removal: how a patch that is not in a coalition is removed: "drop", its token is taken out of the sequence
            (VisionTransformer and Eva models; where packing does not know their blocks, by attention masks);
            "pixel", its pixels become 0, and where the model averages its patches, present ones alone count;
            "feature", the same with what a convolutional network's stem makes of it; "image", its pixels become 0,
            and the model sees the masked image as any other (of the shares head only).
            Default "drop" where the model can, else "pixel"; the log says so once where that is slower.
        pretrained: load timm's weights (needs the network or timm's cache).
        model_kwargs: further JSON-able arguments of `timm.create_model`.
        backbone: a timm model to convert instead of creating one; see `convert`.

    Attributes:
        grid, players: (h, w) and P = h·w; players count row by row.
        removal: the removal in force, chosen where none was asked for.
        is_exact_conversion: whether the logits are the timm model's; with "shares" they are bit-identical.

    Raises:
        UnsupportedModelError: for a family that can't play; the message names what is supported.

    Source: Fan, Yang, Ma, AAAI 2026, arXiv 2512.14354 (the votes head); the shares head is this package's.
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
        intermediates: bool = False,
        backbone_gradient: float | None = None,
        removal: str | None = None,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        backbone: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_choice("head", head, HEADS)
        if base is not None:
            check_choice("base", base, BASES)
        check_choice("head_depth", head_depth, HEAD_DEPTHS)
        if removal is not None:
            check_choice("removal", removal, REMOVALS)
        if backbone_gradient is None:
            backbone_gradient = 0.0 if head == "shares" else 1.0
        if not 0.0 <= backbone_gradient <= 1.0:
            raise ValueError(f"Argument `backbone_gradient` must be in [0, 1], but it is {backbone_gradient!r}.")
        # What is saved beside the weights; they replace timm's own, which need not be fetched again.
        self._hub_mixin_config: dict[str, Any] = {**(self._hub_mixin_config or {}), "pretrained": False}
        arguments = dict(model_kwargs or {})
        if backbone is None:
            backbone = _create_backbone(model_name, pretrained, arguments | {"num_classes": num_classes}, img_size)
        self.backbone = backbone
        self.head, self.backbone_gradient = head, backbone_gradient
        size = _input_size(backbone, arguments.get("in_chans", 3), img_size)
        self.game, self.removal = make_game(backbone, head == "votes", size, removal)
        # A checkpoint plays the game that its weights were trained in, whatever is chosen elsewhere.
        self._hub_mixin_config["removal"] = self.removal
        if base == "votes" and not self.game.patches_vote:
            raise ValueError(
                "Argument `base` can be 'votes' where the model averages its patches before a linear classifier; this "
                "one does not. Use base='even'."
            )
        self.base = base or ("votes" if self.game.patches_vote else "even")
        self.num_classes: int = self.game.vote_weight()[0].shape[0]
        if head == "shares":
            if intermediates and self.removal == "feature":
                raise ValueError(
                    "Argument `intermediates` can't be True with removal='feature', which runs the network in parts. "
                    "Use removal='pixel'."
                )
            if intermediates:
                self.game.intermediate_widths = probe_widths(self.game)
            merged = [MergedFeatures(self.game.feature_width, self.game.intermediate_widths)] if intermediates else []
            blocks = [self.game.explanation_block() for _ in range(head_depth)]
            self.explainer = nn.Sequential(*merged, *blocks)
            self.shares = nn.Linear(self.game.feature_width, self.num_classes, bias=False)
            nn.init.zeros_(self.shares.weight)  # δ = 0: training starts from the base
            device = next(backbone.parameters()).device
            self.explainer.to(device)
            self.shares.to(device)

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able constructor arguments, as saved beside the weights."""
        return dict(self._hub_mixin_config)

    @property
    def grid(self) -> tuple[int, int]:
        return self.game.grid

    @property
    def players(self) -> int:
        return self.game.players

    @property
    def is_exact_conversion(self) -> bool:
        return self.game.is_exact_conversion

    @classmethod
    def _from_pretrained(cls, *, model_id: str, **kwargs: Any) -> SelfExplainingClassifier:
        # The mixin announces local loading on standard output, and by default ignores missing weights.
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                return super()._from_pretrained(model_id=model_id, **(kwargs | {"strict": True}))
        except (SafetensorError, FileNotFoundError, RuntimeError) as error:
            raise ValueError(
                f"The checkpoint {model_id!r} can't be read: {error}. It must be a folder written by save_pretrained "
                "(config.json, model.safetensors), or a model on the Hub."
            ) from error

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
        if self.is_exact_conversion:
            return self.backbone(images)
        return self.game.features_and_logits(images)[1]

    def shapley_values(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Shapley values (B, P, K) of every patch and class, and logits (B, K), from one forward pass."""
        self._check_images(images)
        return self._explained(images)[:2]

    def _explained(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shapley values (B, P, K), logits (B, K) and v(∅) (K,)."""
        features, logits = self.game.features_and_logits(images)
        null = self.null_value()
        return self._phi(features, logits, null), logits, null

    def _phi(self, features: Tensor, logits: Tensor, null: Tensor) -> Tensor:
        if self.head == "votes":
            weight, bias = self.game.vote_weight()
            return nn.functional.linear(features, weight, bias) / self.players
        with cpu_linears(features):
            delta = self.shares(self.explainer(features))
        delta = delta - delta.mean(1, keepdim=True)
        if self.base == "votes":
            return delta + nn.functional.linear(self._last(features), *self.game.vote_weight()) / self.players
        return delta + ((logits - null) / self.players).unsqueeze(1)

    @torch.no_grad()
    def explain(self, images: Tensor, target: int | Tensor | str | None = None) -> Explanation:
        """Explains images in one forward pass, in evaluation mode.

        Where v(∅) is not 0 by construction, as it is where patches vote, it takes a pass of one empty image more; of
        its class and register tokens alone where absent tokens are dropped.

        Args:
            images: (B, C, H, W), normalised as in training, finite.
            target: the class to explain: None for the predicted one, an int, an int64 tensor (B,), or "all".

        Returns:
            Explanation with values (B, P), or (B, P, K) for "all", in units of the logits.

        Raises:
            ValueError: for images of the wrong shape or with NaN or infinite pixels, or a target out of range.

        Deterministic: yes.
        """
        self._check_images(images)
        if not torch.isfinite(images).all():
            raise ValueError("Argument `images` must be finite, but it holds NaN or infinite pixels. Clean the input.")
        with evaluation_mode(self):
            phi, logits, null = self._explained(images)
        chosen = self._target(target, logits)
        if chosen is None:
            return Explanation(values=phi, logits=logits, target=None, grid=self.grid, null=null)
        values = phi.gather(2, chosen[:, None, None].expand(-1, self.players, 1))[..., 0]
        return Explanation(values=values, logits=logits, target=chosen, grid=self.grid, null=null)

    def coalition_values(
        self,
        images: Tensor,
        bits: Tensor,
        *,
        max_rows: int | str = "auto",
        paired: bool = False,
        precision: str = "same",
        progress: bool = False,
    ) -> Tensor:
        """v(S) of every coalition, however many: they run in chunks whose size follows from the free memory.

        Args:
            images: (B, C, H, W), normalised as in training.
            bits (int32): (B, M, W) coalitions; empty and full ones are allowed. On the images' device, or on the CPU,
                where counting them waits for no GPU.
            max_rows: rows computed at once: present tokens of a transformer that drops the absent ones, all patches
                of other models; at least one coalition. "auto" takes half of the free memory at most, and no more
                than makes a difference.
            paired: promises that coalitions 2j and 2j + 1 of an image are complements (M even).
            precision: "same" (the model's own), "bf16", "fp8" (without gradients only) or "auto"; see
                `fastshap_vision.precision.lowered`.
            progress: show a progress bar.

        Returns:
            values (B, M, K). Gradients flow to the model where grad mode is on; where there are several chunks, each
            is computed again for its gradient, with the same dropout, so that memory does not grow with M. Batch
            norms in training mode normalise each chunk by itself, and count it once.

        Raises:
            ValueError: for images or bits of the wrong shape, an odd M that is `paired`, or `max_rows` below 1.

        Deterministic: yes, for equal `max_rows`; chunks of another size differ by rounding.
        """
        self._check_images(images)
        is_on_cpu = isinstance(bits, Tensor) and bits.device.type == "cpu"  # which they may be, wherever images are
        like = images.new_empty(len(images), device="cpu") if is_on_cpu else images
        check_bits("coalition_values", bits, self.players, like)
        with lowered(self, precision):
            return stream(self.game, images, bits, max_rows, paired, progress, variant=precision)

    def joint(self, images: Tensor, bits: Tensor, paired: bool = False, rows: int | None = None) -> JointPass:
        """Full images and coalitions in one forward pass: features (B, P, L), logits (B, K), values (B, M, K).

        `paired` promises that coalitions 2j and 2j + 1 of an image are complements: the packed batch then has a
        static number of rows. Without it, `rows` pads a packed batch to that number, at least Σ|S| + B·M·Q; games
        that don't pack ignore it.
        """
        self._check_images(images)
        check_bits("joint", bits, self.players, images)
        return self.game.joint(images, bits, paired, rows)

    def null_value(self) -> Tensor:
        """v(∅): (K,); exactly zero where patches vote."""
        return self.game.null()

    def regression_loss(
        self,
        features: Tensor,
        logits: Tensor,
        bits: Tensor,
        values: Tensor,
        null: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """Mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², with no (B, P, K) tensor.

        Features (B, P, L), with `intermediates` (B, P, L + ΣC), and logits (B, K) are those of the full images. With
        the shares head, logits and base are detached: the regression moves the shares, and the encoder as far as
        `backbone_gradient` says. `classes`, int64 (B, k), are those of each image that count; None for all.
        """
        if self.backbone_gradient == 0.0:
            features = features.detach()
        elif self.backbone_gradient < 1.0:
            features = features.detach() + self.backbone_gradient * (features - features.detach())
        if self.head == "votes":
            weight, bias = self.game.vote_weight()
            bias = None if bias is None else bias / self.players
            return _loss_of_classes(classes, features, weight / self.players, bias, bits, values, null)
        if self.base == "even":
            grand = logits.detach()
        else:
            # What the votes leave is a game whose grand value is 0.
            values, null = values - self._votes_of(self._last(features.detach()), bits), null.detach() * 0
            grand = torch.zeros_like(logits)
        with cpu_linears(features), cpu_attention(features):
            explained = self.explainer(features)
        return _loss_of_classes(classes, explained, self.shares.weight, None, bits, values, null, grand)

    def _votes_of(self, features: Tensor, bits: Tensor) -> Tensor:
        """Σ_{p∈S} (W e_p + b)/P without gradient: (B, M, K)."""
        with torch.no_grad():
            weight, bias = self.game.vote_weight()
            votes = coalition_sum(features, bits) @ weight.T
            if bias is not None:
                votes = votes + coalition_sum(features.new_ones(*features.shape[:2], 1), bits) * bias
            return votes / self.players

    def _last(self, features: Tensor) -> Tensor:
        """Of the features (B, P, L + ΣC) the encoder's last ones, (B, P, L)."""
        return features[..., : self.game.feature_width]

    def _check_images(self, images: Tensor) -> None:
        expected = self.game.input_size
        if not isinstance(images, Tensor) or images.ndim != 4 or tuple(images.shape[1:]) != expected:
            got = f"{tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
            raise ValueError(
                f"Argument `images` must be a tensor (B, {', '.join(map(str, expected))}), but it is {got}. Resize the "
                "images, or create the model with another img_size or in_chans."
            )
        weight = next(self.parameters())
        if images.device != weight.device and weight.device.type != "meta":  # where accelerate keeps it elsewhere
            raise ValueError(
                f"Argument `images` must be on the model's device, {weight.device}, but it is on {images.device}. Pass "
                f"images.to({str(weight.device)!r})."
            )
        if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
            raise ValueError(
                f"Argument `images` must be {weight.dtype} like the model's weights, but it is {images.dtype}. Pass "
                f"images.to({weight.dtype}), or use torch.autocast."
            )

    def _target(self, target: int | Tensor | str | None, logits: Tensor) -> Tensor | None:
        batch, classes = logits.shape
        if target is None:
            return logits.argmax(1)
        if isinstance(target, str):
            check_choice("target", target, ("all",))
            return None
        chosen = torch.as_tensor(target, device=logits.device)
        is_index = not chosen.is_floating_point() and chosen.dtype != torch.bool
        if not is_index or chosen.shape not in ((), (batch,)) or (chosen < 0).any() or (chosen >= classes).any():
            raise ValueError(
                f"Argument `target` must be None, 'all', an int or an int tensor ({batch},) in [0, {classes}), "
                f"but it is {target!r}."
            )
        return chosen.long().expand(batch)


def _loss_of_classes(
    classes: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    bits: Tensor,
    values: Tensor,
    null: Tensor,
    grand: Tensor | None = None,
) -> Tensor:
    """`linear_shapley_loss` of some classes of each image, (B, k), or of all; normalised additively to a `grand`."""
    if classes is None:
        normalization = "none" if grand is None else "additive"
        return linear_shapley_loss(features, weight, bias, bits, values, null, grand, normalization=normalization)
    with torch.autocast(features.device.type, enabled=False):  # differences of near numbers
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, values, null = features.to(dtype), values.to(dtype), null.to(dtype)
        rows, null = weight.to(dtype)[classes], null[classes].unsqueeze(1)
        size = coalition_sum(features.new_ones(*features.shape[:2], 1), bits)
        found = coalition_sum(features, bits) @ rows.mT
        if bias is not None:
            found = found + size * bias.to(dtype)[classes].unsqueeze(1)
        if grand is not None:
            missing = grand.to(dtype).gather(1, classes).unsqueeze(1) - null - features.sum(1, keepdim=True) @ rows.mT
            found = found + size / features.shape[1] * missing
        wanted = values.gather(2, classes.unsqueeze(1).expand(-1, values.shape[1], -1))
        return (wanted - null - found).square().mean()


def convert(
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    head: str = "shares",
    base: str | None = None,
    head_depth: int = 1,
    intermediates: bool = False,
    backbone_gradient: float | None = None,
    removal: str | None = None,
) -> SelfExplainingClassifier:
    """Makes a timm model, trained or not, self-explaining. The model itself becomes the backbone: no copy is made.

    With head="shares" (the default) its logits stay bit-identical.

    Args:
        model: made by `timm.create_model`.
        img_size, head, base, head_depth, intermediates, backbone_gradient, removal: as in `SelfExplainingClassifier`.

    Raises:
        UnsupportedModelError: for a model that timm did not make, or a family that can't play.
    """
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise UnsupportedModelError(
            f"Argument `model` must be made by timm.create_model, but it is a {type(model).__name__} without timm's "
            "configuration."
        )
    arguments = {key: value for key, value in getattr(model, "_model_args", {}).items() if value is not None}
    # ViTs carry their image size; a convolutional network takes any.
    size = img_size if img_size is not None else arguments.pop("img_size", None)
    return SelfExplainingClassifier(
        name,
        arguments.pop("num_classes", getattr(model, "num_classes", 1000)),
        img_size=size,
        head=head,
        base=base,
        head_depth=head_depth,
        intermediates=intermediates,
        backbone_gradient=backbone_gradient,
        removal=removal,
        model_kwargs=arguments,
        backbone=model,
    )


def _create_backbone(
    name: str, pretrained: bool, arguments: dict[str, Any], img_size: int | tuple[int, int] | None
) -> nn.Module:
    if not timm.is_model(name):
        close = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        raise ValueError(
            f"Argument `model_name` must be a timm model, but it is {name!r}. "
            f"{'Close: ' + ', '.join(close) if close else 'See timm.list_models()'}."
        )
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if img_size is not None and config is not None and config.fixed_input_size:
        arguments["img_size"] = img_size
    return timm.create_model(name, pretrained=pretrained, **arguments)


def _input_size(backbone: Any, channels: int, img_size: int | tuple[int, int] | None) -> tuple[int, int, int]:
    """(C, H, W): as asked for, else as the model was built, else as timm's configuration says."""
    size = img_size or getattr(getattr(backbone, "patch_embed", None), "img_size", None)
    if size is None:
        size = tuple(backbone.pretrained_cfg["input_size"][1:])
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width
