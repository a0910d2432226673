"""timm's `VisionTransformer` drops tokens."""

from __future__ import annotations

from timm.layers import Attention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor

from .drop_tokens import TokenDropping
from .mask_attention import MaskedAttention
from .packing import packing_problems
from .transformer import check_supported, norm_queries_and_keys


class VisionTransformerGame(TokenDropping):
    """The game of a timm `VisionTransformer`, DeiT's distilled ones included."""

    def __init__(self, backbone: VisionTransformer, votes: bool) -> None:
        check_supported(backbone, packing_problems(backbone, Block, (Attention,)))
        super().__init__(backbone, votes, MaskedAttention(backbone, votes))

    def _packing_problems(self) -> list[str]:
        return packing_problems(self.backbone, Block, (Attention,))

    def _embed(self, images: Tensor) -> tuple[Tensor, None]:
        backbone = self.backbone
        return backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(backbone.patch_embed(images)))), None

    def _queries_keys_values(self, block: Block, normed: Tensor, rotary: Tensor | None) -> Tensor:
        attention = block.attn
        qkv = attention.qkv(normed).unflatten(-1, (3, attention.num_heads, attention.head_dim))
        return norm_queries_and_keys(attention, qkv)

    def _scale_branch(self, block: Block, branch: int, rows: Tensor) -> Tensor:
        return block.ls1(rows) if branch == 1 else block.ls2(rows)
