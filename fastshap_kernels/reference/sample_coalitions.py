"""Coalitions drawn by a counter: a pure function of seed and global index, in integers, so equal on every backend.

The algorithm, exactly, for the coalition with global index g (64 bits) among P players:

    philox(g, block, stream) = the four words of Philox4x32-10
                               with counter (g mod 2^32, g >> 32, block, stream) and key (seed mod 2^32, seed >> 32)

1. Size. x = philox(g, 0, 0); draw = x[0]·2^31 + (x[1] >> 1), uniform in [0, 2^63).
   s = 1 + the number of thresholds ≤ draw, where threshold[i] = floor(2^63 · P(size ≤ i + 1)), i = 0 … P − 3.
2. Keys. Player p has key philox(g, 32·(p // 128) + p % 32, 1)[p // 32 % 4]: of each 128 players, one block serves
   the four that share a bit position. 32 neighbouring lanes, each with a block of its own, so hold the players of
   four words of bits.
3. Subset. The s players with the smallest keys are present; of equal keys the lower player number comes first.
   Without sorting: the largest limit with fewer than s keys below it, found bit by bit from the top, is the s-th
   smallest key; as soon as exactly s keys lie below a limit on the way, those are the coalition.
4. Pairs. Coalition 2j + 1 of an image is the complement of its coalition 2j; only even members draw.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .pack_bits import pack_bits

_DRAW_BITS = 63
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_SIZE_STREAM, _PLAYER_STREAM = 0, 1


def size_thresholds(players: int, sizes: str) -> list[int]:
    """floor(2^63 · P(size ≤ s)) for s = 1 … P − 2, from exact fractions; the last, 2^63, is above every draw."""
    if sizes == "uniform":
        weights = [1] * (players - 1)
    else:
        # P / (s(P − s)) = 1/s + 1/(P − s), over a common denominator.
        denominator = math.lcm(*range(1, players))
        weights = [denominator // s + denominator // (players - s) for s in range(1, players)]
    total, cumulative, thresholds = sum(weights), 0, []
    for weight in weights[:-1]:
        cumulative += weight
        thresholds.append((cumulative << _DRAW_BITS) // total)
    return thresholds


def sample_coalitions(
    thresholds: Tensor, batch: int, coalitions: int, players: int, seed: int, offset: int, paired: bool
) -> Tensor:
    """thresholds int64 (P − 2,) → bits int32 (B, M, W)."""
    device = thresholds.device
    images = torch.arange(batch, device=device).unsqueeze(1)
    members = torch.arange(0, coalitions, 2 if paired else 1, device=device)
    index = offset + images * coalitions + members  # (B, drawn coalitions)
    rank = player_keys(index, players, seed).argsort(dim=-1, stable=True).argsort(-1)
    present = rank < draw_sizes(index, thresholds, seed).unsqueeze(-1)
    if paired:
        present = torch.stack((present, ~present), 2).flatten(1, 2)[:, :coalitions]
    return pack_bits(present)


def draw_sizes(index: Tensor, thresholds: Tensor, seed: int) -> Tensor:
    """index int64 (...) → size of each coalition, int64 (...)."""
    first, second, _, _ = philox((index & _WORD, index >> 32, 0 * index, 0 * index + _SIZE_STREAM), seed)
    draw = (first << 31) + (second >> 1)
    return 1 + (thresholds <= draw.unsqueeze(-1)).sum(-1)


def player_keys(index: Tensor, players: int, seed: int) -> Tensor:
    """index int64 (...) → key of each player, int64 (..., P) in [0, 2^32)."""
    groups = -(-players // 128)
    block = torch.arange(32 * groups, device=index.device).expand(*index.shape, -1)
    index = index.unsqueeze(-1).expand_as(block)
    keys = philox((index & _WORD, index >> 32, block, 0 * block + _PLAYER_STREAM), seed)
    grouped = [words.unflatten(-1, (groups, 1, 32)) for words in keys]
    return torch.cat(grouped, -2).flatten(-3)[..., :players]


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on four int64 tensors that hold 32-bit words."""
    x0, x1, x2, x3 = counter
    key0, key1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], x0)
        high1, low1 = _multiply(_MULTIPLIERS[1], x2)
        x0, x1, x2, x3 = high1 ^ x1 ^ key0, low1, high0 ^ x3 ^ key1, low0
        key0, key1 = key0 + _KEY_STEPS[0] & _WORD, key1 + _KEY_STEPS[1] & _WORD
    return x0, x1, x2, x3


def _multiply(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of 32-bit words, by halves: the whole product would overflow int64."""
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF
