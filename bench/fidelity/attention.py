"""Methods that read a model from within: Grad-CAM, attention rollout, Chefer's relevance."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from captum.attr import LayerGradCam
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from bench.fidelity.subject import Subject, in_parts
from fastshap_kernels._checks import fail

#: As many images without attention maps, or features and their gradients, take as much memory as one with them.
WITH_MAPS = 4


def grad_cam(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """Σ_c a_c · A_pc, a_c the mean over cells of ∂f/∂A_c; not clipped at 0, which would only tie the least.

    A is a CNN's last feature map, or the patch tokens that enter a ViT's last block (what its norm1 reads): behind that
    block no logit of a class token depends on them.

    Source: Selvaraju et al., Grad-CAM (2017).
    """
    cam = _grad_cam_of_tokens if subject.family == "vit" else _grad_cam_of_map
    return in_parts(partial(cam, subject), images, target, WITH_MAPS)


class _Features(nn.Module):
    """`forward_features` as a layer that captum can watch: not every family ends it with one."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.forward_features(images)


def _grad_cam_of_map(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    features = _Features(subject.model)
    method = LayerGradCam(lambda part: subject.model.forward_head(features(part)), features)
    cam = method.attribute(images.detach().requires_grad_(), target)[:, 0]
    return _check_grid("grad_cam", subject, (cam.shape[1], cam.shape[2]), cam.flatten(1))


def _grad_cam_of_tokens(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    found = []
    handle = subject.model.blocks[-1].register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    try:
        logit = _logit(subject, images, target)
    finally:
        handle.remove()
    (gradient,) = torch.autograd.grad(logit, found)
    prefix = subject.model.num_prefix_tokens
    tokens, gradient = found[0][:, prefix:], gradient[:, prefix:]
    cam = (tokens * gradient.mean(1, keepdim=True)).sum(2)
    return _check_grid("grad_cam", subject, subject.model.patch_embed.grid_size, cam)


def attention_rollout(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """Product over blocks of (Ā + I) with rows that sum to 1, Ā the mean over heads; the same for every class.

    Source: Abnar and Zuidema, Quantifying attention flow in transformers (2020).
    """

    @torch.no_grad()
    def call(part: Tensor, of: Tensor) -> Tensor:
        with attention_maps(subject.model) as maps:
            subject.model(part)
        flow = _identity(maps)
        for attention in maps:
            step = attention.mean(1) + _identity(maps)
            flow = step / step.sum(2, keepdim=True) @ flow
        return _read(subject, flow)

    return in_parts(call, images, target, WITH_MAPS)


def chefer(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """R ← R + Ā R over the blocks, from R = I, with Ā = mean over heads of (∂f/∂A ⊙ A)⁺.

    This is the rule for self-attention of Generic attention-model explainability (ICCV 2021), which replaced the
    layer-wise relevance of Transformer interpretability beyond attention visualization (CVPR 2021) by attention itself.

    Source: Chefer, Gur, Wolf, ICCV 2021, equations 5 and 6.
    """

    def call(part: Tensor, of: Tensor) -> Tensor:
        with attention_maps(subject.model) as maps:
            logit = _logit(subject, part, of)
        relevance = _identity(maps)
        for attention, gradient in zip(maps, torch.autograd.grad(logit, maps), strict=True):
            relevance = relevance + (attention * gradient).detach().clamp_min(0).mean(1) @ relevance
        return _read(subject, relevance)

    return in_parts(call, images, target, WITH_MAPS)


@contextmanager
def attention_maps(model: VisionTransformer) -> Iterator[list[Tensor]]:
    """A list that a forward pass fills with A of every block, (B, heads, T, T), behind the softmax."""
    attentions: list[Any] = [getattr(block, "attn", None) for block in model.blocks]
    if not all(hasattr(attention, "fused_attn") and hasattr(attention, "attn_drop") for attention in attentions):
        kinds = sorted({type(block).__name__ for block in model.blocks})
        fail("attention_maps", "model", "a VisionTransformer whose blocks have `attn`", f"blocks {kinds}")
    maps: list[Tensor] = []
    flags = [attention.fused_attn for attention in attentions]
    handles = [
        attention.attn_drop.register_forward_hook(lambda *call: maps.append(call[2])) for attention in attentions
    ]
    try:
        for attention in attentions:
            attention.fused_attn = False
        yield maps
    finally:
        for attention, flag, handle in zip(attentions, flags, handles, strict=True):
            attention.fused_attn = flag
            handle.remove()


def _logit(subject: Subject, images: Tensor, target: Tensor) -> Tensor:
    """Sum over the images of f_target, with the graph behind it, whether or not the parameters are frozen."""
    with torch.enable_grad():
        logits = subject.model(images.detach().requires_grad_())
        return logits.gather(1, target.unsqueeze(1)).sum()


def _identity(maps: list[Tensor]) -> Tensor:
    return torch.eye(maps[0].shape[2], device=maps[0].device, dtype=maps[0].dtype)


def _read(subject: Subject, flow: Tensor) -> Tensor:
    """(B, T, T), from what each token (row) gathers of each: what the pooled tokens gather of the patches, (B, P)."""
    model = subject.model
    prefix = model.num_prefix_tokens
    if model.global_pool == "token":
        pooled = slice(0, 1)
    elif model.global_pool == "avg":
        pooled = slice(0 if model.pool_include_prefix else prefix, None)
    else:
        fail("attention", "model", 'a VisionTransformer with global_pool "token" or "avg"', model.global_pool)
    return _check_grid("attention", subject, model.patch_embed.grid_size, flow[:, pooled, prefix:].mean(1))


def _check_grid(op: str, subject: Subject, grid: tuple[int, int], cells: Tensor) -> Tensor:
    """Cells of the model's own grid, which must be the game's."""
    if tuple(grid) != tuple(subject.grid):
        fail(op, "subject", f"of a game on the model's own grid {tuple(grid)}", tuple(subject.grid))
    return cells
