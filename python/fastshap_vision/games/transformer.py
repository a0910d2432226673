"""What games on transformers share, whether they drop tokens or mask attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent, LayerNorm, LayerNormFp32, PatchEmbed
from torch import Tensor, nn

from fastshap_kernels import layer_norm_segment_sum, segment_sum

from .base import UnsupportedModelError
from .hooks import has_hooks, is_plain
from .probe import perturbed
from .readout import linear_classifier

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
