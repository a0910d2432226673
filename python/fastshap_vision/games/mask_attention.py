"""Transformers whose blocks can't be packed mask the attention to absent tokens.

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

from fastshap_kernels import unpack_bits

from .._modes import evaluation_mode
from .base import JointPass, UnsupportedModelError, pass_of_nothing
from .coalitions import Coalitions
from .probe import is_close, perturbed, probe_images
from .transformer import TransformerGame, additive_mask, check_supported, heads_of


class MaskedAttention(TransformerGame):
    """The game of a timm `VisionTransformer` or `Eva` with any blocks that take timm's `attn_mask`.

    v(S) and v(∅) are those of `TransformerGame`.
    """

    def __init__(self, backbone: VisionTransformer | Eva, votes: bool) -> None:
        check_supported(backbone, _blocks_without_mask(backbone))
        super().__init__(backbone, votes)
        self.pools_prefix = isinstance(backbone, Eva)

    @property
    def packs(self) -> bool:
        return False

    @torch.no_grad()
    def check_blocks(self) -> None:
        """Raises an error where blocks pass absent tokens on to present ones past the mask, outside of attention."""
        backbone = self.backbone
        tokens, rope = self._embed_with_rope(probe_images(backbone, self.input_size))
        present = (torch.arange(tokens.shape[1], device=tokens.device) % 2 == 0).expand(2, -1)
        # The first image's present tokens, and each image's absent ones.
        tokens = torch.where(present.unsqueeze(2), tokens[:1], tokens)
        with evaluation_mode(backbone), perturbed(backbone):
            first, second = self._run_blocks(tokens, rope, additive_mask(present, tokens))
        if not is_close(first[present[0]], second[present[0]]):
            raise UnsupportedModelError(
                f"The blocks of this {type(backbone).__name__} mix tokens outside of their attention, so an absent one "
                "would still act on others.",
                "Use removal='cell'.",
            )

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor:
        """v(S) of every coalition: (B, M, K)."""
        self.check()
        tokens, rope = self._embed_with_rope(images)
        present = unpack_bits(coalitions.bits, self.players).flatten(0, 1)
        tokens, mask = self._coalitions(tokens, present)
        tokens = self._run_blocks(tokens, rope, mask)
        return self._read_coalitions(self.backbone.norm(tokens), present).unflatten(0, coalitions.bits.shape[:2])

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass:
        """Full images and coalitions in one batch."""
        self.check()
        if not len(images):
            return pass_of_nothing(self, coalitions.count)
        tokens, rope = self._embed_with_rope(images)
        present = unpack_bits(coalitions.bits, self.players).flatten(0, 1)
        masked, mask = self._coalitions(tokens, present)
        everybody = mask.new_zeros(tokens.shape[0], *mask.shape[1:])
        earlier: list[Tensor] = []
        tokens = self._run_blocks(torch.cat([tokens, masked]), rope, torch.cat([everybody, mask]), earlier)
        of_images, of_coalitions = self.backbone.norm(tokens).split([images.shape[0], masked.shape[0]])
        earlier = [stage[: images.shape[0], self.prefix :] for stage in earlier]
        features, logits = self._read_images(of_images, earlier)
        values = self._read_coalitions(of_coalitions, present).unflatten(0, coalitions.bits.shape[:2])
        return JointPass(features, logits, values)

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        known = self._null_without_blocks()
        if known is not None:
            return known
        # No patch is present, so any image gives the prefix alone.
        image = self.vote_weight()[0].new_zeros(1, *self.input_size)
        nobody = torch.zeros(1, 1, (self.players + 31) // 32, dtype=torch.int32, device=image.device)
        return self.values(image, Coalitions(nobody, self.players))[0, 0]

    def explanation_block(self, width: int) -> nn.Module:
        """A transformer block with heads as wide as the model's."""
        attention: Any = next(part for part in self.backbone.blocks.modules() if hasattr(part, "num_heads"))
        return Block(width, heads_of(width, self.feature_width, attention.num_heads), qkv_bias=True)

    def _embed_with_rope(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens before the first block, (B, Q + P, D), and timm's rotary positions, if any."""
        backbone = self.backbone
        embedded = backbone._pos_embed(backbone.patch_embed(images))
        tokens, rope = embedded if isinstance(backbone, Eva) else (embedded, None)
        if not isinstance(backbone, Eva):
            tokens = backbone.patch_drop(tokens)
        return backbone.norm_pre(tokens), rope

    def _coalitions(self, tokens: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B·M, Q + P, D) of every coalition, 0 where absent, and the mask of its keys, (B·M, 1, 1, Q + P).

        `present`, bool (B·M, P), are its players.
        """
        keys = nn.functional.pad(present, (self.prefix, 0), value=True)
        coalitions = len(present) // max(1, len(tokens))
        # A weight of 0 does not silence NaN: what is absent is no number of the image's.
        tokens = torch.where(keys.unsqueeze(2), tokens.repeat_interleave(coalitions, 0), 0.0)
        # Attention over nothing would be NaN. Where there is no prefix either, nobody reads what comes instead.
        return tokens, additive_mask(keys | ~keys.any(1, keepdim=True), tokens)

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

    def _read_coalitions(self, tokens: Tensor, present: Tensor) -> Tensor:
        """The coalitions' tokens behind the final norm, (N, Q + P, D), and their players, (N, P) → (N, K)."""
        backbone = self.backbone
        if self._reads_prefix_only():
            return backbone.forward_head(tokens)
        patches, present_patches = tokens[:, self.prefix :], present.unsqueeze(2)
        if backbone.global_pool == "map" and not self.patches_vote:
            if self.pools_prefix:
                return self._classify(
                    self._pool_by_attention(tokens, nn.functional.pad(present, (self.prefix, 0), value=True))
                )
            return self._classify(self._pool_by_attention(patches, present))
        if self.patches_vote:
            patches = backbone.fc_norm(patches)
        pooled = torch.where(present_patches, patches, 0.0).sum(1) / self.players
        if self.patches_vote:
            return self._vote(pooled, present.sum(1, keepdim=True))
        return self._classify(pooled)


def _blocks_without_mask(backbone: Any) -> list[str]:
    """The kinds of blocks that take no attention mask; every kind of timm's does."""
    kinds = {type(block) for block in backbone.blocks}
    without = [kind.__name__ for kind in kinds if "attn_mask" not in inspect.signature(kind.forward).parameters]
    return [f"blocks of type {', '.join(sorted(without))} (their forward takes no attn_mask)"] if without else []
