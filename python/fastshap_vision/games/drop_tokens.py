"""Transformers drop tokens: absent patches are taken out of the sequence.

All coalitions run as one ragged batch of present tokens: one patch embedding per image, then every block on (T, D)
rows with `packed_attention`. The full image is one more sequence of the same batch. What a family of timm models does
in its own way is a handful of methods, overridden in `drop_tokens_vit.py` and `drop_tokens_eva.py`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastshap_kernels import pack_tokens, packed_attention

from .._log import say_once
from .._runtime.onednn_linear import cpu_linears
from .base import JointPass, pass_of_nothing
from .coalitions import Coalitions
from .sharded import run_gathered
from .transformer import Layout, TransformerGame, heads_of, normed_sums


class MaskedTwin(Protocol):
    """The same game by attention masks."""

    intermediate_widths: list[int]

    def check_blocks(self) -> None: ...

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor: ...

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass: ...

    def null(self) -> Tensor: ...


class TokenDropping(TransformerGame):
    """The game of a timm transformer: v(S) is its output on the tokens in S and the prefix.

    `TransformerGame` says what v(S) is. The backbone's gradient checkpointing (`set_grad_checkpointing`) holds for the
    packed pass too.

    Packing knows timm's own blocks. Where they get hooks, adapters or other parts, at whatever time, the passes go
    through `masked`, the same game by attention masks, which calls the blocks as timm does.
    """

    def __init__(self, backbone: Any, votes: bool, masked: MaskedTwin | None = None) -> None:
        super().__init__(backbone, votes)
        self.masked = masked
        self._known_problems: list[str] = []

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

    def explanation_block(self, width: int) -> nn.Module:
        """A transformer block whose heads and MLP have the proportions of the model's last one."""
        last = self.backbone.blocks[-1]
        # timm rounds width · ratio down: the half keeps a quotient that is inexact from losing one.
        ratio = (last.mlp.fc2.in_features + 0.5) / self.feature_width
        heads = heads_of(width, self.feature_width, last.attn.num_heads)
        return Block(width, heads, mlp_ratio=ratio, qkv_bias=True)

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
        self.check()
        if self.packs or self.masked is None:
            return None
        self.masked.intermediate_widths = self.intermediate_widths
        return self.masked

    # -- coalitions --------------------------------------------------------------------------------------

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor:
        """v(S) of every coalition: (B, M, K)."""
        masked = self._without_packing()
        if masked is not None:
            return masked.values(images, coalitions)
        tokens, rotary = self._embed(images)
        layout, packed = self._pack(tokens, coalitions)
        packed = self._encode(tokens, packed, rotary, layout)
        return self._read_values(packed, layout).unflatten(0, coalitions.bits.shape[:2])

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass:
        """Full images and coalitions in one ragged batch.

        Where v(∅) takes a pass through the blocks, it is one more sequence: by itself it would read all weights for a
        few rows.
        """
        masked = self._without_packing()
        if masked is not None:
            return masked.joint(images, coalitions)
        if not len(images):
            return pass_of_nothing(self, coalitions.count)
        tokens, rotary = self._embed(images)
        layout, packed = self._pack(tokens, coalitions)
        nobody = self.prefix if self._reads_prefix_only() else 0
        layout, packed = _with_full_images(layout, packed, tokens, nobody)
        earlier: list[Tensor] = []
        packed = self._encode(tokens, packed, rotary, layout, earlier)
        of_images = tokens.shape[0] * tokens.shape[1]
        image_rows, coalition_rows = packed.split([of_images, packed.shape[0] - of_images])
        values = self._read_values(coalition_rows, layout)
        null, values = (values[0], values[1:]) if nobody else (None, values)
        image_tokens = self.backbone.norm(image_rows).unflatten(0, tokens.shape[:2])
        return JointPass(
            *self._read_images(image_tokens, earlier), values.unflatten(0, coalitions.bits.shape[:2]), null
        )

    def null(self) -> Tensor:
        """v(∅): (K,), zeros where patches vote."""
        known = self._null_without_blocks()
        if known is not None:
            return known
        masked = self._without_packing()
        if masked is not None:
            return masked.null()
        # No patch is present, so any image gives the prefix alone.
        weight = self.vote_weight()[0]
        tokens, rotary = self._embed(weight.new_zeros(1, *self.input_size))
        tokens = tokens[:, : self.prefix]
        cu_seqlens = torch.arange(2, dtype=torch.int32, device=weight.device) * self.prefix
        layout = Layout(lambda x: x[:, : self.prefix].flatten(0, 1), cu_seqlens, self.prefix, 0, 1, cu_seqlens)
        rotary = None if rotary is None else [table[: self.prefix] for table in rotary]
        return self._read_values(self._encode(tokens, tokens.flatten(0, 1), rotary, layout), layout)[0]

    # -- the packed pass ---------------------------------------------------------------------------------

    def _pack(self, tokens: Tensor, coalitions: Coalitions) -> tuple[Layout, Tensor]:
        bits, paired, rows = coalitions.bits, coalitions.paired, coalitions.rows

        def pack(x: Tensor) -> Tensor:
            return pack_tokens(x, bits, self.prefix, paired=paired, rows=rows)[0]

        packed, cu_seqlens, max_seqlen = pack_tokens(tokens, bits, self.prefix, paired=paired, rows=rows)
        return Layout(pack, cu_seqlens, max_seqlen, 0, bits.shape[0] * bits.shape[1], cu_seqlens), packed

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
        owner = _row_owner(self.backbone, layout, rows.shape[0])
        positions = packed_positions = None
        for index, block in enumerate(blocks):
            if index > 0 and rotary is not None and rotary[index] is not positions:
                positions = rotary[index]
                packed_positions = layout.pack(positions.expand(tokens.shape[0], -1, -1))
            keep = self._rows_that_are_read(layout) if index == len(blocks) - 1 else None
            # The first block's queries, keys and values depend on no coalition: once per image.
            of_images = (tokens, None if rotary is None else rotary[0]) if index == 0 else None
            arguments = (self._run_block, block, rows, of_images, packed_positions, layout, owner, keep)
            if self.backbone.grad_checkpointing and torch.is_grad_enabled():
                rows = checkpoint(run_gathered, block, *arguments, use_reentrant=False)
            else:
                rows = run_gathered(block, *arguments)
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
        of_images: tuple[Tensor, Tensor | None] | None,
        rotary: Tensor | None,
        layout: Layout,
        owner: Tensor | None,
        keep: Tensor | None,
    ) -> Tensor:
        """One pre-norm block on rows; `keep` selects the rows that later layers read.

        `of_images`, tokens and their rotary positions, are what the first block's rows were packed from.
        """
        attention = block.attn
        normed: Any = block.norm1(rows) if of_images is None or attention.gate is not None else None
        if of_images is None:
            qkv = self._queries_keys_values(block, normed, rotary)
        else:
            unpacked = self._queries_keys_values(block, block.norm1(of_images[0]), of_images[1])
            qkv = layout.pack(unpacked.flatten(2)).unflatten(1, unpacked.shape[2:])
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

    def _rows_that_are_read(self, layout: Layout) -> Tensor | None:
        if not self._reads_prefix_only():
            return None
        device = layout.cu_seqlens.device
        image_rows = torch.arange(layout.images * (self.prefix + self.players), device=device)
        starts = layout.cu_seqlens[layout.images : layout.images + layout.coalitions, None]
        return torch.cat([image_rows, (starts + torch.arange(self.prefix, device=device)).flatten()])

    # -- reading values ----------------------------------------------------------------------------------

    def _read_values(self, rows: Tensor, layout: Layout) -> Tensor:
        """(B·M, K) from the coalitions' rows before the final norm."""
        backbone = self.backbone
        if self._reads_prefix_only():
            return backbone.forward_head(backbone.norm(rows).unflatten(0, (layout.coalitions, self.prefix)))
        if backbone.global_pool == "map" and not self.patches_vote:
            return self._read_by_attention(backbone.norm(rows), layout)
        norms = [backbone.norm, backbone.fc_norm] if self.patches_vote else [backbone.norm]
        sums = normed_sums(rows, norms, layout.coalition_cu_seqlens, self.prefix)
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

    def _lengths(self, layout: Layout) -> Tensor:
        return layout.coalition_cu_seqlens[: layout.coalitions + 1].diff()


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
