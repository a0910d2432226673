"""What the objectives that draw random coalitions share: the draw of each step, and the values of what was drawn."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastshap_kernels import coalition_sizes, pack_bits, sample_coalitions
from fastshap_kernels._checks import check_count, check_flag

from .._checks import check_choice
from .._runtime.precision import lowered
from ..games.coalitions import Coalitions
from ..games.sharded import is_sharded
from ..models.self_explaining import SelfExplainingClassifier
from .base import Objective, ObjectiveTerms, check_not_recorded

SIZES = ("shapley", "uniform")
#: The seed of the second draw, of the coalitions that become empty or full: another stream than the first's.
_OF_ENDS = 2**64 - 1


class CoalitionObjective(Objective):
    """An objective that draws coalitions anew each step; subclasses give its `terms`.

    Args:
        coalitions: M, coalitions per image and step.
        paired: coalitions come as complements.
        sizes: "shapley" for the Shapley kernel, or "uniform", 1 … P − 1 alike.
        seed: of the sampler.
        with_ends: sizes 0 and P too, each as likely as one of the P + 1 sizes. For uniform sizes.

    Deterministic: yes, for one seed and sequence of calls. `state_dict` holds the sampler's counter.
    """

    def __init__(self, coalitions: int, *, paired: bool, sizes: str, seed: int, with_ends: bool = False) -> None:
        name = type(self).__name__
        check_choice("sizes", sizes, SIZES)
        self.coalitions = check_count(name, "coalitions", coalitions, 1, 2**31 - 1)
        self.paired, self.sizes = check_flag(name, "paired", paired), sizes
        self.seed = check_count(name, "seed", seed, 0, _OF_ENDS)
        self.with_ends = with_ends
        self._drawn = 0  # coalitions so far: the counter of the sampler
        self._compiled: Callable[..., ObjectiveTerms] | None = None

    def terms(self, *arguments: Any, **options: Any) -> ObjectiveTerms:
        """The loss of one batch and given coalitions: a pure function."""
        raise NotImplementedError

    def compile(self, **options: Any) -> None:
        """Compiles the step in place, as `nn.Module.compile` does; `options` are those of `torch.compile`."""
        self._compiled = torch.compile(self.terms, **options)

    @property
    def settings(self) -> dict[str, Any]:
        """The arguments that are words and numbers."""
        kinds = (bool, int, float, str, tuple, type(None))
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return {name: value for name, value in own.items() if isinstance(value, kinds)}

    def check(self, model: Any, data: Any) -> None:
        """Refuses recorded coalitions, since it draws its own."""
        check_not_recorded(self, data)

    @property
    def is_packed_in_pairs(self) -> bool:
        return self.paired and self.coalitions % 2 == 0

    def draw(self, model: SelfExplainingClassifier, images: Tensor) -> Coalitions:
        """The next coalitions, on the device of `images`; no device is waited for.

        Processes draw those that one would for the batches of all, which are of one size, in the processes' order.

        The packed batch of unpaired coalitions has as many rows as tokens are present, which only the bits say: they
        are drawn and counted on the CPU, and the batch is padded to one of few sizes.
        """
        device, batch = images.device, images.shape[0]
        is_counted = model.game.packs and not self.is_packed_in_pairs
        bits = self._sample(batch, model.players, torch.device("cpu") if is_counted else device)
        self._drawn += batch * self.coalitions * _process_and_count()[1]
        # Without a device to wait for, and nothing compiled, the count can be left to the packing.
        if not is_counted or (device.type == "cpu" and self._compiled is None):
            return Coalitions(bits, model.players, self.is_packed_in_pairs)
        drawn = Coalitions(bits, model.players)
        present = int(drawn.sizes.sum())
        number = batch * self.coalitions
        game: Any = model.game  # of a transformer, since it packs
        rows = _padded(present, number, model.players) + number * game.prefix
        bits = bits.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else bits
        return Coalitions(bits, model.players, rows=rows)

    def _sample(self, batch: int, players: int, device: torch.device) -> Tensor:
        def sampled(players: int, seed: int) -> Tensor:
            # Those of all processes follow one another, as their images do in one batch.
            offset = self._drawn + _process_and_count()[0] * batch * self.coalitions
            return sample_coalitions(
                batch,
                self.coalitions,
                players,
                seed=seed,
                offset=offset,
                paired=self.paired,
                sizes=self.sizes,
                device=device,
            )

        bits = sampled(players, self.seed)
        if not self.with_ends:
            return bits
        # Of P + 2 players, each of the P + 1 sizes is as likely: the first stands for 0, the last for P.
        size = coalition_sizes(sampled(players + 2, _OF_ENDS - self.seed), players + 2).unsqueeze(2)
        everyone = pack_bits(torch.ones(players, dtype=torch.bool, device=device))
        return bits.where(size > 1, 0).where(size <= players, everyone)

    def state_dict(self) -> dict[str, Any]:
        """The sampler's counter."""
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = int(state["drawn"])


def values_of_step(
    model: SelfExplainingClassifier, images: Tensor, coalitions: Coalitions, precision: str = "same"
) -> Tensor:
    """v(S) of a step's coalitions, (B, M, K): in chunks that bound the memory where they can be cut.

    Cutting chunks reads the bits of unpaired coalitions, and is Python: neither for padded nor for compiled steps. Nor
    where the model is sharded: a process with less free memory would run other passes than those that wait for it.
    """
    is_cut = coalitions.rows is None and not torch.compiler.is_compiling()
    if is_cut and not is_sharded(model.game.backbone):
        return model.coalition_values(images, coalitions, precision=precision)
    with lowered(model, precision):
        return model.game.values(images, coalitions)


def _process_and_count() -> tuple[int, int]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def _padded(present: int, coalitions: int, players: int) -> int:
    """The size that a batch of so many present patches is padded to.

    The sizes lie two standard deviations of the number of present patches apart (|S| deviates by 0.41 P, so their sum
    by 0.41 P √(B·M)): nearly every batch falls into one of four, each of which is compiled once, and padding adds
    0.8 / √(B·M) to the work on average: 4 % for 64 images with 8 coalitions each.
    """
    step = max(1, math.ceil(0.82 * players * math.sqrt(coalitions)))
    return min(-(-present // step) * step, coalitions * players)
