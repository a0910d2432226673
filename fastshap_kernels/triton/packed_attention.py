"""packed_attention: a block of queries meets only the keys of its own sequence, and scores never leave the chip.

Coalitions are short, so that memory is the floor: forward reads qkv and writes out (4 rows of a head a token),
backward reads qkv and grad and writes grad_qkv (7 rows). Forward keeps a block of queries and streams keys past it,
softmax running in base 2. Backward keeps all keys and values of a sequence that fits, and streams queries: each
query then sees its whole row of scores, so that probabilities and Σ p·dp need neither `logsumexp` nor `out` nor a
pass of their own, and dq, dk and dv come of one reading with five products. Longer sequences take two kernels, with
no atomics either way.

Programs of one sequence's heads are neighbours, since its rows hold all heads. `max_seqlen` is an upper bound:
programs past the end of their sequence leave after two loads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_TINY = tl.constexpr(1e-37)  # in place of the sum of no powers at all


class _Blocks(NamedTuple):
    """How a kernel is launched: queries and keys in a block, warps, and loads under way at a time."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def arguments(self, head_dim: int) -> dict[str, int]:
        return {
            "HEAD_DIM": head_dim,
            "BLOCK_D": _block_dim(head_dim),
            "BLOCK_Q": self.queries,
            "BLOCK_K": self.keys,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


def _block_dim(head_dim: int) -> int:
    """A power of two, and enough for matrix units."""
    return max(16, triton.next_power_of_2(head_dim))


# Found with the compilers: the largest blocks that spill no registers for A100, H100 and B200 with any supported
# Triton, in under 99 KiB of shared memory but on the last. Cards that have no more than that (8.6, 8.9, 12.0) take as
# much as an A100.


def _forward_blocks(dtype: torch.dtype, head_dim: int, max_seqlen: int) -> _Blocks:
    if dtype == torch.float32:
        return _Blocks(64, 32, 8, 2) if head_dim <= 64 else _Blocks(16, 32, 4, 2)
    if max_seqlen <= 64:
        return _Blocks(64, 64, 4, 2)
    return _Blocks(128, 64, 8, 3 if head_dim <= 64 else 2)


def _whole_blocks(dtype: torch.dtype, head_dim: int) -> tuple[_Blocks, ...]:
    """For sequences whose keys one block holds, the shortest first."""
    if dtype == torch.float32:
        return ()
    if head_dim <= 64:
        return _Blocks(32, 64, 4, 2), _Blocks(32, 128, 8, 2)
    return (_Blocks(16, 32, 8, 1),)


def _long_blocks(dtype: torch.dtype, head_dim: int) -> tuple[_Blocks, _Blocks]:
    """For longer sequences: of the kernel of the queries, and of that of the keys."""
    if dtype == torch.float32:
        if head_dim <= 64:
            return _Blocks(32, 32, 8, 2), _Blocks(32, 32, 8, 2)
        return _Blocks(16, 32, 4, 2), _Blocks(16, 32, 8, 2)
    if head_dim <= 64:
        return _Blocks(128, 64, 8, 2), _Blocks(32, 128, 8, 2)
    return _Blocks(64, 64, 8, 2), _Blocks(32, 64, 8, 2)


@triton.jit
def _load_rows(base, stride, count, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """ROWS rows of one head, `stride` apart; zeros past `count` rows and past HEAD_DIM."""
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = row < count
    if BLOCK_D != HEAD_DIM:
        inside = inside & (dim < HEAD_DIM)
    return tl.load(base + row * stride + dim, mask=inside, other=0.0)


@triton.jit
def _store_rows(base, values, stride, count, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = row < count
    if BLOCK_D != HEAD_DIM:
        inside = inside & (dim < HEAD_DIM)
    tl.store(base + row * stride + dim, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def _locate(cu_seqlens, blocks, heads):
    """This program's block and head, the first row of its sequence and the sequence's length."""
    program = tl.program_id(0)
    sequence = program // heads // blocks
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1) - start
    return program // heads % blocks, program % heads, start.to(tl.int64), length


@triton.jit
def _forward(
    qkv,  # [T, 3, heads, HEAD_DIM]
    cu_seqlens,  # [S + 1]
    out,  # [T, heads, HEAD_DIM]
    logsumexp,  # [T, heads]
    blocks,
    heads,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    block, head, start, length = _locate(cu_seqlens, blocks, heads)
    first = block * BLOCK_Q
    if first >= length:
        return
    width = heads * HEAD_DIM
    rows = qkv + start * (3 * width) + head * HEAD_DIM
    query = _load_rows(rows + first.to(tl.int64) * (3 * width), 3 * width, length - first, BLOCK_Q, HEAD_DIM, BLOCK_D)
    largest = tl.full([BLOCK_Q], -3e38, tl.float32)  # not infinite: what is infinite has no difference
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    column = tl.arange(0, BLOCK_K)[None, :]
    rows += width
    for left in range(length, 0, -BLOCK_K):
        key = _load_rows(rows, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        value = _load_rows(rows + width, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * (scale * _LOG2_E)
        scores = tl.where(column < left, scores, float("-inf"))
        larger = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, 1)
        result = tl.dot(weights.to(value.dtype), value, result * shrink[:, None], input_precision="ieee")
        largest = larger
        rows += BLOCK_K * 3 * width
    at = (start + first) * heads + head
    _store_rows(out + at * HEAD_DIM, result / total[:, None], width, length - first, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = tl.arange(0, BLOCK_Q)
    tl.store(logsumexp + at + row * heads, (largest + tl.log2(total)) / _LOG2_E, mask=row < length - first)


@triton.jit
def _powers(products, logsumexp, scale):
    """exp(scale · products - logsumexp): never above 1, even where rounding of huge scores says so.

    The logsumexp of a score of 10⁴ is off by 0.0005, and all powers of its row with it: divided by their sum, they are
    probabilities. From 10⁹ on no power may be left.
    """
    exponent = products * (scale * _LOG2_E) - logsumexp * _LOG2_E
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _backward_keys(
    grad,  # [T, heads, HEAD_DIM]
    qkv,  # [T, 3, heads, HEAD_DIM]
    cu_seqlens,  # [S + 1]
    logsumexp,  # [T, heads]
    means,  # [T, heads]; like logsumexp and totals read only where a block is not WHOLE
    totals,  # [T, heads]
    out,  # [T, 3, heads, HEAD_DIM]
    blocks,
    heads,
    scale,
    shortest,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """dk and dv of a block of keys; where it holds the WHOLE sequence, dq as well.

    Sequences of fewer than `shortest` tokens are left to another launch, as are those that no WHOLE block holds.
    Scores are transposed, (keys, queries): the products into dk and dv take them out of registers.
    """
    block, head, start, length = _locate(cu_seqlens, blocks, heads)
    first = block * BLOCK_K
    if (length < shortest) | (first >= length):
        return
    if WHOLE and length > BLOCK_K:
        return
    width = heads * HEAD_DIM
    count = length - first
    query_at = start * (3 * width) + head * HEAD_DIM
    key_at = query_at + first.to(tl.int64) * (3 * width) + width
    key = _load_rows(qkv + key_at, 3 * width, count, BLOCK_K, HEAD_DIM, BLOCK_D)
    value = _load_rows(qkv + key_at + width, 3 * width, count, BLOCK_K, HEAD_DIM, BLOCK_D)
    grad_key = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    grad_value = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    row = tl.arange(0, BLOCK_Q)
    existing = tl.arange(0, BLOCK_K)[:, None] < count
    at = start * heads + head
    for left in range(length, 0, -BLOCK_Q):
        query = _load_rows(qkv + query_at, 3 * width, left, BLOCK_Q, HEAD_DIM, BLOCK_D)
        grad_out = _load_rows(grad + at * HEAD_DIM, width, left, BLOCK_Q, HEAD_DIM, BLOCK_D)
        if query.dtype == tl.float32:
            # Summed as the kernel of the queries sums them: a score of 10⁴ in another order is off by 0.001, and the
            # power of the one key that counts would no longer be its row's total.
            products = tl.trans(tl.dot(query, tl.trans(key), input_precision="ieee"))
        else:
            products = tl.dot(key, tl.trans(query), input_precision="ieee")
        if WHOLE:
            scores = tl.where(existing, products * (scale * _LOG2_E), float("-inf"))
            weights = tl.exp2(scores - tl.max(scores, 0)[None, :])
            # A division's own steps would take registers that are not left: it would spill.
            weights *= tl.exp2(-tl.log2(tl.sum(weights, 0)))[None, :]
        else:
            sums = tl.load(logsumexp + at + row * heads, mask=row < left, other=0.0)
            total = tl.load(totals + at + row * heads, mask=row < left, other=1.0)
            weights = _powers(products, sums[None, :], scale) * (1.0 / total)[None, :]
        grad_value = tl.dot(weights.to(grad_out.dtype), grad_out, grad_value, input_precision="ieee")
        grad_weights = tl.dot(value, tl.trans(grad_out), input_precision="ieee")
        if WHOLE:
            mean = tl.sum(weights * grad_weights, 0)
        else:
            mean = tl.load(means + at + row * heads, mask=row < left, other=0.0)
        grad_scores = (weights * (grad_weights - mean[None, :])).to(query.dtype)
        grad_key = tl.dot(grad_scores, query, grad_key, input_precision="ieee")
        if WHOLE:
            # Transposed too: a block of queries is too narrow for the rows of a product.
            grad_query = tl.trans(tl.dot(tl.trans(key), grad_scores, input_precision="ieee")) * scale
            _store_rows(out + query_at, grad_query, 3 * width, left, BLOCK_Q, HEAD_DIM, BLOCK_D)
        query_at += BLOCK_Q * 3 * width
        at += BLOCK_Q * heads
    _store_rows(out + key_at, grad_key * scale, 3 * width, count, BLOCK_K, HEAD_DIM, BLOCK_D)
    _store_rows(out + key_at + width, grad_value, 3 * width, count, BLOCK_K, HEAD_DIM, BLOCK_D)


@triton.jit
def _backward_queries(
    grad,  # [T, heads, HEAD_DIM]
    qkv,  # [T, 3, heads, HEAD_DIM]
    cu_seqlens,  # [S + 1]
    logsumexp,  # [T, heads]
    means,  # [T, heads]
    totals,  # [T, heads]
    out,  # [T, 3, heads, HEAD_DIM]
    blocks,
    heads,
    scale,
    shortest,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The mean Σ p·dp and dq of a block of queries, in two passes over the keys.

    Where only one key counts, or dp hardly differs between keys, all of dp - mean cancels but the rounding of the mean.
    In float32 it is therefore the mean of the keys so far, and each block moves it twice: by the mean of the
    differences from it, and by what rounding left of that. Other dtypes round what comes of it far more coarsely.
    """
    block, head, start, length = _locate(cu_seqlens, blocks, heads)
    first = block * BLOCK_Q
    if (length < shortest) | (first >= length):
        return
    width = heads * HEAD_DIM
    count = length - first
    rows = qkv + start * (3 * width) + head * HEAD_DIM
    query_at = (start + first) * (3 * width) + head * HEAD_DIM
    at = (start + first) * heads + head
    query = _load_rows(qkv + query_at, 3 * width, count, BLOCK_Q, HEAD_DIM, BLOCK_D)
    grad_out = _load_rows(grad + at * HEAD_DIM, width, count, BLOCK_Q, HEAD_DIM, BLOCK_D)
    row = tl.arange(0, BLOCK_Q)
    sums = tl.load(logsumexp + at + row * heads, mask=row < count, other=0.0)
    column = tl.arange(0, BLOCK_K)[None, :]
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    keys = rows + width
    for left in range(length, 0, -BLOCK_K):
        key = _load_rows(keys, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        value = _load_rows(keys + width, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        powers = _powers(products, sums[:, None], scale)
        if query.dtype == tl.float32:
            powers = tl.where(column < left, powers, 0.0)
            before = total
            total += tl.sum(powers, 1)
            share = 1.0 / tl.maximum(total, _TINY)
            moved = mean + tl.sum(powers * (grad_weights - mean[:, None]), 1) * share
            mean = moved + (tl.sum(powers * (grad_weights - moved[:, None]), 1) + before * (mean - moved)) * share
        else:
            total += tl.sum(powers, 1)
            mean += tl.sum(powers * grad_weights, 1)
        keys += BLOCK_K * 3 * width
    if query.dtype != tl.float32:
        # Keys past the end are zeros, and so are their scores: to tell them apart above would take registers.
        total -= _powers(tl.zeros([BLOCK_Q], tl.float32), sums, scale) * (tl.cdiv(length, BLOCK_K) * BLOCK_K - length)
        mean /= tl.maximum(total, _TINY)
    total = tl.maximum(total, _TINY)
    tl.store(means + at + row * heads, mean, mask=row < count)
    tl.store(totals + at + row * heads, total, mask=row < count)
    grad_query = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    keys = rows + width
    for left in range(length, 0, -BLOCK_K):
        key = _load_rows(keys, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        value = _load_rows(keys + width, 3 * width, left, BLOCK_K, HEAD_DIM, BLOCK_D)
        products = tl.dot(query, tl.trans(key), input_precision="ieee")
        weights = _powers(products, sums[:, None], scale) * (1.0 / total)[:, None]
        grad_weights = tl.dot(grad_out, tl.trans(value), input_precision="ieee")
        grad_scores = (weights * (grad_weights - mean[:, None])).to(key.dtype)
        grad_query = tl.dot(grad_scores, key, grad_query, input_precision="ieee")
        keys += BLOCK_K * 3 * width
    _store_rows(out + query_at, grad_query * scale, 3 * width, count, BLOCK_Q, HEAD_DIM, BLOCK_D)


def packed_attention(qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float) -> tuple[Tensor, Tensor]:
    qkv, cu_seqlens = qkv.contiguous(), cu_seqlens.contiguous()
    total, _, heads, head_dim = qkv.shape
    out = torch.empty((total, heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    logsumexp = torch.empty((total, heads), dtype=torch.float32, device=qkv.device)
    sizes = _forward_blocks(qkv.dtype, head_dim, max_seqlen)
    blocks = triton.cdiv(max_seqlen, sizes.queries)
    programs = (cu_seqlens.shape[0] - 1) * blocks * heads
    if total and programs:
        _forward[(programs,)](qkv, cu_seqlens, out, logsumexp, blocks, heads, scale, **sizes.arguments(head_dim))
    return out, logsumexp


def packed_attention_backward(
    grad: Tensor, qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, logsumexp: Tensor, scale: float
) -> Tensor:
    grad, qkv, cu_seqlens = grad.contiguous(), qkv.contiguous(), cu_seqlens.contiguous()
    logsumexp = logsumexp.contiguous()
    heads, head_dim = qkv.shape[2:]
    out = torch.empty_like(qkv)
    programs = (cu_seqlens.shape[0] - 1) * heads
    if not out.numel() or not programs:
        return out
    tensors = (grad, qkv, cu_seqlens, logsumexp)
    shortest = 1
    for sizes in _whole_blocks(qkv.dtype, head_dim):
        if shortest <= max_seqlen:
            _backward_keys[(programs,)](
                *tensors, logsumexp, logsumexp, out, 1, heads, scale, shortest, WHOLE=True, **sizes.arguments(head_dim)
            )
        shortest = sizes.keys + 1
    if shortest <= max_seqlen:
        means, totals = torch.empty_like(logsumexp), torch.empty_like(logsumexp)
        of_queries, of_keys = _long_blocks(qkv.dtype, head_dim)
        blocks = triton.cdiv(max_seqlen, of_queries.queries)
        _backward_queries[(programs * blocks,)](
            *tensors, means, totals, out, blocks, heads, scale, shortest, **of_queries.arguments(head_dim)
        )
        blocks = triton.cdiv(max_seqlen, of_keys.keys)
        _backward_keys[(programs * blocks,)](
            *tensors, means, totals, out, blocks, heads, scale, shortest, WHOLE=False, **of_keys.arguments(head_dim)
        )
    return out
