"""timm vision transformers play by dropping tokens: absent patches are taken out of the sequence.

All coalitions run as one ragged batch of present tokens: one patch embedding per image, then every block on
(T, D) rows with `packed_attention`. The full image is one more sequence of the same batch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.layers import Attention, PatchEmbed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from fastshap_kernels import pack_tokens, packed_attention, segment_sum

from .game import JointPass, UnsupportedModelError

_POOLS = ("token", "avg", "map")


class Sequences(NamedTuple):
    """Sequences of tokens, one behind the other."""

    rows: Tensor  # (T, D)
    cu_seqlens: Tensor  # int32 (S + 1)
    max_seqlen: int

    @property
    def lengths(self) -> Tensor:
        return self.cu_seqlens.diff()


class TokenDropping:
    """The game of a timm `VisionTransformer`: v(S) is its output on the tokens in S and the prefix.

    Where patches vote, v_x(S) = Σ_{p∈S} (W e_p(x_S) + b)/P. With average pooling and a norm behind the pool
    (timm's `fc_norm`), v_x(S) = classifier(Σ_{p∈S} e_p(x_S)/P). With a class token or attention pooling,
    v_x(S) = the model's own classifier on the tokens that are left.
    """

    def __init__(self, backbone: VisionTransformer, votes: bool) -> None:
        _check_supported(backbone)
        self.backbone = backbone
        self.prefix: int = backbone.num_prefix_tokens
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.players = self.grid[0] * self.grid[1]
        self.input_size: tuple[int, int, int] = (backbone.in_chans, *backbone.patch_embed.img_size)
        self.feature_width: int = backbone.embed_dim
        averages_linearly = backbone.global_pool == "avg" and isinstance(backbone.fc_norm, nn.Identity)
        #: Whether v(S) is a sum of votes, so that v(∅) = 0; else the model's own pooling decides.
        self.patches_vote = votes or averages_linearly
        self.is_exact_conversion = averages_linearly or not votes

    # -- one image ---------------------------------------------------------------------------------------

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The full image, through timm's own forward pass: features (B, P, L), logits (B, K)."""
        tokens = self.backbone.forward_features(images)
        features = self.backbone.fc_norm(tokens[:, self.prefix :])
        if self.is_exact_conversion:
            return features, self.backbone.forward_head(tokens)
        return features, self._vote(features.mean(1))

    # -- coalitions --------------------------------------------------------------------------------------

    def values(self, images: Tensor, bits: Tensor, paired: bool = False) -> Tensor:
        """v(S) of every coalition: (B, M, K)."""
        tokens = self._embed(images)
        sequences, qkv = self._pack(tokens, self._first_qkv(tokens), bits, paired)
        rows = self._encode(sequences, qkv, full_images=0)
        return self._read_values(rows, sequences).unflatten(0, bits.shape[:2])

    def joint(self, images: Tensor, bits: Tensor, paired: bool = False) -> JointPass:
        """Full images and coalitions in one ragged batch."""
        batch = images.shape[0]
        tokens = self._embed(images)
        tokens_qkv = self._first_qkv(tokens)
        coalitions, qkv = self._pack(tokens, tokens_qkv, bits, paired)
        length = self.prefix + self.players
        full = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=images.device)
        sequences = Sequences(
            torch.cat([tokens.flatten(0, 1), coalitions.rows]),
            torch.cat([full[:-1], coalitions.cu_seqlens + batch * length]),
            length,
        )
        rows = self._encode(sequences, torch.cat([tokens_qkv.flatten(0, 1), qkv]), full_images=batch)
        images_rows, coalition_rows = rows.split([batch * length, rows.shape[0] - batch * length])
        values = self._read_values(coalition_rows, coalitions).unflatten(0, bits.shape[:2])
        image_tokens = images_rows.unflatten(0, (batch, length))
        features = self.backbone.fc_norm(image_tokens[:, self.prefix :])
        if self.is_exact_conversion:
            return JointPass(features, self.backbone.forward_head(image_tokens), values)
        return JointPass(features, self._vote(features.mean(1)), values)

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        head = self._classifier_weight()[0]
        if self.patches_vote:
            return head.new_zeros(head.shape[0])
        if self.backbone.global_pool == "avg":
            return self._classify(head.new_zeros(1, self.feature_width))[0]
        if self.backbone.global_pool == "map":
            return self._classify(_attend_nothing(self.backbone.attn_pool))[0]
        # No patch is present, so any image gives the prefix alone.
        image = head.new_zeros(1, *self.input_size)
        nobody = torch.zeros(1, 1, (self.players + 31) // 32, dtype=torch.int32, device=head.device)
        return self.values(image, nobody)[0, 0]

    # -- the packed pass ---------------------------------------------------------------------------------

    def _embed(self, images: Tensor) -> Tensor:
        """Tokens with positions, before the first block: (B, Q + P, D)."""
        backbone = self.backbone
        return backbone.norm_pre(backbone._pos_embed(backbone.patch_embed(images)))

    def _first_qkv(self, tokens: Tensor) -> Tensor:
        """The first block's queries, keys and values depend on no coalition: once per image."""
        block = self.backbone.blocks[0]
        return block.attn.qkv(block.norm1(tokens))

    def _pack(self, tokens: Tensor, qkv: Tensor, bits: Tensor, paired: bool) -> tuple[Sequences, Tensor]:
        rows, cu_seqlens, max_seqlen = pack_tokens(tokens, bits, self.prefix, paired=paired)
        return Sequences(rows, cu_seqlens, max_seqlen), pack_tokens(qkv, bits, self.prefix, paired=paired)[0]

    def _encode(self, sequences: Sequences, qkv: Tensor, full_images: int) -> Tensor:
        """All blocks and the final norm.

        With a class token the last block computes what is read only: all rows of the full images, which come
        first, and the prefix of each coalition. The result then holds those rows.
        """
        blocks = list(self.backbone.blocks)
        for index, block in enumerate(blocks):
            keep = self._rows_that_are_read(sequences, full_images) if index == len(blocks) - 1 else None
            rows = _run_block(block, sequences, qkv if index == 0 else None, keep)
            sequences = sequences._replace(rows=rows)
        return self.backbone.norm(sequences.rows)

    def _reads_prefix_only(self) -> bool:
        return not self.patches_vote and self.backbone.global_pool == "token"

    def _rows_that_are_read(self, sequences: Sequences, full_images: int) -> Tensor | None:
        if not self._reads_prefix_only():
            return None
        device = sequences.rows.device
        image_rows = torch.arange(full_images * (self.prefix + self.players), device=device)
        starts = sequences.cu_seqlens[full_images:-1, None]
        return torch.cat([image_rows, (starts + torch.arange(self.prefix, device=device)).flatten()])

    # -- reading v(S) ------------------------------------------------------------------------------------

    def _read_values(self, rows: Tensor, sequences: Sequences) -> Tensor:
        """(S, K) from the coalitions' rows after the final norm."""
        count = len(sequences.cu_seqlens) - 1
        if self._reads_prefix_only():
            return self.backbone.forward_head(rows.view(count, self.prefix, -1))
        if self.backbone.global_pool == "map" and not self.patches_vote:
            return self._read_by_attention(rows, sequences)
        features = self.backbone.fc_norm(rows) if self.patches_vote else rows
        pooled = segment_sum(features, sequences.cu_seqlens, self.prefix) / self.players
        if self.patches_vote:
            share = (sequences.lengths - self.prefix).to(pooled.dtype) / self.players
            return self._vote(pooled, share.unsqueeze(1))
        return self._classify(pooled)

    def _read_by_attention(self, rows: Tensor, sequences: Sequences) -> Tensor:
        """Attention pooling over each coalition's patches, padded to P."""
        slots = torch.arange(self.players, device=rows.device)
        present = slots < (sequences.lengths - self.prefix).unsqueeze(1)
        index = (sequences.cu_seqlens[:-1, None] + self.prefix + slots) * present
        if not rows.shape[0]:
            rows = rows.new_zeros(1, rows.shape[1])
        # An empty coalition would attend to nothing, which is NaN: it gets one key and is replaced below.
        is_empty = ~present.any(1, keepdim=True)
        mask = (present | is_empty)[:, None, None, :]
        pooled = self.backbone.attn_pool(rows[index], attn_mask=mask)
        nothing = _attend_nothing(self.backbone.attn_pool).to(pooled.dtype)
        return self._classify(torch.where(is_empty, nothing, pooled))

    def _classify(self, pooled: Tensor) -> Tensor:
        backbone = self.backbone
        return backbone.head(backbone.head_drop(backbone.fc_norm(pooled)))

    def _vote(self, pooled: Tensor, share: Tensor | float = 1.0) -> Tensor:
        weight, bias = self.vote_weight()
        logits = self.backbone.head_drop(pooled) @ weight.T
        return logits if bias is None else logits + share * bias

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the votes; a distilled model's two classifiers are averaged, as in its own forward pass."""
        return self._classifier_weight()

    def explanation_block(self) -> nn.Module:
        """A transformer block with the heads and width of the model's last one."""
        last = self.backbone.blocks[-1]
        ratio = last.mlp.fc2.in_features / self.feature_width
        return Block(self.feature_width, last.attn.num_heads, mlp_ratio=ratio, qkv_bias=True)

    def _classifier_weight(self) -> tuple[Tensor, Tensor | None]:
        backbone = self.backbone
        if isinstance(backbone, VisionTransformerDistilled):
            first, second = backbone.head, backbone.head_dist
            return (first.weight + second.weight) / 2, (first.bias + second.bias) / 2
        return backbone.head.weight, backbone.head.bias


def _run_block(block: Block, sequences: Sequences, qkv: Tensor | None, keep: Tensor | None) -> Tensor:
    """One pre-norm block on rows; `keep` selects the rows that later layers read."""
    attention, rows = block.attn, sequences.rows
    normed = block.norm1(rows) if qkv is None or attention.gate is not None else None
    if qkv is None:
        qkv = attention.qkv(normed)
    qkv = qkv.view(-1, 3, attention.num_heads, attention.head_dim)
    if not isinstance(attention.q_norm, nn.Identity) or not isinstance(attention.k_norm, nn.Identity):
        query, key, value = qkv.unbind(1)
        qkv = torch.stack([attention.q_norm(query), attention.k_norm(key), value], 1)
    attended = packed_attention(qkv, sequences.cu_seqlens, sequences.max_seqlen, scale=attention.scale).flatten(1)
    if keep is not None:
        rows, attended = rows[keep], attended[keep]
        normed = None if normed is None else normed[keep]
    attended = attention.norm(attended)
    if attention.gate is not None:
        attended = attended * attention.gate(normed).sigmoid()
    owner = _row_owner(block, sequences, keep)
    rows = rows + _drop_path(block.drop_path1, block.ls1(attention.proj_drop(attention.proj(attended))), owner)
    return rows + _drop_path(block.drop_path2, block.ls2(block.mlp(block.norm2(rows))), owner)


def _row_owner(block: Block, sequences: Sequences, keep: Tensor | None) -> Tensor | None:
    """The sequence of each row, needed by stochastic depth only."""
    if not block.training or isinstance(block.drop_path1, nn.Identity):
        return None
    sequence = torch.arange(len(sequences.cu_seqlens) - 1, device=sequences.rows.device)
    owner = sequence.repeat_interleave(sequences.lengths, output_size=sequences.rows.shape[0])
    return owner if keep is None else owner[keep]


def _drop_path(drop_path: nn.Module, rows: Tensor, owner: Tensor | None) -> Tensor:
    """Stochastic depth drops whole sequences, not the whole packed batch as timm's module would."""
    if owner is None:
        return rows
    count = int(owner.shape[0])  # an upper bound of the sequences, known without waiting for the device
    kept = drop_path(rows.new_ones(count, 1))
    return rows * kept[owner]


def _attend_nothing(pool: Any) -> Tensor:
    """What attention pooling gives where no token is left: attention over nothing is 0. (1, L)."""
    pooled = pool.proj_drop(pool.proj(pool.latent.new_zeros(1, pool.latent_len, pool.num_heads * pool.head_dim)))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0] if pool.pool == "token" else pooled.mean(1)


def _check_supported(backbone: VisionTransformer) -> None:
    """Raises an error that names what token dropping can't do for this model."""
    problems = []
    if backbone.global_pool not in _POOLS:
        problems.append(f"global_pool={backbone.global_pool!r} (supported: {', '.join(_POOLS)})")
    if backbone.global_pool != "token" and backbone.pool_include_prefix:
        problems.append("pool_include_prefix=True (prefix tokens never vote)")
    if type(backbone.patch_embed) is not PatchEmbed:
        problems.append(f"a {type(backbone.patch_embed).__name__} stem (it mixes pixels of different patches)")
    elif backbone.patch_embed.dynamic_img_pad:
        problems.append("dynamic_img_pad=True (the last patches would be partly padding)")
    if not isinstance(backbone.patch_drop, nn.Identity):
        problems.append("patch_drop_rate > 0 (training drops patches by coalition)")
    kinds = {type(block) for block in backbone.blocks}
    if kinds != {Block}:
        problems.append(f"blocks of type {', '.join(sorted(kind.__name__ for kind in kinds))} (supported: Block)")
    elif any(type(block.attn) is not Attention for block in backbone.blocks):
        problems.append(f"attention of type {type(backbone.blocks[0].attn).__name__} (supported: Attention)")
    elif any(block.attn.attn_drop.p > 0 for block in backbone.blocks):
        problems.append("attn_drop_rate > 0 (packed attention has no dropout)")
    if backbone.num_classes < 1:
        problems.append("num_classes=0 (a classifier is needed to explain)")
    if problems:
        raise UnsupportedModelError(
            f"This VisionTransformer can't play by token dropping: it has {'; '.join(problems)}. "
            "Create it without these options, or choose another model."
        )
