"""What packing knows of a transformer's blocks. Whatever else a block may be is left to attention masks.

The packed pass runs a block's parts on rows of many sequences, not the block: what a hook or a foreign part makes of
(B, N, D) tokens, it would miss or misread.
"""

from __future__ import annotations

from typing import Any

from timm.layers import (
    DropPath,
    GluMlp,
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    Mlp,
    RmsNorm,
    RmsNormFp32,
    SimpleNorm,
    SimpleNormFp32,
    SwiGLU,
)
from timm.layers.activations import GELU, GELUTanh, QuickGELU, Swish
from timm.layers.linear import Linear
from torch import nn

from .hooks import has_global_hooks, has_hooks, is_overridden
from .sharded import class_of

#: Modules whose output for a token depends on that token alone, in whatever shape the tokens come.
TOKEN_BY_TOKEN: set[type[nn.Module]] = {
    *(nn.Identity, nn.Dropout, DropPath, LayerScale, nn.Linear, Linear),
    *(nn.LayerNorm, LayerNorm, LayerNormFp32, nn.RMSNorm, RmsNorm, RmsNormFp32, SimpleNorm, SimpleNormFp32),
    *(Mlp, GluMlp, SwiGLU, nn.GELU, nn.SiLU, nn.ReLU, nn.Sigmoid, nn.Tanh, GELU, GELUTanh, QuickGELU, Swish),
}


def packing_problems(backbone: Any, block_type: type, attention_types: tuple[type, ...]) -> list[str]:
    """What the packed pass can't do of these blocks as they are now; dense attention with a mask can."""
    blocks = list(backbone.blocks)
    kinds = {class_of(block).__name__ for block in blocks if class_of(block) is not block_type}
    if kinds:
        return [f"blocks of type {', '.join(sorted(kinds))} (supported: {block_type.__name__})"]
    others = {type(block.attn).__name__ for block in blocks if type(block.attn) not in attention_types}
    if others:
        supported = " or ".join(kind.__name__ for kind in attention_types)
        return [f"attention of type {', '.join(sorted(others))} (supported: {supported})"]
    if any(block.attn.attn_drop.p > 0 for block in blocks):
        return ["attn_drop_rate > 0 (packed attention has no dropout)"]
    if has_global_hooks():
        return ["hooks on every module (packing would miss them)"]
    known = {block_type, *attention_types, *TOKEN_BY_TOKEN}
    left: list[Any] = [*blocks, backbone.norm, backbone.fc_norm]
    while left:  # every pass comes here, and modules() takes longer
        module = left.pop()
        if class_of(module) not in known:
            return [f"a {type(module).__name__} in its blocks or norms (packing does not know what it does)"]
        if has_hooks(module) or is_overridden(module):
            return [f"hooks on a {type(module).__name__}, or another forward of it (packing would miss them)"]
        left.extend(child for child in module._modules.values() if child is not None)
    return []
