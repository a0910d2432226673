"""Small timm models of every supported kind, with weights far from their initialisation, and images for them."""

from contextlib import contextmanager

import timm
import torch
from timm.layers import config, set_fused_attn
from torch.utils.data import TensorDataset

import fastshap_vision as fv

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
#: Smaller still.
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
VISION_TRANSFORMERS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers, layer scale": (
        "vit_tiny_patch16_224",
        {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.3},
    ),
    "query and key norm, pre-norm": ("vit_tiny_patch16_224", {"qk_norm": True, "pre_norm": True}),
    "norms within attention and MLP": ("vit_tiny_patch16_224", {"scale_attn_norm": True, "scale_mlp_norm": True}),
    "DINOv2 with SwiGLU": ("vit_giant_patch14_dinov2", {}),
    "AIMv2 (RMS norm, SwiGLU)": ("aimv2_large_patch14_224", {}),
    "average pooling": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False, "class_token": False}),
    "average pooling, class token": ("vit_tiny_patch16_224", {"global_pool": "avg", "fc_norm": False}),
    "average pooling, norm behind": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}),
    "SigLIP": ("vit_base_patch16_siglip_224", {}),
}
#: Kinds whose own logits are a sum of votes.
VOTING = ("average pooling", "average pooling, class token", "AIMv2 (RMS norm, SwiGLU)")
CONVOLUTIONAL = (
    "resnet18",
    "regnetx_002",
    "mobilenetv2_050",
    "efficientnet_b0",
    "mobilenetv3_small_050",
    "convnext_atto",
)


@contextmanager
def fused_attention(enable):
    """What timm's attention is made with."""
    before = config._USE_FUSED_ATTN
    set_fused_attn(enable)
    try:
        yield
    finally:
        config._USE_FUSED_ATTN = before


def added(present):
    """A mask of keys as attention adds it: timm's attention pooling adds True as 1 where it is not fused."""
    return torch.zeros(present.shape).masked_fill_(~present, -torch.inf)


def network(name, classes=7, noise=0.05, **options):
    """A timm model in evaluation mode with random weights, biases and norms included."""
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=classes, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model.eval()


def create(kind, classes=7):
    """A network of one of the kinds above."""
    name, options = VISION_TRANSFORMERS.get(kind, (kind, {}))
    return network(name, classes, **(SMALL if kind in VISION_TRANSFORMERS else {}), **options)


def image_size(kind):
    return 32 if kind in VISION_TRANSFORMERS else 64


def with_shares(model, std=0.1):
    """The model in evaluation mode, its shares, if it has any, no longer 0."""
    if hasattr(model.head, "shares"):
        torch.nn.init.normal_(model.head.shares.weight, std=std)
    return model.eval()


def converted(kind, **options):
    """A network that explains itself, its shares not 0."""
    return with_shares(fv.convert(create(kind), img_size=image_size(kind), **options))


def images(batch=3, size=32, channels=3):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(2))


def labelled(images, classes=7):
    """A data set of images with labels in turn."""
    return TensorDataset(images, torch.arange(len(images)) % classes)
