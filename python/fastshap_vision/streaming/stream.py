"""v(S) of many coalitions: in chunks that fit the memory, captured in a CUDA graph where there is one.

A chunk takes as many rows (tokens of a transformer, patches of a convolutional network) as memory and caches allow.
Coalitions of unequal size are dealt to the chunks by size, like cards, so that all chunks have nearly the same number
of rows: one graph serves them all. Each chunk embeds its image anew, which is 197 rows beside thousands.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from fastshap_kernels._checks import check_flag, describe

from .._log import say_once
from .._runtime.progress import progress_bar
from ..games.base import Game
from ..games.coalitions import Coalitions
from .chunks import Chunks, Limits, Values, cut, measured_limits, take
from .memory import statistics_kept

#: Capturing a graph costs about three chunks, and unequal chunks up to one more unit each.
_GRAPH_CHUNKS, _GRAPH_UNITS = 16, 16


def stream(
    game: Game, images: Tensor, coalitions: Coalitions, max_rows: int | str, progress: bool, variant: str = ""
) -> Tensor:
    """v(S) of every coalition, (B, M, K); see `SelfExplainingClassifier.coalition_values`.

    Bits on the CPU are counted there, so that a GPU is never waited for; those on a GPU are counted once, at the
    start. `variant` names whatever else changes a row's memory.
    """
    batch, count = coalitions.batch, coalitions.count
    check_flag("coalition_values", "progress", progress)
    is_count = isinstance(max_rows, Integral) and not isinstance(max_rows, bool) and max_rows >= 1
    if not is_count and not (isinstance(max_rows, str) and max_rows == "auto"):
        raise ValueError(f"Argument `max_rows` must be 'auto' or at least 1, but it is {describe(max_rows)}.")
    if not batch or not count:
        return images.new_zeros(batch, count, game.vote_weight()[0].shape[0])
    keeps_graph = torch.is_grad_enabled() and any(x.requires_grad for x in (images, *game.backbone.parameters()))
    if isinstance(max_rows, str):
        limits = measured_limits(game, images, coalitions, keeps_graph, variant)
    else:
        limits = Limits(int(max_rows), 0.0)
    chunks = cut(game, coalitions, limits, images.device)
    coalitions = coalitions.with_bits(coalitions.bits.to(images.device, non_blocking=True))
    with progress_bar(progress, total=batch * count, desc="coalitions", unit_scale=True, leave=False) as bar:
        return evaluate(game, images, coalitions, chunks, keeps_graph, bar)


def evaluate(
    game: Game, images: Tensor, coalitions: Coalitions, chunks: Chunks, keeps_graph: bool, bar: tqdm
) -> Tensor:
    """v(S), (B, M, K), chunk by chunk; nothing in here waits for a GPU, capturing a graph apart."""
    bits, batch, count = coalitions.bits, coalitions.batch, coalitions.count
    of_chunk = replace(coalitions, paired=chunks.unit == 2, rows=chunks.rows)  # others are cut apart

    def values(images: Tensor, bits: Tensor) -> Tensor:
        return game.values(images, of_chunk.with_bits(bits))

    number = -(-batch // chunks.images) * chunks.parts
    if number == 1:
        out = values(images, bits)
        bar.update(batch * count)
        return out
    parts = list(_parts(batch, count, chunks, bits.device))
    if keeps_graph:
        return _joined(_checkpointed(values, game.backbone), images, bits, parts, chunks, bar)
    run = _captured(values, images, bits, parts, chunks) if number >= _GRAPH_CHUNKS else values
    for index, (part, chosen) in enumerate(parts):
        block = run(images[part], take(bits, part, chosen))
        if index == 0:
            out = block.new_empty(batch, count, block.shape[2])
        if chosen is None:
            out[part] = block
        else:
            out[part].index_copy_(1, chosen, block)
        bar.update(block.shape[0] * block.shape[1])
    return out


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
        block = values(images[part], take(bits, part, chosen))
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
        return nullcontext(), statistics_kept(backbone)

    def run(images: Tensor, bits: Tensor) -> Tensor:
        return checkpoint(values, images, bits, use_reentrant=False, context_fn=contexts)

    return run


def _captured(
    values: Values, images: Tensor, bits: Tensor, parts: list[tuple[slice, Tensor | None]], chunks: Chunks
) -> Values:
    """`values` behind a CUDA graph of the first chunk's shapes; as it is where there can be none."""
    part, chosen = parts[0]
    if images.device.type != "cuda" or (chosen is not None and len(chosen) < _GRAPH_UNITS * chunks.unit):
        return values
    try:
        return _Graph(values, images[part], take(bits, part, chosen), chunks.unit)
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
