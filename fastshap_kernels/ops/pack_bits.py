"""Coalitions as bits, the only mask format on the hot path."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _checks
from ..reference import pack_bits as reference


def pack_bits(present: Tensor) -> Tensor:
    """Packs a boolean mask of players into 32-bit words.

    Player p is bit p % 32 of word p // 32; unused high bits are 0.

    Args:
        present (bool): (..., P) True where the player is present, 1 ≤ P ≤ 4096.

    Returns:
        int32 (..., W) with W = ceil(P / 32): 28 bytes a coalition at P = 196.

    Raises:
        ValueError: if `present` is not bool or P is out of range.

    Example:
        >>> fk.pack_bits(torch.tensor([[True, False, True], [False, True, False]]))
        tensor([[5],
                [2]], dtype=torch.int32)
    """
    expected, remedy = "a bool tensor (..., P)", "Convert a 0/1 mask with .bool()."
    _checks.check_dense("pack_bits", "present", present, expected)
    if present.dtype != torch.bool or present.ndim < 1:
        _checks.fail("pack_bits", "present", expected, present, remedy)
    _checks.check_count("pack_bits", "present.shape[-1]", int(present.shape[-1]), 1, _checks.MAX_PLAYERS)
    return reference.pack_bits(present)


def unpack_bits(bits: Tensor, players: int) -> Tensor:
    """Unpacks 32-bit words into a boolean mask of players: the inverse of `pack_bits`.

    Args:
        bits (int32): (..., W) packed coalitions.
        players: P, with W = ceil(P / 32).

    Returns:
        bool (..., P), True where the player is present.

    Raises:
        ValueError: if `bits` is not int32 or W does not fit P.

    Example:
        >>> fk.unpack_bits(torch.tensor([5], dtype=torch.int32), players=3)
        tensor([ True, False,  True])
    """
    players = _checks.check_count("unpack_bits", "players", players, 1, _checks.MAX_PLAYERS)
    _checks.check_packed("unpack_bits", bits, players)
    return reference.unpack_bits(bits, players)
