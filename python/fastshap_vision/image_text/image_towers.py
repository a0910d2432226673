"""The image tower of a model of images and texts, as the timm model that computes the same."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from .._modes import evaluation_mode
from ..games.base import UnsupportedModelError
from ..games.probe import is_close
from ..models.backbone import project_by_identity

#: transformers' names of parts, and timm's.
_OF_TRANSFORMERS = (
    (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
    (r"^embeddings\.class_embedding$", "cls_token"),
    (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
    (r"^pre_layrnorm\.", "norm_pre."),
    (r"^post_layernorm\.", "norm."),
    (r"^encoder\.layers\.", "blocks."),
    (r"^head\.probe$", "attn_pool.latent"),
    (r"^head\.attention\.", "attn_pool."),
    (r"^head\.layernorm\.", "attn_pool.norm."),
    (r"^head\.mlp\.", "attn_pool.mlp."),
    (r"\.layer_norm(\d)\.", r".norm\1."),
    (r"\.self_attn\.", ".attn."),
    (r"\.out_proj\.", ".proj."),
)
#: open_clip's, which are OpenAI's.
_OF_OPEN_CLIP = (
    (r"^conv1\.", "patch_embed.proj."),
    (r"^class_embedding$", "cls_token"),
    (r"^positional_embedding$", "pos_embed"),
    (r"^ln_pre\.", "norm_pre."),
    (r"^ln_post\.", "norm."),
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.ln_(\d)\.", r".norm\1."),
    (r"\.ls_(\d)\.", r".ls\1."),
    (r"\.in_proj_", ".qkv."),
    (r"\.out_proj\.", ".proj."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
)
#: timm's names of activations, by transformers'.
_ACTIVATIONS = {
    "quick_gelu": "quick_gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


def as_timm(model: Any, embed: Any, images: Tensor) -> nn.Module:
    """The timm model that computes `embed(images)`, with a copy of the model's weights, in evaluation mode.

    Args:
        model: transformers' CLIPModel or SiglipModel, or an open_clip model.
        embed: images to what the model makes of them, (B, D), before it is normalised.
        images: (2, C, H, W), for the comparison.

    Raises:
        UnsupportedModelError: where the image tower has parts that timm's vision transformer has not: what is made of
            its weights must give the same embeddings.
    """
    try:
        tower = _of_transformers(model) if hasattr(model, "vision_model") else _of_open_clip(model.visual)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, AssertionError) as error:
        raise _not_timms(model, f"{type(error).__name__}: {error}") from error
    tower = tower.to(next(model.parameters())).eval()
    with torch.no_grad(), evaluation_mode(model):
        same = is_close(tower(images), embed(images))
    if not same:
        raise _not_timms(model, "with the same weights it gives another embedding")
    return tower


def _not_timms(model: Any, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"The image tower of this {type(model).__name__} is none of timm's vision transformers ({reason}).",
        "Its patches are removed as pixels: call explain_pair, which needs no timm model.",
    )


def _of_transformers(model: Any) -> nn.Module:
    config, vision = model.config.vision_config, model.vision_model
    weights = {_renamed(name, _OF_TRANSFORMERS): tensor for name, tensor in vision.state_dict().items()}
    is_clip = hasattr(model, "visual_projection")
    if is_clip:
        _project(weights, model.visual_projection.weight, getattr(model.visual_projection, "bias", None))
    options = {
        "img_size": config.image_size,
        "patch_size": config.patch_size,
        "in_chans": config.num_channels,
        "embed_dim": config.hidden_size,
        "depth": config.num_hidden_layers,
        "num_heads": config.num_attention_heads,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "act_layer": _ACTIVATIONS[config.hidden_act],
        "num_classes": model.config.projection_dim if is_clip else 0,
    }
    return _filled("clip" if is_clip else "siglip", weights, options, config.layer_norm_eps)


def _of_open_clip(visual: Any) -> nn.Module:
    if hasattr(visual, "trunk"):
        return _of_trunk(visual)
    weights = {_renamed(name, _OF_OPEN_CLIP): tensor for name, tensor in visual.state_dict().items()}
    _project(weights, weights.pop("proj").mT, None)
    block, norm = visual.transformer.resblocks[0], visual.ln_post
    options: dict[str, Any] = {
        "img_size": tuple(visual.image_size),
        "patch_size": tuple(visual.patch_size),
        "embed_dim": visual.transformer.width,
        "depth": len(visual.transformer.resblocks),
        "num_heads": block.attn.num_heads,
        "mlp_ratio": block.mlp.c_fc.out_features / visual.transformer.width,
        "act_layer": {"QuickGELU": "quick_gelu", "GELU": "gelu"}[type(block.mlp.gelu).__name__],
        "num_classes": visual.output_dim,
    }
    if "blocks.0.ls1.gamma" in weights:
        options["init_values"] = 1.0
    return _filled("clip", weights, options, norm.eps)


def _of_trunk(visual: Any) -> nn.Module:
    """open_clip's wrapper of a timm model, whose projection may stand behind it."""
    tower = copy.deepcopy(visual.trunk)
    projection = getattr(visual.head, "proj", None)
    if projection is None:
        project_by_identity(tower)
        return tower
    tower.reset_classifier(projection.out_features)
    classifier = tower.get_classifier()
    with torch.no_grad():
        classifier.weight.copy_(projection.weight)
        classifier.bias.zero_() if projection.bias is None else classifier.bias.copy_(projection.bias)
    return tower


def _renamed(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _project(weights: dict[str, Tensor], weight: Tensor, bias: Tensor | None) -> None:
    weights["head.weight"] = weight
    weights["head.bias"] = weight.new_zeros(len(weight)) if bias is None else bias


def _filled(kind: str, weights: dict[str, Tensor], options: Mapping[str, Any], eps: float) -> nn.Module:
    """timm's vision transformer of that kind with the weights, all of which it must have a place for."""
    with torch.random.fork_rng(devices=[]):
        tower = timm.create_model(f"vit_base_patch16_{kind}_224", **options)
    places = tower.state_dict()
    for name in [name for name in weights if re.search(r"\.[qkv]_proj\.", name)]:
        if ".q_proj." in name:
            parts = [weights.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            weights[name.replace(".q_proj.", ".qkv.")] = torch.cat(parts)
    for end in ("weight", "bias"):
        joint = weights.pop(f"attn_pool.in_proj_{end}", None)
        if joint is not None:
            query, keys_and_values = joint.tensor_split([len(joint) // 3])
            weights |= {f"attn_pool.q.{end}": query, f"attn_pool.kv.{end}": keys_and_values}
    weights = {name: tensor for name, tensor in weights.items() if not name.endswith("position_ids")}
    fitted = {name: x.reshape(places[name].shape) if name in places else x for name, x in weights.items()}
    tower.load_state_dict(fitted)
    for module in tower.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = eps
    project_by_identity(tower)
    return tower
