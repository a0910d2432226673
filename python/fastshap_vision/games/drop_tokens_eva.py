"""timm's `Eva` (EVA-02, DINOv3, Perception Encoder) drops tokens: rotary positions go with their tokens."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import Tensor, nn

from .drop_tokens import TokenDropping
from .mask_attention import MaskedAttention
from .packing import packing_problems
from .transformer import check_supported, norm_queries_and_keys


class EvaGame(TokenDropping):
    """The game of a timm `Eva`: every token that stays keeps the rotary position it has in the full image.

    timm's training-time changes of the rotary coordinates (`rope_shift_coords` and the like) are honoured: drawn once
    a pass, alike for images and coalitions.
    """

    def __init__(self, backbone: Eva, votes: bool) -> None:
        check_supported(backbone, packing_problems(backbone, EvaBlock, (EvaAttention, AttentionRope)))
        super().__init__(backbone, votes, MaskedAttention(backbone, votes))
        self.pools_prefix = True
        if backbone.rope is not None and not backbone.rope_mixed:
            # With dynamic_img_size timm makes the positions anew in every pass, on the CPU, and the device waits.
            was_training = backbone.rope.training
            with torch.no_grad():
                table = self._rotary_table(backbone.rope.eval().get_embed(shape=list(self.grid)))
            backbone.rope.train(was_training)
            backbone.register_buffer("rotary_table", table, persistent=False)

    def _packing_problems(self) -> list[str]:
        return packing_problems(self.backbone, EvaBlock, (EvaAttention, AttentionRope))

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        backbone = self.backbone
        tokens = backbone.patch_embed(images)
        if backbone.dynamic_img_size:
            tokens = tokens.flatten(1, 2)
        learned = [backbone.cls_token, backbone.reg_token]
        prefix = [token.expand(tokens.shape[0], -1, -1) for token in learned if token is not None]
        positions = 0 if backbone.pos_embed is None else backbone.pos_embed
        if backbone.no_embed_class:
            tokens = torch.cat([*prefix, tokens + positions], 1)
        else:
            tokens = torch.cat([*prefix, tokens], 1) + positions
        return backbone.norm_pre(backbone.pos_drop(tokens)), self._rotary_positions()

    def _rotary_positions(self) -> list[Tensor] | None:
        """Each block's (Q + P, X), with X = 2·head_dim, or heads·2·head_dim where each head has its own."""
        rope, depth = self.backbone.rope, len(self.backbone.blocks)
        if rope is None:
            return None
        if self.backbone.rope_mixed:
            return [self._rotary_table(of_block) for of_block in rope.get_embed(shape=list(self.grid))]
        if rope.training and rope.aug_active:
            return [self._rotary_table(rope.get_embed(shape=list(self.grid)))] * depth
        return [self.backbone.rotary_table] * depth

    def _rotary_table(self, embed: Tensor) -> Tensor:
        """timm's (P, 2·head_dim) or (heads, P, 2·head_dim), sines first, with a prefix that is not rotated."""
        embed = embed if embed.ndim == 3 else embed.unsqueeze(0)
        sine = embed.new_zeros(embed.shape[0], self.prefix, embed.shape[2] // 2)
        still = torch.cat([sine, torch.ones_like(sine)], 2)
        return torch.cat([still, embed], 1).transpose(0, 1).flatten(1)

    def _queries_keys_values(self, block: Any, normed: Tensor, rotary: Tensor | None) -> Tensor:
        attention = block.attn
        qkv = norm_queries_and_keys(attention, _project(attention, normed))
        if rotary is None:
            return qkv
        rotary = rotary.unflatten(-1, (-1, 2 * attention.head_dim)).unsqueeze(-3)
        turned = apply_rot_embed_cat(qkv[..., :2, :, :], rotary, half=attention.rotate_half)
        return torch.cat([turned, qkv[..., 2:, :, :]], -3)

    def _scale_branch(self, block: EvaBlock, branch: int, rows: Tensor) -> Tensor:
        gamma = block.gamma_1 if branch == 1 else block.gamma_2
        return rows if gamma is None else gamma * rows


def _project(attention: EvaAttention | AttentionRope, normed: Tensor) -> Tensor:
    """(..., D) → queries, keys and values (..., 3, heads, head_dim); heads that share keys get copies of them."""
    if attention.qkv is not None:
        if getattr(attention, "q_bias", None) is None:
            qkv = attention.qkv(normed)
        else:  # a plain Linear, as packing has checked, without a bias of its own
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
            qkv = nn.functional.linear(normed, attention.qkv.weight, bias)
        return qkv.unflatten(-1, (3, attention.num_heads, attention.head_dim))
    parts = (attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed))
    heads = [part.unflatten(-1, (-1, attention.head_dim)) for part in parts]
    return torch.stack([part.repeat_interleave(attention.num_heads // part.shape[-2], -2) for part in heads], -3)
