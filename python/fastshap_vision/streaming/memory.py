"""The memory that is free, and the memory that a row takes."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..games.base import Game
from ..games.coalitions import Coalitions

#: Bytes per row of a game, by what they depend on; measured once.
_row_bytes: weakref.WeakKeyDictionary[Game, dict[Any, float]] = weakref.WeakKeyDictionary()


def pair_rows(game: Game) -> int:
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
        known[key] = _measure_pair(game, images[:1].detach(), keeps_graph) / pair_rows(game)
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
    with torch.random.fork_rng(devices), statistics_kept(game.backbone), gradients, live:
        values = game.values(image, Coalitions(both[None], game.players, paired=True))
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


@contextmanager
def statistics_kept(backbone: nn.Module) -> Iterator[None]:
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
