"""Coalitions: which players are present, and what is promised of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastshap_kernels import coalition_sizes
from fastshap_kernels._checks import check_bits, check_count, check_flag


@dataclass(frozen=True, eq=False)
class Coalitions:
    """M sets of present players of each of B images.

    Args:
        bits (int32): (B, M, ⌈P/32⌉), as `fastshap_kernels.sample_coalitions` and `pack_bits` make them. Empty and full
            coalitions are allowed.
        players: P.
        paired: promises that coalitions 2j and 2j + 1 of an image are complements (M even), so that the packed batch
            of a transformer has as many rows whatever the coalitions.
        rows: pads the packed batch of coalitions that are not paired to that number of rows, at least
            Σ|S| + B·M·Q, so that its shape is known; None for no padding. Games that don't pack ignore it.

    Raises:
        ValueError: for bits of another type or shape, or an odd M that is `paired`.

    Example:
        >>> coalitions = fv.Coalitions(fk.sample_coalitions(2, 4, 9, seed=0), players=9, paired=True)
        >>> coalitions.sizes.shape
        torch.Size([2, 4])
    """

    bits: Tensor
    players: int
    paired: bool = False
    rows: int | None = None

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # what is made from others was checked with them
            return
        check_count("Coalitions", "players", self.players, 1, 2**31 - 1)
        check_bits("Coalitions", self.bits, self.players)
        check_flag("Coalitions", "paired", self.paired)
        if self.paired and self.count % 2:
            raise ValueError(
                f"Coalitions: argument `bits` must hold pairs (M even), since `paired` is True, but M is {self.count}."
            )
        if self.rows is not None:
            check_count("Coalitions", "rows", self.rows, 0, 2**31 - 1, "Pass None for no padding.")

    @property
    def batch(self) -> int:
        """B."""
        return self.bits.shape[0]

    @property
    def count(self) -> int:
        """M, of each image."""
        return self.bits.shape[1]

    @property
    def sizes(self) -> Tensor:
        """|S| of every coalition: int32 (B, M)."""
        return coalition_sizes(self.bits, self.players)

    def with_bits(self, bits: Tensor) -> Coalitions:
        """Other coalitions of the same players, of which the same is promised."""
        return replace(self, bits=bits)


def coalitions_of(
    images: Tensor, coalitions: Coalitions | Tensor, players: int, op: str, or_on_cpu: bool = False
) -> Coalitions:
    """`Coalitions` of the images, of themselves or of their bits; on the images' device, or if asked on the CPU.

    Raises:
        ValueError: for coalitions of other images or players.
    """
    bits = coalitions.bits if isinstance(coalitions, Coalitions) else coalitions
    is_on_cpu = or_on_cpu and isinstance(bits, Tensor) and bits.device.type == "cpu"
    like = images.new_empty(len(images), device="cpu") if is_on_cpu else images
    check_bits(op, bits, players, like, "coalitions")
    if not isinstance(coalitions, Coalitions):
        return Coalitions(bits, players)
    if coalitions.players != players:
        raise ValueError(
            f"{op}: argument `coalitions` must be of the game's {players} players, but they are of "
            f"{coalitions.players}. Pass Coalitions(bits, players={players})."
        )
    return coalitions
