"""Transformers whose blocks can't be packed play by masking the attention to absent tokens.

The values are those of token dropping: a key at −∞ in every layer is a token that is not there. All tokens are
computed, absent ones too, so a coalition costs as much as an image.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastshap_kernels import pack_tokens, unpack_bits

from .game import JointPass
from .token_dropping import Layout, TokenDropping, check_supported


class MaskedAttention(TokenDropping):
    """The game of a timm `VisionTransformer` or `Eva` with any blocks that take timm's `attn_mask`.

    v(S) and v(∅) are defined as by `TokenDropping`.
    """

    packs = False

    def __init__(self, backbone: VisionTransformer | Eva, votes: bool) -> None:
        check_supported(backbone, _blocks_without_mask(backbone))
        super().__init__(backbone, votes)
        self.pools_prefix = isinstance(backbone, Eva)

    def values(self, images: Tensor, bits: Tensor, paired: bool = False, rows: int | None = None) -> Tensor:
        """v(S) of every coalition: (B, M, K). `paired` and `rows` change nothing here."""
        tokens, rope = self._embed_with_rope(images)
        tokens, mask = self._coalitions(tokens, bits)
        return self._read_coalitions(self._run_blocks(tokens, rope, mask), bits)

    def joint(self, images: Tensor, bits: Tensor, paired: bool = False, rows: int | None = None) -> JointPass:
        """Full images and coalitions in one batch."""
        tokens, rope = self._embed_with_rope(images)
        coalitions, mask = self._coalitions(tokens, bits)
        everybody = mask.new_ones(tokens.shape[0], *mask.shape[1:])
        earlier: list[Tensor] = []
        tokens = self._run_blocks(torch.cat([tokens, coalitions]), rope, torch.cat([everybody, mask]), earlier)
        of_images, of_coalitions = tokens.split([images.shape[0], coalitions.shape[0]])
        earlier = [stage[: images.shape[0], self.prefix :] for stage in earlier]
        features, logits = self._read_images(self.backbone.norm(of_images), earlier)
        return JointPass(features, logits, self._read_coalitions(of_coalitions, bits))

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        pool = self.backbone.global_pool
        if self.patches_vote or pool == "avg" or (pool == "map" and not (self.pools_prefix and self.prefix)):
            return super().null()
        # No patch is present, so any image gives the prefix alone.
        image = self.vote_weight()[0].new_zeros(1, *self.input_size)
        nobody = torch.zeros(1, 1, (self.players + 31) // 32, dtype=torch.int32, device=image.device)
        return self.values(image, nobody)[0, 0]

    def explanation_block(self) -> nn.Module:
        """A transformer block of the model's width."""
        attention = next(part for part in self.backbone.blocks.modules() if hasattr(part, "num_heads"))
        return Block(self.feature_width, attention.num_heads, qkv_bias=True)

    def _embed_with_rope(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens before the first block, (B, Q + P, D), and timm's rotary positions, if any."""
        backbone = self.backbone
        embedded = backbone._pos_embed(backbone.patch_embed(images))
        tokens, rope = embedded if isinstance(backbone, Eva) else (embedded, None)
        return backbone.norm_pre(tokens), rope

    def _coalitions(self, tokens: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B·M, Q + P, D) of every coalition, 0 where absent, and which keys it sees, (B·M, 1, 1, Q + P)."""
        present = unpack_bits(bits, self.players).flatten(0, 1)
        keys = nn.functional.pad(present, (self.prefix, 0), value=True)
        # A weight of 0 does not silence NaN: what is absent is no number of the image's.
        tokens = torch.where(keys.unsqueeze(2), tokens.repeat_interleave(bits.shape[1], 0), 0.0)
        # Attention over nothing would be NaN. Where there is no prefix either, nobody reads what comes instead.
        keys = keys | ~keys.any(1, keepdim=True)
        return tokens, keys[:, None, None, :]

    def _run_blocks(
        self, tokens: Tensor, rope: Tensor | None, mask: Tensor, earlier: list[Tensor] | None = None
    ) -> Tensor:
        """All blocks without the final norm. timm drops its gradient checkpointing under a mask: here it holds.

        `earlier` is filled with the tokens behind every block but the last, where they are wanted.
        """
        for index, block in enumerate(self.backbone.blocks):
            arguments: dict[str, Any] = {"attn_mask": mask}
            if rope is not None:
                arguments["rope"] = rope[index] if self.backbone.rope_mixed else rope
            if self.backbone.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, **arguments)
            else:
                tokens = block(tokens, **arguments)
            if earlier is not None and self.intermediate_widths and index < len(self.backbone.blocks) - 1:
                earlier.append(tokens)
        return tokens

    def _read_coalitions(self, tokens: Tensor, bits: Tensor) -> Tensor:
        """The coalitions' tokens before the final norm → (B, M, K), by the same reading as packed tokens."""
        each = bits.flatten(0, 1).unsqueeze(1)
        count = each.shape[0]
        if self._reads_prefix_only():
            packed = tokens[:, : self.prefix].flatten(0, 1)
            cu_seqlens = torch.arange(count + 1, dtype=torch.int32, device=bits.device) * self.prefix
        else:
            # As many rows as could be present: the device need not count them first.
            packed, cu_seqlens, _ = pack_tokens(tokens, each, self.prefix, rows=count * tokens.shape[1])
        layout = Layout(lambda x: x.flatten(0, 1), cu_seqlens, tokens.shape[1], 0, count, cu_seqlens)
        return self._read_values(packed, layout).unflatten(0, bits.shape[:2])


def _blocks_without_mask(backbone: Any) -> list[str]:
    """The kinds of blocks that take no attention mask; every kind of timm's does."""
    kinds = {type(block) for block in backbone.blocks}
    without = [kind.__name__ for kind in kinds if "attn_mask" not in inspect.signature(kind.forward).parameters]
    return [f"blocks of type {', '.join(sorted(without))} (their forward takes no attn_mask)"] if without else []
