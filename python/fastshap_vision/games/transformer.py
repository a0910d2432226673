"""What games on transformers share, whether they drop tokens or mask attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from timm.layers import AttentionPoolLatent, LayerNorm, LayerNormFp32, PatchEmbed
from torch import Tensor, nn

from fastshap_kernels import layer_norm_segment_sum, segment_sum

from .base import Features, Game, UnsupportedModelError, pass_of_nothing
from .features import forward_features
from .hooks import check_backbone, has_hooks, is_plain
from .probe import perturbed
from .readout import linear_classifier, read_images, vote

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


class TransformerGame:
    """What v(S) reads of a timm transformer on the tokens in S and the prefix, and what the full image gives.

    Where patches vote, v_x(S) = Σ_{p∈S} (W e_p(x_S) + b)/P. With average pooling and a norm behind the pool
    (timm's `fc_norm`), v_x(S) = classifier(Σ_{p∈S} e_p(x_S)/P). With a class token or attention pooling,
    v_x(S) = the model's own classifier on the tokens that are left.

    `backbone` is a pre-norm transformer with timm's names: patch_embed, blocks, norm, global_pool, fc_norm, head.
    """

    @property
    def packs(self) -> bool:
        """Whether a coalition costs its tokens only."""
        raise NotImplementedError

    def __init__(self, backbone: Any, votes: bool) -> None:
        self.backbone = backbone
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

    def check(self) -> None:
        """Raises an error where the model is, now, not what a game on transformers knows."""
        check_backbone(self.backbone)
        problems = pooling_problems(self.backbone)
        if problems:
            raise UnsupportedModelError(
                f"This {type(self.backbone).__name__} has {'; '.join(problems)}, which dropping tokens does not know.",
                "Convert it with removal='cell'.",
            )

    def vote_weight(self) -> tuple[Tensor, Tensor | None]:
        """(W, b) of the votes; a distilled model's two classifiers are averaged, as in its own forward pass."""
        return linear_classifier(self.backbone)

    def features_and_logits(self, images: Tensor) -> tuple[Features, Tensor]:
        """The full image, through timm's own forward pass: its features, and logits (B, K)."""
        check_backbone(self.backbone)
        if not len(images):
            return pass_of_nothing(cast(Game, self))[:2]
        return self._read_images(*forward_features(cast(Game, self), images, len(images)))

    def _null_without_blocks(self) -> Tensor | None:
        """v(∅), (K,), where the blocks have no part in it: zeros where patches vote."""
        weight = self.vote_weight()[0]
        if self.patches_vote:
            return weight.new_zeros(weight.shape[0])
        if self.backbone.global_pool == "avg":
            return self._classify(weight.new_zeros(1, self.feature_width))[0]
        if self.backbone.global_pool == "map" and not (self.pools_prefix and self.prefix):
            return self._classify(attend_nothing(self.backbone.attn_pool))[0]
        return None

    def _reads_prefix_only(self) -> bool:
        return not self.patches_vote and self.backbone.global_pool == "token"

    def _read_images(self, tokens: Tensor, earlier: list[Tensor]) -> tuple[Features, Tensor]:
        """Features and logits (B, K) from the full images' tokens after the final norm.

        `earlier` are the patches' features, (B, P, C) each, behind the blocks before.
        """
        backbone = self.backbone
        return read_images(self, tokens, backbone.fc_norm(tokens[:, self.prefix :]), earlier, backbone.head_drop)

    def _pool_by_attention(self, tokens: Tensor, present: Tensor) -> Tensor:
        """Attention pooling (N, L) over the tokens (N, S, D) that are present, bool (N, S)."""
        # An empty coalition would attend to nothing, which is NaN: it gets keys and is replaced below.
        is_empty = ~present.any(1, keepdim=True)
        pooled = self.backbone.attn_pool(tokens, attn_mask=additive_mask(present | is_empty, tokens))
        nothing = attend_nothing(self.backbone.attn_pool).to(pooled.dtype)
        return torch.where(is_empty, nothing, pooled)

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
            f"This {type(backbone).__name__} can't drop tokens: it has {'; '.join(problems)}.",
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


def normed_sums(rows: Tensor, norms: list[nn.Module], cu_seqlens: Tensor, prefix: int) -> Tensor:
    """Sums of each sequence's rows behind its prefix, after the norms, (S, D): one pass where it is one LayerNorm."""
    *first, last = [norm for norm in norms if not is_plain(norm, nn.Identity)] or [nn.Identity()]
    for norm in first:
        rows = norm(rows)
    if isinstance(last, nn.LayerNorm) and is_plain(last, nn.LayerNorm, LayerNorm, LayerNormFp32):
        return layer_norm_segment_sum(rows, cu_seqlens, last.weight, last.bias, prefix, eps=last.eps)
    return segment_sum(last(rows), cu_seqlens, prefix)


def attend_nothing(pool: Any) -> Tensor:
    """What attention pooling gives where no token is left: attention over nothing is 0. (1, L)."""
    pooled = pool.proj_drop(pool.proj(pool.latent.new_zeros(1, pool.latent_len, pool.num_heads * pool.head_dim)))
    if pool.mlp is not None:
        pooled = pooled + pool.mlp(pool.norm(pooled))
    return pooled[:, 0] if pool.pool == "token" else pooled.mean(1)


def heads_of(width: int, model_width: int, model_heads: int) -> int:
    """The heads of a block of another width than the model's: about as wide each, of a number that divides it."""
    if width == model_width:
        return model_heads
    wanted = max(1, round(width * model_heads / model_width))
    return next(number for number in range(wanted, 0, -1) if width % number == 0)
