"""One training step, forward and backward: packed coalitions against dense masked ones, with the same loss."""

import torch
from torch import Tensor
from torch.nn import functional as F

import fastshap_kernels as fk
import fastshap_vision as fv

BATCH, COALITIONS, CLASSES = 4, 4, 1000


def dense_loss(model: fv.SelfExplainingClassifier, images: Tensor, labels: Tensor, bits: Tensor) -> Tensor:
    """The objective in plain PyTorch: coalitions at full length, absent keys at minus infinity, phi in memory."""
    vit, players = model.backbone, model.players
    present = fk.unpack_bits(bits, players)
    tokens = vit.forward_features(images)
    logits = vit.forward_head(tokens)
    keys = F.pad(present.flatten(0, 1), (vit.num_prefix_tokens, 0), value=True)
    mask = keys[:, None, None, :].expand(-1, 1, keys.shape[1], -1)
    masked_tokens = vit.forward_features(images.repeat_interleave(COALITIONS, 0), attn_mask=mask)
    values = vit.forward_head(masked_tokens).unflatten(0, present.shape[:2])
    with torch.no_grad():
        null = model.null_value()
    delta = model.shares(model.explainer(tokens[:, vit.num_prefix_tokens :]))
    even = ((logits.detach() - null) / players).unsqueeze(1)
    phi = delta - delta.mean(1, keepdim=True) + even
    members = present.float()
    residual = values.detach() - null - torch.einsum("bmp,bpk->bmk", members, phi)
    left = values.detach() - null - torch.einsum("bmp,bpk->bmk", members, even.expand(-1, players, -1))
    task = F.cross_entropy(logits, labels)
    masked_task = F.cross_entropy(values.flatten(0, 1), labels.repeat_interleave(COALITIONS))
    return task + residual.square().mean() / left.square().mean() + masked_task


def test_joint_step(compare):
    torch.manual_seed(0)
    model = fv.SelfExplainingClassifier("vit_small_patch16_224", num_classes=CLASSES)
    torch.nn.init.normal_(model.shares.weight, std=0.02)
    images, labels = torch.randn(BATCH, 3, 224, 224), torch.randint(CLASSES, (BATCH,))
    bits = fk.sample_coalitions(BATCH, COALITIONS, model.players, seed=0)

    def packed() -> Tensor:
        model.zero_grad()
        loss = fv.ShapleyObjective(COALITIONS, 1.0, 1.0, regression_ramp=(0, 0), seed=0)(model, images, labels).loss
        loss.backward()
        return loss.detach()

    def dense() -> Tensor:
        model.zero_grad()
        loss = dense_loss(model, images, labels, bits)
        loss.backward()
        return loss.detach()

    torch.testing.assert_close(packed(), dense(), rtol=1e-4, atol=0)
    compare(
        "joint training step",
        "ViT-S/16 at 224, B 4, M 4, float32",
        packed,
        dense,
        against="dense masked coalitions, same loss",
        bar=1.9,
        rounds=7,
        warmup=0,
    )
