"""Transformers play by dropping tokens: absent patches are taken out of the sequence.

All coalitions run as one ragged batch of present tokens: one patch embedding per image, then every block on (T, D)
rows with `packed_attention`. The full image is one more sequence of the same batch. What a family of timm models does
in its own way is a handful of methods, overridden in `vision_transformer.py` and `eva.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from timm.layers import AttentionPoolLatent, LayerNorm, LayerNormFp32, PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastshap_kernels import layer_norm_segment_sum, pack_tokens, packed_attention, segment_sum

from ._log import say_once
from .cpu_linear import cpu_linears
from .game import JointPass, UnsupportedModelError, pass_of_nothing
from .hooks import check_backbone, has_hooks, is_plain
from .intermediates import forward_features
from .probe import perturbed
from .votes import linear_classifier, mean_patch, vote

POOLS = ("token", "avg", "map")


class Layout(NamedTuple):
    """Where a packed batch has which tokens: full images first, then coalitions, then padding."""

    #: (B, Q + P, X) of every image → (T, X), for any width X.
    pack: Callable[[Tensor], Tensor]
    cu_seqlens: Tensor  # int32 (S + 1), of all sequences
    max_seqlen: int
    images: int  # the first sequences are full images, as many as this
    coalitions: int  # the next ones are coalitions; what then follows is padding
    coalition_cu_seqlens: Tensor  # of the coalitions and the padding, counted from the first coalition's first row


class MaskedTwin(Protocol):
    """The same game by attention masks."""

    intermediate_widths: list[int]

    def check_blocks(self) -> None: ...

    def values(self, images: Tensor, bits: Tensor) -> Tensor: ...

    def joint(self, images: Tensor, bits: Tensor) -> JointPass: ...

    def null(self) -> Tensor: ...


class TokenDropping:
    """The game of a timm transformer: v(S) is its output on the tokens in S and the prefix.

    Where patches vote, v_x(S) = Σ_{p∈S} (W e_p(x_S) + b)/P. With average pooling and a norm behind the pool
    (timm's `fc_norm`), v_x(S) = classifier(Σ_{p∈S} e_p(x_S)/P). With a class token or attention pooling,
    v_x(S) = the model's own classifier on the tokens that are left.

    `backbone` is a pre-norm transformer with timm's names: patch_embed, blocks, norm, global_pool, fc_norm, head.
    Its gradient checkpointing (`set_grad_checkpointing`) holds for the packed pass too.

    Packing knows timm's own blocks. Where they get hooks, adapters or other parts, at whatever time, the passes go
    through `masked`, the same game by attention masks, which calls the blocks as timm does.
    """

    def __init__(self, backbone: Any, votes: bool, masked: MaskedTwin | None = None) -> None:
        self.backbone = backbone
        self.masked = masked
        self._known_problems: list[str] = []
        self.prefix: int = backbone.num_prefix_tokens
        self.grid: tuple[int, int] = tuple(backbone.patch_embed.grid_size)
        self.players = self.grid[0] * self.grid[1]
        self.input_size: tuple[int, int, int] = (backbone.in_chans, *backbone.patch_embed.img_size)
        # Patches that don't divide the image leave its lower and right edge out.
        height, width = backbone.patch_embed.patch_size
        self.view: tuple[int, int] = (self.grid[0] * height, self.grid[1] * width)
        self.feature_width: int = backbone.embed_dim
        self.intermediate_widths: list[int] = []
        averages_linearly = backbone.global_pool == "avg" and isinstance(backbone.fc_norm, nn.Identity)
        #: Whether v(S) is a sum of votes, so that v(∅) = 0; else the model's own pooling decides.
        self.patches_vote = votes or averages_linearly
        self.is_exact_conversion = averages_linearly or not votes
        #: Whether attention pooling reads prefix tokens too.
        self.pools_prefix = False

    # -- what a family does in its own way ---------------------------------------------------------------

    def _packing_problems(self) -> list[str]:
        """What keeps the packed pass from the blocks as they are now."""
        raise NotImplementedError

    def _embed(self, images: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """Tokens before the first block, (B, Q + P, D), and each block's rotary positions, (Q + P, X), if any.

        Blocks that share their positions share the tensor, which is then packed once.
        """
        raise NotImplementedError

    def _queries_keys_values(self, block: Any, normed: Tensor, rotary: Tensor | None) -> Tensor:
        """(..., D) after the block's first norm, rotary (..., X) → (..., 3, heads, head_dim), ready for attention."""
        raise NotImplementedError

    def _scale_branch(self, block: Any, branch: int, rows: Tensor) -> Tensor:
        """Layer scale of the block's attention (branch 1) or MLP (branch 2)."""
        raise NotImplementedError

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the votes; a distilled model's two classifiers are averaged, as in its own forward pass."""
        return linear_classifier(self.backbone)

    def explanation_block(self) -> nn.Module:
        """A transformer block with the heads and width of the model's last one."""
        last = self.backbone.blocks[-1]
        # timm rounds width · ratio down: the half keeps a quotient that is inexact from losing one.
        ratio = (last.mlp.fc2.in_features + 0.5) / self.feature_width
        return Block(self.feature_width, last.attn.num_heads, mlp_ratio=ratio, qkv_bias=True)

    # -- whether to pack ---------------------------------------------------------------------------------

    @property
    def packs(self) -> bool:
        """Whether the blocks are, now, what the packed pass knows; the log says so once where they no longer are."""
        return self._can_pack()

    @torch.compiler.assume_constant_result  # what is compiled keeps the modules that it was compiled with
    def _can_pack(self) -> bool:
        problems = self._packing_problems()
        if self.masked is not None and problems and problems != self._known_problems:
            self.masked.check_blocks()
            self._known_problems = problems
            say_once(
                f"This {type(self.backbone).__name__} has {'; '.join(problems)}. Its coalitions run by attention masks "
                "instead: the same values, but all tokens are computed."
            )
        return not problems

    def _without_packing(self) -> MaskedTwin | None:
        """The game that evaluates in this one's place, if it can't pack. Checks the model, as all passes do."""
        check_backbone(self.backbone)
        problems = pooling_problems(self.backbone)
        if problems:
            raise UnsupportedModelError(
                f"This {type(self.backbone).__name__} has {'; '.join(problems)}, which dropping tokens does not know.",
                "Convert it with removal='pixel'.",
            )
        if self.packs or self.masked is None:
            return None
        self.masked.intermediate_widths = self.intermediate_widths
        return self.masked

    # -- one image ---------------------------------------------------------------------------------------

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The full image, through timm's own forward pass: features (B, P, L + ΣC), logits (B, K)."""
        check_backbone(self.backbone)
        if not len(images):
            return pass_of_nothing(self)[:2]
        return self._read_images(*forward_features(self, images, len(images)))

    # -- coalitions --------------------------------------------------------------------------------------

    def values(self, images: Tensor, bits: Tensor, paired: bool = False, rows: int | None = None) -> Tensor:
        """v(S) of every coalition: (B, M, K).

        `paired` promises complements, so that the packed batch has as many rows in every step. Without it, `rows`
        pads the batch to a number that the caller knows to be enough: Σ|S| + B·M·Q at least.
        """
        masked = self._without_packing()
        if masked is not None:
            return masked.values(images, bits)
        tokens, rotary = self._embed(images)
        layout, packed = self._pack(tokens, bits, paired, rows)
        packed = self._encode(tokens, packed, rotary, layout)
        return self._read_values(packed, layout).unflatten(0, bits.shape[:2])

    def joint(self, images: Tensor, bits: Tensor, paired: bool = False, rows: int | None = None) -> JointPass:
        """Full images and coalitions in one ragged batch; `paired` and `rows` as for `values`.

        Where v(∅) takes a pass through the blocks, it is one more sequence: by itself it would read all weights for a
        few rows.
        """
        masked = self._without_packing()
        if masked is not None:
            return masked.joint(images, bits)
        tokens, rotary = self._embed(images)
        layout, packed = self._pack(tokens, bits, paired, rows)
        nobody = self.prefix if self._reads_prefix_only() and len(images) else 0
        layout, packed = _with_full_images(layout, packed, tokens, nobody)
        earlier: list[Tensor] = []
        packed = self._encode(tokens, packed, rotary, layout, earlier)
        of_images = tokens.shape[0] * tokens.shape[1]
        image_rows, coalition_rows = packed.split([of_images, packed.shape[0] - of_images])
        values = self._read_values(coalition_rows, layout)
        null, values = (values[0], values[1:]) if nobody else (None, values)
        image_tokens = self.backbone.norm(image_rows).unflatten(0, tokens.shape[:2])
        return JointPass(*self._read_images(image_tokens, earlier), values.unflatten(0, bits.shape[:2]), null)

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        weight = self.vote_weight()[0]
        if self.patches_vote:
            return weight.new_zeros(weight.shape[0])
        if self.backbone.global_pool == "avg":
            return self._classify(weight.new_zeros(1, self.feature_width))[0]
        if self.backbone.global_pool == "map" and not (self.pools_prefix and self.prefix):
            return self._classify(_attend_nothing(self.backbone.attn_pool))[0]
        masked = self._without_packing()
        if masked is not None:
            return masked.null()
        # No patch is present, so any image gives the prefix alone.
        tokens, rotary = self._embed(weight.new_zeros(1, *self.input_size))
        tokens = tokens[:, : self.prefix]
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=weight.device) * self.prefix
        layout = Layout(lambda x: x[:, : self.prefix].flatten(0, 1), cu_seqlens, self.prefix, 0, 1, cu_seqlens)
        rotary = None if rotary is None else [table[: self.prefix] for table in rotary]
        return self._read_values(self._encode(tokens, tokens.flatten(0, 1), rotary, layout), layout)[0]

    # -- the packed pass ---------------------------------------------------------------------------------

    def _pack(self, tokens: Tensor, bits: Tensor, paired: bool, rows: int | None) -> tuple[Layout, Tensor]:
        def pack(x: Tensor) -> Tensor:
            return pack_tokens(x, bits, self.prefix, paired=paired, rows=rows)[0]

        packed, cu_seqlens, max_seqlen = pack_tokens(tokens, bits, self.prefix, paired=paired, rows=rows)
        coalitions = bits.shape[0] * bits.shape[1]
        return Layout(pack, cu_seqlens, max_seqlen, 0, coalitions, cu_seqlens), packed

    def _encode(
        self,
        tokens: Tensor,
        rows: Tensor,
        rotary: list[Tensor] | None,
        layout: Layout,
        earlier: list[Tensor] | None = None,
    ) -> Tensor:
        """All blocks on packed rows, without the final norm.

        With a class token the last block computes what is read only: all rows of the full images, and the prefix of
        each coalition. The result then holds those rows. `earlier` is filled with the images' patches behind every
        block but the last, where they are wanted.
        """
        blocks = list(self.backbone.blocks)
        # The first block's queries, keys and values depend on no coalition: once per image.
        with cpu_linears(tokens):
            qkv = self._queries_keys_values(blocks[0], blocks[0].norm1(tokens), None if rotary is None else rotary[0])
        first_qkv: Tensor | None = layout.pack(qkv.flatten(2)).unflatten(1, qkv.shape[2:])
        owner = _row_owner(self.backbone, layout, rows.shape[0])
        positions = packed_positions = None
        for index, block in enumerate(blocks):
            if index > 0 and rotary is not None and rotary[index] is not positions:
                positions = rotary[index]
                packed_positions = layout.pack(positions.expand(tokens.shape[0], -1, -1))
            keep = self._rows_that_are_read(layout) if index == len(blocks) - 1 else None
            arguments = (block, rows, first_qkv, packed_positions, layout, owner, keep)
            if self.backbone.grad_checkpointing and torch.is_grad_enabled():
                rows = checkpoint(self._run_block, *arguments, use_reentrant=False)
            else:
                rows = self._run_block(*arguments)
            first_qkv = None
            if earlier is not None and self.intermediate_widths and index < len(blocks) - 1:
                image_rows = rows[: tokens.shape[0] * tokens.shape[1]]
                earlier.append(image_rows.unflatten(0, tokens.shape[:2])[:, self.prefix :])
        return rows

    def _run_block(self, block: Any, rows: Tensor, *arguments: Any) -> Tensor:
        """`_compute_block`, its linear layers in the library that is fastest; recomputation comes here too."""
        with cpu_linears(rows):
            return self._compute_block(block, rows, *arguments)

    def _compute_block(
        self,
        block: Any,
        rows: Tensor,
        qkv: Tensor | None,
        rotary: Tensor | None,
        layout: Layout,
        owner: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """One pre-norm block on rows; `keep` selects the rows that later layers read."""
        attention = block.attn
        normed: Any = block.norm1(rows) if qkv is None or attention.gate is not None else None
        if qkv is None:
            qkv = self._queries_keys_values(block, normed, rotary)
        attended = packed_attention(qkv, layout.cu_seqlens, layout.max_seqlen, scale=attention.scale).flatten(1)
        if keep is not None:
            rows, attended = rows[keep], attended[keep]
            normed = None if normed is None else normed[keep]
            owner = None if owner is None else owner[keep]
        attended = attention.norm(attended)
        if attention.gate is not None:
            attended = attended * attention.gate(normed).sigmoid()
        attended = self._scale_branch(block, 1, attention.proj_drop(attention.proj(attended)))
        sequences = layout.cu_seqlens.shape[0] - 1
        rows = rows + _drop_path(block.drop_path1, attended, owner, sequences)
        computed = self._scale_branch(block, 2, block.mlp(block.norm2(rows)))
        return rows + _drop_path(block.drop_path2, computed, owner, sequences)

    def _reads_prefix_only(self) -> bool:
        return not self.patches_vote and self.backbone.global_pool == "token"

    def _rows_that_are_read(self, layout: Layout) -> Tensor | None:
        if not self._reads_prefix_only():
            return None
        device = layout.cu_seqlens.device
        image_rows = torch.arange(layout.images * (self.prefix + self.players), device=device)
        starts = layout.cu_seqlens[layout.images : layout.images + layout.coalitions, None]
        return torch.cat([image_rows, (starts + torch.arange(self.prefix, device=device)).flatten()])

    # -- reading logits and values -----------------------------------------------------------------------

    def _read_images(self, tokens: Tensor, earlier: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Features (B, P, L + ΣC) and logits (B, K) from the full images' tokens after the final norm.

        `earlier` are the patches' features, (B, P, C) each, behind the blocks before.
        """
        features = self.backbone.fc_norm(tokens[:, self.prefix :])
        logits = self.backbone.forward_head(tokens) if self.is_exact_conversion else self._vote(mean_patch(features))
        return torch.cat([features, *earlier], -1) if earlier else features, logits

    def _read_values(self, rows: Tensor, layout: Layout) -> Tensor:
        """(B·M, K) from the coalitions' rows before the final norm."""
        backbone = self.backbone
        if self._reads_prefix_only():
            return backbone.forward_head(backbone.norm(rows).unflatten(0, (layout.coalitions, self.prefix)))
        if backbone.global_pool == "map" and not self.patches_vote:
            return self._read_by_attention(backbone.norm(rows), layout)
        norms = [backbone.norm, backbone.fc_norm] if self.patches_vote else [backbone.norm]
        sums = _normed_sums(rows, norms, layout.coalition_cu_seqlens, self.prefix)
        pooled = sums[: layout.coalitions] / self.players
        if self.patches_vote:
            return self._vote(pooled, (self._lengths(layout) - self.prefix).unsqueeze(1))
        return self._classify(pooled)

    def _read_by_attention(self, rows: Tensor, layout: Layout) -> Tensor:
        """Attention pooling over each coalition's rows, normed, padded to P (to Q + P where it reads the prefix)."""
        skipped = 0 if self.pools_prefix else self.prefix
        slots = torch.arange(self.prefix + self.players - skipped, device=rows.device)
        present = slots < (self._lengths(layout) - skipped).unsqueeze(1)
        if not rows.shape[0]:
            rows = rows.new_zeros(1, rows.shape[1])
        starts = layout.coalition_cu_seqlens[: layout.coalitions, None]
        index = (starts + skipped + slots).clamp_max(rows.shape[0] - 1)
        # A slot past a coalition's end has read the next one's rows, NaN maybe, which a mask would not silence.
        return self._classify(self._pool_by_attention(torch.where(present.unsqueeze(2), rows[index], 0.0), present))

    def _pool_by_attention(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Attention pooling (N, L) over the tokens (N, S, D) that are present, bool (N, S)."""
        # An empty coalition would attend to nothing, which is NaN: it gets keys and is replaced below.
        is_empty = ~present.any(1, keepdim=True)
        pooled = self.backbone.attn_pool(tokens, attn_mask=additive_mask(present | is_empty, tokens))
        nothing = _attend_nothing(self.backbone.attn_pool).to(pooled.dtype)
        return torch.where(is_empty, nothing, pooled)

    def _lengths(self, layout: Layout) -> Tensor:
        return layout.coalition_cu_seqlens[: layout.coalitions + 1].diff()

    def _classify(self, pooled: Tensor) -> Tensor:
        backbone = self.backbone
        return backbone.head(backbone.head_drop(backbone.fc_norm(pooled)))

    def _vote(self, pooled: Tensor, sizes: Tensor | None = None) -> Tensor:
        return vote(self.backbone, self.backbone.head_drop(pooled), sizes, self.players)


def additive_mask(present: Tensor, like: Tensor) -> Tensor:
    """Which keys are seen, bool (N, S), as what is added to scores: (N, 1, 1, S) in the dtype of `like`.

    timm's attention pooling adds its mask where attention is not fused, and True would be a 1.
    """
    return torch.zeros_like(present, dtype=like.dtype).masked_fill_(~present, float("-inf"))[:, None, None, :]


def norm_queries_and_keys(attention: Any, qkv: Tensor) -> Tensor:
    """(..., 3, heads, head_dim) with the attention's norms of queries and keys, in the dtype of the values."""
    if isinstance(attention.q_norm, nn.Identity) and isinstance(attention.k_norm, nn.Identity):
        return qkv
    query, key, value = qkv.unbind(-3)
    # Autocast norms in float32.
    query, key = attention.q_norm(query).to(value.dtype), attention.k_norm(key).to(value.dtype)
    return torch.stack([query, key, value], -3)


def check_supported(backbone: Any, block_problems: list[str]) -> None:
    """Raises an error that names what token dropping can't do for this model; `block_problems` are its blocks'."""
    problems = list(block_problems)
    if backbone.global_pool not in POOLS:
        problems.append(f"global_pool={backbone.global_pool!r} (supported: {', '.join(POOLS)})")
    if backbone.global_pool != "token" and getattr(backbone, "pool_include_prefix", False):
        problems.append("pool_include_prefix=True (prefix tokens never vote)")
    if type(backbone.patch_embed) is not PatchEmbed:
        problems.append(f"a {type(backbone.patch_embed).__name__} stem (it mixes pixels of different patches)")
    elif backbone.patch_embed.dynamic_img_pad:
        problems.append("dynamic_img_pad=True (the last patches would be partly padding)")
    if isinstance(backbone.patch_drop, nn.Module) and not isinstance(backbone.patch_drop, nn.Identity):
        problems.append("patch_drop_rate > 0 (training drops patches by coalition)")
    problems += pooling_problems(backbone)
    if backbone.num_classes < 1:
        problems.append("num_classes=0 (a classifier is needed to explain)")
    if problems:
        raise UnsupportedModelError(
            f"This {type(backbone).__name__} can't play by token dropping: it has {'; '.join(problems)}.",
            "Create it without these options, or choose another model.",
        )
    with torch.no_grad(), perturbed(backbone):
        linear_classifier(backbone)  # an error if there is none


def pooling_problems(backbone: Any) -> list[str]:
    """What stands around the blocks and neither packing nor masks would call as timm's own forward pass does."""
    problems = []
    if has_hooks(backbone.blocks):
        problems.append("hooks on `blocks` as a whole, which run one by one")
    if not is_plain(backbone.head_drop, nn.Dropout, nn.Identity):
        problems.append(f"a {type(backbone.head_drop).__name__} with hooks or of another kind as its `head_drop`")
    pool = getattr(backbone, "attn_pool", None)
    if pool is not None and not is_plain(pool, AttentionPoolLatent):
        problems.append(f"attention pooling by a {type(pool).__name__} that is not just timm's AttentionPoolLatent")
    return problems


def _with_full_images(layout: Layout, rows: Tensor, tokens: Tensor, nobody: int) -> tuple[Layout, Tensor]:
    """The layout and rows with every image's tokens in front, and then `nobody` prefix tokens: the empty coalition."""
    batch, length = tokens.shape[:2]

    def in_front(x: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([x.flatten(0, 1), x[:1, :nobody].flatten(0, 1), rows])

    of_coalitions = layout.cu_seqlens
    if nobody:
        of_coalitions = nn.functional.pad(of_coalitions + nobody, (1, 0))
    full = torch.arange(batch, dtype=torch.int32, device=tokens.device) * length
    joint = Layout(
        pack=lambda x: in_front(x, layout.pack(x)),
        cu_seqlens=torch.cat([full, of_coalitions + batch * length]),
        max_seqlen=length,
        images=batch,
        coalitions=layout.coalitions + (nobody > 0),
        coalition_cu_seqlens=of_coalitions,
    )
    return joint, in_front(tokens, rows)


def _row_owner(backbone: Any, layout: Layout, rows: int) -> Tensor | None:
    """The sequence of each row, needed by stochastic depth only."""
    if not backbone.training or all(isinstance(block.drop_path1, nn.Identity) for block in backbone.blocks):
        return None
    sequence = torch.arange(layout.cu_seqlens.shape[0] - 1, device=layout.cu_seqlens.device)
    return sequence.repeat_interleave(layout.cu_seqlens.diff(), output_size=rows)


def _drop_path(drop_path: nn.Module, rows: Tensor, owner: Tensor | None, sequences: int) -> Tensor:
    """Stochastic depth drops whole sequences, not the whole packed batch as timm's module would."""
    if owner is None:
        return rows
    return rows * drop_path(rows.new_ones(sequences, 1))[owner]


def _normed_sums(rows: Tensor, norms: list[nn.Module], cu_seqlens: Tensor, prefix: int) -> Tensor:
    """Sums of each sequence's rows behind its prefix, after the norms, (S, D): one pass where it is one LayerNorm."""
    *first, last = [norm for norm in norms if not is_plain(norm, nn.Identity)] or [nn.Identity()]
    for norm in first:
        rows = norm(rows)
    if isinstance(last, nn.LayerNorm) and is_plain(last, nn.LayerNorm, LayerNorm, LayerNormFp32):
        return layer_norm_segment_sum(rows, cu_seqlens, last.weight, last.bias, prefix, eps=last.eps)
    return segment_sum(last(rows), cu_seqlens, prefix)


def _attend_nothing(pool: Any) -> Tensor:
    """What attention pooling gives where no token is left: attention over nothing is 0. (1, L)."""
    pooled = pool.proj_drop(pool.proj(pool.latent.new_zeros(1, pool.latent_len, pool.num_heads * pool.head_dim)))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0] if pool.pool == "token" else pooled.mean(1)
