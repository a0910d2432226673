"""|S| of coalitions: a count of the set bits, never a sum of ones."""

from __future__ import annotations

from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import coalition_sizes as reference

_KERNELS = ("cuda", "triton", "cpu")


def coalition_sizes(bits: Tensor, players: int, *, backend: str | None = None) -> Tensor:
    """Counts the players of every coalition.

    out[...] = |S(...)|, from 0 for the empty coalition to P for the full one.

    Args:
        bits (int32): (..., ceil(P / 32)) coalitions of the P players; bits beyond the players are ignored.
        players: P, from 1 to 4096.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        int32 (...), the shape of `bits` without its last dimension. No gradient.

    Raises:
        ValueError: if `bits` is not int32 or W does not fit P.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, the same numbers on every backend and device.

    Example:
        >>> bits = fk.pack_bits(torch.tensor([[True, False, True], [False, False, False]]))
        >>> fk.coalition_sizes(bits, players=3)
        tensor([2, 0], dtype=torch.int32)
    """
    op = "coalition_sizes"
    players = _checks.check_count(op, "players", players, 1, _checks.MAX_PLAYERS)
    _checks.check_packed(op, bits, players)
    return count_with(_backend.select(op, bits.device, backend, _KERNELS))(bits, players)


def count_with(served_by: str) -> reference.Count:
    """The coalition_sizes of a backend."""
    if served_by == "reference":
        return reference.coalition_sizes
    return _library.kernels(_library.namespace(served_by)).coalition_sizes


@_library.define("coalition_sizes", "(Tensor bits, int players) -> Tensor")
def _fake(bits: Tensor, players: int) -> Tensor:
    return bits.new_empty(bits.shape[:-1])


_library.register_vmap("coalition_sizes")
