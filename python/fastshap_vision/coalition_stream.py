"""v(S) of many coalitions: in chunks that fit the memory, captured in a CUDA graph where there is one.

A chunk takes as many rows (tokens of a transformer, patches of a convolutional network) as memory and caches allow.
Coalitions of unequal size are dealt to the chunks by size, like cards, so that all chunks have nearly the same number
of rows: one graph serves them all. Each chunk embeds its image anew, which is 197 rows beside thousands.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fastshap_kernels import coalition_sum
from fastshap_kernels._checks import check_flag, describe

from ._log import say_once
from .game import Game

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
#: Capturing a graph costs about three chunks, and unequal chunks up to one more unit each.
_GRAPH_CHUNKS, _GRAPH_UNITS = 16, 16

#: Bytes per row of a game, by what they depend on; measured once.
_row_bytes: weakref.WeakKeyDictionary[Game, dict[Any, float]] = weakref.WeakKeyDictionary()

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


def stream(
    game: Game, images: Tensor, bits: Tensor, max_rows: int | str, paired: bool, progress: bool, variant: str = ""
) -> Tensor:
    """v(S) of every coalition, (B, M, K); see `SelfExplainingClassifier.coalition_values`.

    Bits on the CPU are counted there, so that a GPU is never waited for; those on a GPU are counted once, at the
    start. `variant` names whatever else changes a row's memory.
    """
    batch, coalitions = bits.shape[:2]
    check_flag("coalition_values", "paired", paired)
    if paired and coalitions % 2:
        raise ValueError(f"Argument `bits` must hold pairs (M even), since `paired` is True, but M is {coalitions}.")
    is_count = isinstance(max_rows, Integral) and not isinstance(max_rows, bool) and max_rows >= 1
    if not is_count and not (isinstance(max_rows, str) and max_rows == "auto"):
        raise ValueError(f"Argument `max_rows` must be 'auto' or at least 1, but it is {describe(max_rows)}.")
    if not batch or not coalitions:
        return images.new_zeros(batch, coalitions, game.vote_weight()[0].shape[0])
    keeps_graph = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *game.backbone.parameters()))
    if isinstance(max_rows, str):
        limits = _measured_limits(game, images, bits, keeps_graph, variant)
    else:
        limits = Limits(max_rows, 0.0)
    chunks = cut(game, bits, limits, paired, images.device)
    bits = bits.to(images.device, non_blocking=True)
    with tqdm(total=batch * coalitions, desc="coalitions", unit_scale=True, disable=not progress, leave=False) as bar:
        return evaluate(game, images, bits, chunks, paired, keeps_graph, bar)


# -- how much at once --------------------------------------------------------------------------------------


def cut(game: Game, bits: Tensor, limits: Limits, paired: bool, device: torch.device) -> Chunks:
    """The fewest chunks within the limits; a unit that is larger is a chunk of its own."""
    packs = game.packs
    prefix = getattr(game, "prefix", 0)
    batch, coalitions = bits.shape[:2]
    unit = 2 if paired and packs else 1
    units = coalitions // unit
    order = None
    if packs and unit == 1:
        sizes = prefix + _sizes(bits, game.players)
        sizes, order = sizes.sort(dim=1, stable=True)
        rows, order = sizes.cpu(), order.to(device, non_blocking=True)
    else:
        rows = torch.full((1, 1), game.players + unit * prefix if packs else game.players + prefix)
        rows = rows.expand(batch, units)
    # On a GPU the packed batch gets a size of its own, or counting it would wait for the device.
    is_padded = order is not None and device.type == "cuda"
    least = limits.per_coalition
    image_rows = rows.sum(1).clamp_min(max(1, int(least * max(coalitions, 2))))
    largest = int(image_rows.max())
    if largest <= limits.rows:
        groups = -(-batch // (limits.rows // largest))
        images = -(-batch // groups)
        together = nn.functional.pad(rows.sum(1), (0, -batch % images)).view(-1, images).sum(1)
        return Chunks(images, 1, None, unit, max(1, int(together.max())) if is_padded else None)
    count = min(units, -(-largest // limits.rows))
    while (load := _largest_load(rows, count)) > limits.rows and count < units:
        count = min(units, max(count + 1, count * load // limits.rows))
    return Chunks(1, count, order, unit, max(1, load) if is_padded else None)


def _largest_load(rows: Tensor, count: int) -> int:
    """Rows of the largest chunk when units (B, U) are dealt to `count`, a short chunk's first unit counting twice."""
    short = rows[:, rows.shape[1] % count : count] if rows.shape[1] % count else rows[:, :0]
    return int(torch.cat([rows, short], 1).unflatten(1, (-1, count)).sum(1).max())


def _sizes(bits: Tensor, players: int) -> Tensor:
    """|S| of every coalition: int64 (B, M)."""
    ones = torch.ones(1, players, 1, device=bits.device)
    return coalition_sum(ones.expand(bits.shape[0], -1, -1), bits)[..., 0].long()


def _measured_limits(game: Game, images: Tensor, bits: Tensor, keeps_graph: bool, variant: str) -> Limits:
    """The rows that free memory and, without gradient, the caches have room for."""
    device = images.device
    pair_rows = _pair_rows(game)
    if bits.shape[0] * bits.shape[1] <= 2:
        return Limits(2**62, 0.0)
    value_bytes = 4 * bits.shape[0] * bits.shape[1] * game.vote_weight()[0].shape[0]
    needed = row_bytes(game, images, keeps_graph, variant)
    rows = max(0.0, _SHARE_OF_FREE * (free_bytes(device) - value_bytes)) / needed
    if not keeps_graph:
        least = _USEFUL_ROWS if game.packs else _USEFUL_COALITIONS * (game.players + getattr(game, "prefix", 0))
        rows = min(rows, max(least, _USEFUL_BYTES.get(device.type, _USEFUL_BYTES["cuda"]) / needed))
    return Limits(max(1, int(rows)), pair_rows / 2)


def _pair_rows(game: Game) -> int:
    """Rows of two complements."""
    return (game.players if game.packs else 2 * game.players) + 2 * getattr(game, "prefix", 0)


def free_bytes(device: torch.device) -> float:
    """Bytes that tensors on `device` may still take."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(torch.cuda.mem_get_info(device)[0] + cached)
    return min(float(psutil.virtual_memory().available), _container_bytes())


def _container_bytes(group: Path = Path("/sys/fs/cgroup")) -> float:
    """What a container's limit leaves; infinite without one. File caches give way, so they count as free."""
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return float(limit - used + int(statistics.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or a limit of "max"
        return float("inf")


def row_bytes(game: Game, images: Tensor, keeps_graph: bool, variant: str = "") -> float:
    """Bytes of live tensors per row, weights left out: an upper bound for chunks of two coalitions and more.

    Measured on one pair of complements of the first image, whose embedding counts in full. What grows with the rows
    and what does not are both sums of tensors that live at once, so the need per row falls as chunks grow.
    """
    device = images.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    backbone = game.backbone
    trained = sum(x.requires_grad for x in backbone.parameters()) if keeps_graph else -1
    mode = (backbone.training, getattr(backbone, "grad_checkpointing", False), autocast, trained, variant)
    key = (images.shape[1:], images.dtype, images.device, game.vote_weight()[0].dtype, mode)
    known = _row_bytes.setdefault(game, {})
    if key not in known:
        known[key] = _measure_pair(game, images[:1].detach(), keeps_graph) / _pair_rows(game)
    return known[key]


def _measure_pair(game: Game, image: Tensor, keeps_graph: bool) -> int:
    """Peak bytes of live tensors for every second player and the others; backward too where a graph is kept."""
    words = (game.players + 31) // 32
    half = torch.full((words,), 0x55555555, dtype=torch.int32, device=image.device)
    both = torch.stack([half, half * 2])  # 0xAAAAAAAA, by overflow
    both[:, -1] &= (1 << game.players % 32) - 1 if game.players % 32 else -1
    devices = [image.device] if image.device.type == "cuda" else []
    image.requires_grad_(keeps_graph)
    gradients = torch.set_grad_enabled(keeps_graph)
    live = LiveBytes(list(game.backbone.parameters()))
    with torch.random.fork_rng(devices), _statistics_kept(game.backbone), gradients, live:
        values = game.values(image, both[None], True)
        if keeps_graph:
            torch.autograd.grad(values.sum(), image, allow_unused=True)
    return live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations make while it is on, and their peak.

    What autocast makes of `weights` is left out: it does not grow with the rows.
    """

    def __init__(self, weights: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What is there already, such as weights, is not counted when a view of it comes out.
        self._note((args, kwargs), counts=False)
        out = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights
        self._note(out, counts=not is_cast)
        return out

    def _note(self, tree: Any, counts: bool) -> None:
        for leaf in tree_leaves(tree):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes() if counts else 0
            if key not in self._known:
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


# -- the chunks, one by one --------------------------------------------------------------------------------


def evaluate(
    game: Game, images: Tensor, bits: Tensor, chunks: Chunks, paired: bool, keeps_graph: bool, bar: tqdm
) -> Tensor:
    """v(S), (B, M, K), chunk by chunk; nothing in here waits for a GPU, capturing a graph apart."""
    batch, coalitions = bits.shape[:2]

    def values(images: Tensor, bits: Tensor) -> Tensor:
        return game.values(images, bits, paired, chunks.rows)

    number = -(-batch // chunks.images) * chunks.parts
    if number == 1:
        out = values(images, bits)
        bar.update(batch * coalitions)
        return out
    parts = list(_parts(batch, coalitions, chunks, bits.device))
    if keeps_graph:
        return _joined(_checkpointed(values, game.backbone), images, bits, parts, chunks, bar)
    run = _captured(values, images, bits, parts, chunks) if number >= _GRAPH_CHUNKS else values
    for index, (part, chosen) in enumerate(parts):
        block = run(images[part], _take(bits, part, chosen))
        if index == 0:
            out = block.new_empty(batch, coalitions, block.shape[2])
        if chosen is None:
            out[part] = block
        else:
            out[part].index_copy_(1, chosen, block)
        bar.update(block.shape[0] * block.shape[1])
    return out


def _take(bits: Tensor, part: slice, chosen: Tensor | None) -> Tensor:
    return bits[part] if chosen is None else bits[part].index_select(1, chosen)


def _parts(batch: int, coalitions: int, chunks: Chunks, device: torch.device) -> Iterator[tuple[slice, Tensor | None]]:
    """Each chunk's images, and the coalitions of its one image; None for all."""
    if chunks.parts == 1:
        yield from ((slice(b, b + chunks.images), None) for b in range(0, batch, chunks.images))
        return
    as_they_come = torch.arange(coalitions // chunks.unit, device=device)
    within = torch.arange(chunks.unit, device=device)
    for b in range(batch):
        units = as_they_come if chunks.order is None else chunks.order[b]
        for c in range(chunks.parts):
            yield slice(b, b + 1), (units[c :: chunks.parts, None] * chunks.unit + within).flatten()


def _joined(
    values: Values, images: Tensor, bits: Tensor, parts: list[tuple[slice, Tensor | None]], chunks: Chunks, bar: tqdm
) -> Tensor:
    """As `evaluate`, out of place, so that gradients flow."""
    blocks = []
    for part, chosen in parts:
        block = values(images[part], _take(bits, part, chosen))
        blocks.append(block)
        bar.update(block.shape[0] * block.shape[1])
    if chunks.parts == 1:
        return torch.cat(blocks)
    of_images = []
    for start in range(0, len(parts), chunks.parts):
        orders = [chosen for _, chosen in parts[start : start + chunks.parts] if chosen is not None]
        ordered = torch.cat(blocks[start : start + chunks.parts], 1)
        of_images.append(ordered.index_select(1, torch.cat(orders).argsort()))
    return torch.cat(of_images)


def _checkpointed(values: Values, backbone: nn.Module) -> Values:
    """Keeps a chunk's input only and computes it again for its gradient: memory does not grow with M."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _statistics_kept(backbone)

    def run(images: Tensor, bits: Tensor) -> Tensor:
        return checkpoint(values, images, bits, use_reentrant=False, context_fn=contexts)

    return run


@contextmanager
def _statistics_kept(backbone: nn.Module) -> Iterator[None]:
    """Batch norms' running statistics don't move: a chunk that is computed twice counts once."""
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.training and m.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    try:
        for norm in norms:
            norm.momentum, norm.num_batches_tracked = 0.0, None
        yield
    finally:
        for norm, (momentum, tracked) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, tracked


# -- CUDA graphs -------------------------------------------------------------------------------------------


def _captured(
    values: Values, images: Tensor, bits: Tensor, parts: list[tuple[slice, Tensor | None]], chunks: Chunks
) -> Values:
    """`values` behind a CUDA graph of the first chunk's shapes; as it is where there can be none."""
    part, chosen = parts[0]
    if images.device.type != "cuda" or (chosen is not None and len(chosen) < _GRAPH_UNITS * chunks.unit):
        return values
    try:
        return _Graph(values, images[part], _take(bits, part, chosen), chunks.unit)
    except (RuntimeError, torch.AcceleratorError) as error:
        say_once(f"Coalitions run without a CUDA graph, since this model could not be captured: {error}")
        return values


class _Graph:
    """One chunk's values as a CUDA graph, replayed on new images and bits of the same shape."""

    def __init__(self, values: Values, images: Tensor, bits: Tensor, unit: int) -> None:
        self._values, self._unit = values, unit
        self._images, self._bits = images.clone(), bits.clone()
        current, side = torch.cuda.current_stream(images.device), torch.cuda.Stream(images.device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            values(self._images, self._bits)  # libraries load, kernels compile and tune before the capture
        current.wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._out = values(self._images, self._bits)

    def __call__(self, images: Tensor, bits: Tensor) -> Tensor:
        """Values that the next call overwrites."""
        present = bits.shape[1]
        bits = _fill(bits, self._bits.shape[1], self._unit)
        if images.shape != self._images.shape or bits.shape != self._bits.shape:
            return self._values(images, bits)
        self._images.copy_(images)
        self._bits.copy_(bits)
        self._graph.replay()
        return self._out[:, :present]


def _fill(bits: Tensor, coalitions: int, unit: int) -> Tensor:
    """A chunk that is one unit short of so many coalitions, with its first unit once more at its end."""
    return torch.cat([bits, bits[:, :unit]], 1) if bits.shape[1] + unit == coalitions else bits
