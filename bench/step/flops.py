"""The arithmetic that a step cannot do without: FLOPs of its present tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games.base import Features


def step_flops(model: fv.SelfExplainingClassifier, bits: Tensor, mode: str) -> float:
    """FLOPs of one step of `mode` on coalitions `bits` (B, M, W); a multiply and an add are two.

    Every present token goes through every block once, an image's patches are embedded once, and a coalition costs the
    classifier, and the regression, one product with its weight. A backward pass costs what the products with weights
    and between activations cost forward, twice; the pixels need no gradient.
    """
    batch, coalitions, _ = bits.shape
    sizes = fk.unpack_bits(bits, model.players).sum(-1)
    joint = mode != "value"
    images = batch if joint else 0
    if isinstance(model.backbone, VisionTransformer):
        vit = model.backbone
        lengths = [*(sizes.flatten() + vit.num_prefix_tokens).tolist(), *[tokens_of(vit)] * images]
        embedding = batch * embedding_flops(vit)
        forward = embedding + sum(encoder_flops(vit, length) for length in lengths)
        explanation = batch * sum(block_flops(block, model.players) for block in model.head.explainer.blocks)
        if isinstance(model.head.explainer.projection, nn.Linear):
            explanation += 2.0 * batch * model.players * model.head.explainer.projection.weight.numel()
    else:
        # No cell is left out: its pixels are there, in the mean colour.
        forward, embedding = ((batch * coalitions + images) * flops for flops in convolution_flops(model))
        explanation = batch * convolution_explanation_flops(model)
    head = 2 * model.game.feature_width * model.num_classes
    forward += (batch * coalitions + images) * head
    if not joint:
        return forward
    shares = 2 * model.head.shares.weight.numel()
    return 3 * (forward + explanation + batch * coalitions * shares) - embedding


def tokens_of(vit: VisionTransformer) -> int:
    return vit.num_prefix_tokens + vit.patch_embed.num_patches


def embedding_flops(vit: VisionTransformer) -> float:
    """The patch embedding of one image."""
    return 2.0 * vit.patch_embed.num_patches * vit.patch_embed.proj.weight.numel()


def encoder_flops(vit: VisionTransformer, length: int) -> float:
    """All blocks, on one sequence."""
    return sum(block_flops(block, length) for block in vit.blocks)


def block_flops(block: nn.Module, length: int) -> float:
    """One block on one sequence: four products with weights, and the two of attention."""
    attention = block.attn
    weights = (attention.qkv, attention.proj, block.mlp.fc1, block.mlp.fc2)
    products = sum(2.0 * length * layer.weight.numel() for layer in weights)
    return products + 4.0 * length**2 * attention.num_heads * attention.head_dim


def convolution_flops(model: fv.SelfExplainingClassifier) -> tuple[float, float]:
    """One image's feature map, counted rather than derived; and the first convolution's part of it."""
    backbone, first = model.backbone, []
    convolution = next(layer for layer in backbone.modules() if isinstance(layer, nn.Conv2d))
    hook = convolution.register_forward_hook(
        lambda layer, _, output: first.append(2.0 * output.numel() * layer.weight[0].numel())
    )
    forward = _count(lambda: backbone.forward_features(_one_image(model)))
    hook.remove()
    return forward, first[0]


def convolution_explanation_flops(model: fv.SelfExplainingClassifier) -> float:
    features = _one_image(model).new_zeros(1, model.players, model.game.feature_width)
    return _count(lambda: model.head.explainer(Features(features)))


def _one_image(model: fv.SelfExplainingClassifier) -> Tensor:
    parameter = next(model.parameters())
    return torch.zeros(1, *model.game.input_size, device=parameter.device, dtype=parameter.dtype)


def _count(call: Callable[[], Tensor]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())
