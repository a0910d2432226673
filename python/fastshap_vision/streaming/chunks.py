"""How many coalitions run at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..games.base import Game
from ..games.coalitions import Coalitions
from .memory import free_bytes, pair_rows, row_bytes

#: Bytes of live tensors past which a chunk without gradient gains nothing. On the CPU larger ones leave the caches:
#: digits ViT, 65 536 coalitions, 3.0 s in chunks of this size, 7.2 s at once. On a GPU, where nobody measured it, it
#: is 50 000 rows of a ViT-B in bfloat16 and more.
_USEFUL_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}
#: What a chunk gains from all the same, since a larger model is bound by its products, which read its weights anew:
#: rows of packed tokens (ViT-S/16, 32 coalitions: 0.82 s in one chunk, 0.93 s in four), coalitions of other games
#: (ResNet-50, 16 coalitions: 1.7 s in two chunks, 2.0 s in eight).
_USEFUL_ROWS, _USEFUL_COALITIONS = 4096, 8
#: Share of the free memory that a chunk may take. The rest is for what kernels allocate inside, and for the gaps that
#: chunks of many sizes leave in a heap (ViT-Ti without its last nine blocks: they level off at 150 MiB on the CPU).
_SHARE_OF_FREE = 0.5

Values = Callable[[Tensor, Tensor], Tensor]


class Chunks(NamedTuple):
    """How B images' coalitions are cut into chunks of whole images, or of one image's units.

    A unit is a coalition, or a pair of complements.
    """

    images: int  # of a chunk
    parts: int  # chunks of an image; 1 where chunks are whole images
    order: Tensor | None  # int64 (B, units) by size: chunk c of image b takes order[b, c::parts]; None: as they come
    unit: int  # coalitions of a unit
    rows: int | None  # static number of rows of every chunk's packed batch; None where it follows from the bits


class Limits(NamedTuple):
    """What a chunk may hold."""

    rows: int
    #: Rows that a coalition counts at least, on average: small ones take memory for their values too.
    per_coalition: float


def cut(game: Game, coalitions: Coalitions, limits: Limits, device: torch.device) -> Chunks:
    """The fewest chunks within the limits; a unit that is larger is a chunk of its own."""
    packs = game.packs
    prefix = getattr(game, "prefix", 0)
    batch, count = coalitions.batch, coalitions.count
    unit = 2 if coalitions.paired and packs else 1
    units = count // unit
    order = None
    if packs and unit == 1:
        sizes = prefix + coalitions.sizes.long()
        sizes, order = sizes.sort(dim=1, stable=True)
        rows, order = sizes.cpu(), order.to(device, non_blocking=True)
    else:
        rows = torch.full((1, 1), game.players + unit * prefix if packs else game.players + prefix)
        rows = rows.expand(batch, units)
    # On a GPU the packed batch gets a size of its own, or counting it would wait for the device.
    is_padded = order is not None and device.type == "cuda"
    least = limits.per_coalition
    image_rows = rows.sum(1).clamp_min(max(1, int(least * max(count, 2))))
    largest = int(image_rows.max())
    if largest <= limits.rows:
        groups = -(-batch // (limits.rows // largest))
        images = -(-batch // groups)
        together = nn.functional.pad(rows.sum(1), (0, -batch % images)).view(-1, images).sum(1)
        return Chunks(images, 1, None, unit, max(1, int(together.max())) if is_padded else None)
    parts = min(units, -(-largest // limits.rows))
    while (load := _largest_load(rows, parts)) > limits.rows and parts < units:
        parts = min(units, max(parts + 1, parts * load // limits.rows))
    return Chunks(1, parts, order, unit, max(1, load) if is_padded else None)


def _largest_load(rows: Tensor, count: int) -> int:
    """Rows of the largest chunk when units (B, U) are dealt to `count`, a short chunk's first unit counting twice."""
    short = rows[:, rows.shape[1] % count : count] if rows.shape[1] % count else rows[:, :0]
    return int(torch.cat([rows, short], 1).unflatten(1, (-1, count)).sum(1).max())


def measured_limits(game: Game, images: Tensor, coalitions: Coalitions, keeps_graph: bool, variant: str) -> Limits:
    """The rows that free memory and, without gradient, the caches have room for."""
    device = images.device
    per_pair = pair_rows(game)
    if coalitions.batch * coalitions.count <= 2:
        return Limits(2**62, 0.0)
    value_bytes = 4 * coalitions.batch * coalitions.count * game.vote_weight()[0].shape[0]
    needed = row_bytes(game, images, keeps_graph, variant)
    rows = max(0.0, _SHARE_OF_FREE * (free_bytes(device) - value_bytes)) / needed
    if not keeps_graph:
        least = _USEFUL_ROWS if game.packs else _USEFUL_COALITIONS * (game.players + getattr(game, "prefix", 0))
        rows = min(rows, max(least, _USEFUL_BYTES.get(device.type, _USEFUL_BYTES["cuda"]) / needed))
    return Limits(max(1, int(rows)), per_pair / 2)


def take(bits: Tensor, part: slice, chosen: Tensor | None) -> Tensor:
    return bits[part] if chosen is None else bits[part].index_select(1, chosen)
