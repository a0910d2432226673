"""One training step in several ways, on the same images, coalitions and weights.

dense-pixel           images repeated, absent patches' pixels set to 0: what FastSHAP and ViaSHAP do. A vision
                      transformer has another game then, and is measured for what it costs.
dense-mask            images repeated, absent keys at −∞ in every block: what ViT-Shapley does. The same loss as packed.
dense-compiled        dense-mask under torch.compile; of a convolutional network dense-pixel. The same loss as packed.
dense-pixel-compiled  dense-pixel of a vision transformer under torch.compile.
packed                this package: `coalition_values`, or `JointObjective`.
packed-compiled       the same under torch.compile.
plain, plain-compiled a training step without explanation, on the same images.

The dense ways share what packed does for v(∅), and attend with PyTorch's fused attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.step.sets import Step
from fastshap_vision.games.base import Features

Call = Callable[[], Tensor]

#: Weights of the regression (λ) and of the masked task (μ).
REGRESSION_WEIGHT, MASKED_TASK_WEIGHT = 1.0, 1.0

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT-Ti/16": ("vit_tiny_patch16_224", {}),
    "ViT-S/16": ("vit_small_patch16_224", {}),
    "ViT-B/16": ("vit_base_patch16_224", {}),
    "ResNet-50": ("resnet50", {}),
    "tiny ViT": ("vit_tiny_patch16_224", {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}),
    "tiny ResNet": ("resnet10t", {}),
}


@dataclass
class Setting:
    """What all ways of a step share."""

    step: Step
    model: fv.SelfExplainingClassifier
    images: Tensor  # (B, 3, H, W)
    labels: Tensor  # (B,)
    bits: Tensor  # (B, M, W), complements in pairs

    @property
    def is_transformer(self) -> bool:
        return isinstance(self.model.backbone, VisionTransformer)

    def first(self, count: int) -> Setting:
        """The same with the first images only."""
        return Setting(self.step, self.model, self.images[:count], self.labels[:count], self.bits[:count])


def make_setting(step: Step, device: torch.device) -> Setting:
    """Random weights, images and labels; the coalitions that the objective draws first."""
    torch.manual_seed(0)
    name, arguments = MODELS[step.model]
    model = fv.SelfExplainingClassifier(
        name, step.classes, img_size=step.image_size, backbone_gradient=1.0, model_kwargs=arguments
    )
    torch.nn.init.normal_(model.head.shares.weight, std=0.02)
    dtype = torch.bfloat16 if step.dtype == "bfloat16" else torch.float32
    images = torch.randn(step.batch, 3, step.image_size, step.image_size)
    labels = torch.randint(step.classes, (step.batch,))
    is_transformer = isinstance(model.backbone, VisionTransformer)
    layout = torch.contiguous_format if is_transformer else torch.channels_last
    model = model.to(device, dtype).to(memory_format=layout).train(step.mode != "value")
    bits = fk.sample_coalitions(step.batch, step.coalitions, model.players, seed=0, device=device)
    return Setting(step, model, images.to(device, dtype, memory_format=layout), labels.to(device), bits)


def make_call(way: str, setting: Setting, backend: str = "inductor") -> Call:
    """A step in one way: it returns the values (B, M, K), or the loss, whose gradients it leaves with the model."""
    step, model = setting.step, setting.model
    kind, is_compiled = way.removesuffix("-compiled"), way.endswith("-compiled")
    if kind == "dense":
        kind = "dense-mask" if setting.is_transformer else "dense-pixel"
    if kind == "dense-mask" and not setting.is_transformer:
        raise ValueError("a convolutional network has no attention to mask")
    options = {"backend": backend, "dynamic": False} if is_compiled else None
    function = (_values if step.mode == "value" else _loss)(kind, setting, options)

    def values() -> Tensor:
        with torch.no_grad(), precision(setting):
            return function()

    def loss() -> Tensor:
        model.zero_grad(set_to_none=True)
        with precision(setting):
            value = function()
        value.backward()
        return value.detach()

    return values if step.mode == "value" else loss


def precision(setting: Setting) -> contextlib.AbstractContextManager[Any]:
    """Autocast to bfloat16, where the step says so."""
    if setting.step.dtype != "autocast":
        return contextlib.nullcontext()
    return torch.autocast(setting.images.device.type, torch.bfloat16)


def _values(kind: str, setting: Setting, options: dict[str, Any] | None) -> Call:
    model, images, bits = setting.model, setting.images, setting.bits
    if kind == "packed" and options is None:
        return lambda: model.coalition_values(images, fv.Coalitions(bits, model.players, paired=True))
    if kind == "packed":

        def packed(images: Tensor, bits: Tensor) -> Tensor:
            return model.game.values(images, fv.Coalitions(bits, model.players, paired=True))

        function = _compiled(packed, options)
    else:
        function = _compiled(lambda images, bits: dense_values(model, images, bits, kind), options)
    return lambda: function(images, bits)


def _loss(kind: str, setting: Setting, options: dict[str, Any] | None) -> Call:
    model, images, labels, bits = setting.model, setting.images, setting.labels, setting.bits
    live = setting.step.mode == "live"
    if kind == "plain":
        plain = _compiled(lambda images, labels: F.cross_entropy(model(images), labels), options)
        return lambda: plain(images, labels)
    if kind == "packed":
        return _packed_loss(setting, options)
    dense = _compiled(
        lambda images, labels, bits, null: dense_loss(model, images, labels, bits, null, kind, live), options
    )

    def loss() -> Tensor:
        with torch.set_grad_enabled(live):
            null = model.null_value()
        return dense(images, labels, bits, null)

    return loss


def _packed_loss(setting: Setting, options: dict[str, Any] | None) -> Call:
    weights = {"regression_weight": REGRESSION_WEIGHT, "masked_task_weight": MASKED_TASK_WEIGHT}
    target = setting.step.mode
    objective = fv.JointObjective(setting.step.coalitions, **weights, target=target, regression_ramp=(0, 0), seed=0)
    if options is not None:
        objective.compile(**options)

    def loss() -> Tensor:
        objective.load_state_dict({"drawn": 0})  # the setting's coalitions every time
        return objective(setting.model, setting.images, setting.labels).loss

    return loss


def _compiled(function: Callable[..., Tensor], options: dict[str, Any] | None) -> Callable[..., Tensor]:
    return function if options is None else torch.compile(function, **options)


# -- the dense ways ------------------------------------------------------------------------------------------------


def dense_values(model: fv.SelfExplainingClassifier, images: Tensor, bits: Tensor, way: str) -> Tensor:
    """v(S) of every coalition at full length: (B, M, K)."""
    backbone, count = model.backbone, bits.shape[:2]
    present = fk.unpack_bits(bits, model.players)
    if way == "dense-mask":
        repeated = images.repeat_interleave(count[1], 0)
        tokens = backbone.forward_features(repeated, attn_mask=key_mask(backbone, present, images))
        return backbone.forward_head(tokens).unflatten(0, count)
    removed = remove_pixels(images, present, model.grid)
    if isinstance(backbone, VisionTransformer):
        return backbone(removed).unflatten(0, count)
    return read_votes(model, backbone.forward_features(removed), present)


def dense_loss(
    model: fv.SelfExplainingClassifier,
    images: Tensor,
    labels: Tensor,
    bits: Tensor,
    null: Tensor,
    way: str,
    live: bool,
) -> Tensor:
    """The objective in plain PyTorch: coalitions at full length, Φ in memory."""
    backbone, players = model.backbone, model.players
    present = fk.unpack_bits(bits, players)
    if isinstance(backbone, VisionTransformer):
        tokens = backbone.forward_features(images)
        logits, features = backbone.forward_head(tokens), tokens[:, backbone.num_prefix_tokens :]
        values = dense_values(model, images, bits, way)
    else:  # one batch, so that batch norm sees both, as in ours
        batch = torch.cat([images, remove_pixels(images, present, model.grid)])
        image_map, coalition_map = backbone.forward_features(batch).split([len(images), len(batch) - len(images)])
        logits, features = backbone.forward_head(image_map), image_map.flatten(2).transpose(1, 2)
        values = read_votes(model, coalition_map, present)
    members = present.to(features.dtype)
    even = ((logits.detach() - null) / players).unsqueeze(1).expand(-1, players, -1)
    delta = model.head.shares(model.head.explainer(Features(features)))
    phi = delta - delta.mean(1, keepdim=True) + (_fixed_votes(model, features) if model.base == "votes" else even)
    target = values if live else values.detach()
    residual = target - null - torch.einsum("bmp,bpk->bmk", members, phi)
    left = (values - null - torch.einsum("bmp,bpk->bmk", members, even)).detach()
    regression = residual.square().mean() / left.square().mean()
    masked_task = F.cross_entropy(values.flatten(0, 1), labels.repeat_interleave(bits.shape[1]))
    return F.cross_entropy(logits, labels) + REGRESSION_WEIGHT * regression + MASKED_TASK_WEIGHT * masked_task


def key_mask(vit: VisionTransformer, present: Tensor, images: Tensor) -> Tensor:
    """0 for present keys and −∞ for absent ones, (B·M, 1, 1, Q + P), made once a step in the dtype of attention.

    Rows lie at multiples of 16 bytes: else the GPU's fused attention would copy the mask in every block.
    """
    device = images.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else images.dtype
    keys = F.pad(present.flatten(0, 1), (vit.num_prefix_tokens, 0), value=True)
    length = keys.shape[1]
    mask = torch.zeros(keys.shape[0], -(-length // 8) * 8, dtype=dtype, device=images.device)[:, :length]
    return mask.masked_fill_(~keys, -torch.inf)[:, None, None, :]


def remove_pixels(images: Tensor, present: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B·M, C, H, W): the images repeated, absent patches' pixels 0."""
    batch, coalitions, _ = present.shape
    height, width = images.shape[2] // grid[0], images.shape[3] // grid[1]
    cells = present.view(batch * coalitions, 1, *grid).to(images.dtype)
    mask = cells.repeat_interleave(height, 2).repeat_interleave(width, 3)
    return images.repeat_interleave(coalitions, 0) * mask


def read_votes(model: fv.SelfExplainingClassifier, feature_map: Tensor, present: Tensor) -> Tensor:
    """Σ_{p∈S} (W e_p + b)/P, present cells pooled before the product: (B, M, K)."""
    weight, bias = model.game.vote_weight()
    cells = feature_map.flatten(2).transpose(1, 2).unflatten(0, present.shape[:2])
    members = present.unsqueeze(-1).to(cells.dtype)
    pooled, share = (cells * members).sum(2) / model.players, members.sum(2) / model.players
    return F.linear(pooled, weight) + share * bias


@torch.no_grad()
def _fixed_votes(model: fv.SelfExplainingClassifier, features: Tensor) -> Tensor:
    """(W e_p + b)/P without gradient: (B, P, K)."""
    return F.linear(features, *model.game.vote_weight()) / model.players
