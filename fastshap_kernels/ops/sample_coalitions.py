"""Random coalitions as bits: Shapley-kernel sizes, pairs, and the same draw on every backend."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _checks, _library
from ..reference import sample_coalitions as reference

_KERNELS = ("cuda", "triton", "cpu")
_SIZES = ("shapley", "uniform")
_tables: dict[tuple[int, str, torch.device], Tensor] = {}


def sample_coalitions(
    batch: int,
    coalitions: int,
    players: int,
    *,
    seed: int,
    offset: int = 0,
    paired: bool = True,
    sizes: str = "shapley",
    device: torch.device | str | None = None,
    backend: str | None = None,
) -> Tensor:
    """Draws coalitions at random: a size from 1 to P − 1, then every subset of that size alike.

    P(S) = p(|S|) / C(P, |S|), with p(s) ∝ 1 / (s(P − s)) for the Shapley kernel. Never the empty or the full coalition.

    The draw is a pure function of `seed` and of the coalition's global index offset + b·M + m. It does not depend
    on how a batch is split, on the backend or on the device: sample(8, M) is sample(3, M) followed by
    sample(5, M, offset=3·M). A training loop raises `offset` by B·M a step, and resumes with it.

    Integer arithmetic throughout (Philox4x32-10). Probabilities of sizes are exact to 2^-63. Two players share a
    32-bit key now and then; the lower number then goes first, which moves any player's chance by less than P · 2^-32.

    Args:
        batch: B, images; 0 gives an empty result.
        coalitions: M, coalitions per image.
        players: P, from 2 to 4096. One player alone has no coalition between none and all.
        seed: from 0 to 2^64 − 1; distinct seeds give independent streams.
        offset: global index of the first coalition, counted in coalitions, from 0 to 2^63 − 1 − B·M.
        paired: coalitions 2j and 2j + 1 of an image are complements, drawn with the index of the first; the last
            one is alone when M is odd. Each has the same distribution as an unpaired one.
        sizes: "shapley", p(s) ∝ 1 / (s(P − s)), or "uniform", each size from 1 to P − 1 alike.
        device: where the result lies; default the current default device.
        backend: "reference", "cpu", "triton" or "cuda"; default the best available.

    Returns:
        int32 (B, M, ceil(P / 32)), player p being bit p % 32 of word p // 32; unused high bits are 0. No gradient.

    Raises:
        ValueError: if a number is out of range or `sizes` or `device` is unknown.
        RuntimeError: if an explicitly chosen backend can't serve the call.

    Deterministic: yes, the same bits on every backend and device.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011 (Philox); Lundberg and Lee, NeurIPS
    2017, theorem 2 (Shapley kernel); Covert and Lee, AISTATS 2021 (paired sampling).

    Example:
        >>> bits = fk.sample_coalitions(batch=2, coalitions=4, players=9, seed=0)
        >>> fk.coalition_sizes(bits, players=9)
        tensor([[3, 6, 1, 8],
                [8, 1, 7, 2]], dtype=torch.int32)
    """
    op = "sample_coalitions"
    batch, coalitions, players, seed, offset = _check_counts(batch, coalitions, players, seed, offset)
    _checks.check_flag(op, "paired", paired)
    _checks.check_choice(op, "sizes", sizes, _SIZES)
    thresholds = _size_thresholds(players, sizes, _resolve_device(device))
    served_by = _backend.select(op, thresholds.device, backend, _KERNELS)
    if served_by == "reference":
        return reference.sample_coalitions(thresholds, batch, coalitions, players, seed, offset, paired)
    # The dispatcher's whole numbers are signed: the kernel reads the same 64 bits unsigned.
    signed_seed = seed - 2**64 if seed >= 2**63 else seed
    kernels = _library.kernels(_library.namespace(served_by))
    return kernels.sample_coalitions(thresholds, batch, coalitions, players, signed_seed, offset, paired)


def _check_counts(batch: int, coalitions: int, players: int, seed: int, offset: int) -> tuple[int, ...]:
    op, check = "sample_coalitions", _checks.check_count
    batch, coalitions = check(op, "batch", batch, 0, 2**31 - 1), check(op, "coalitions", coalitions, 0, 2**31 - 1)
    two = "A coalition that is neither empty nor full needs two players."
    players = check(op, "players", players, 2, _checks.MAX_PLAYERS, two)
    seed = check(op, "seed", seed, 0, 2**64 - 1)
    most = 2**63 - 1 - batch * coalitions
    return (
        batch,
        coalitions,
        players,
        seed,
        check(op, "offset", offset, 0, most, "Start again from 0 with another seed."),
    )


def _resolve_device(device: torch.device | str | None) -> torch.device:
    """The device itself, with its index where it has one, so that each has a single table."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        _checks.fail("sample_coalitions", "device", "a device that this torch can use", device, reason)


def _size_thresholds(players: int, sizes: str, device: torch.device) -> Tensor:
    """int64 (P − 2,), made once per players, sizes and device: the exact fractions take milliseconds."""
    key = (players, sizes, device)
    if key in _tables:
        return _tables[key]
    # The table must outlive a caller's inference_mode block; one made under a fake mode ends with it.
    with torch.inference_mode(False):
        table = torch.tensor(reference.size_thresholds(players, sizes), dtype=torch.int64, device=device)
    if type(table) is Tensor:
        _tables[key] = table
    return table


# What torch.compiler.assume_constant_result sets; the decorator itself imports torch._dynamo, which takes seconds.
_size_thresholds._dynamo_marked_constant = True  # type: ignore[attr-defined]


# The table of thresholds is a tensor so that it, and nothing else, says which device's kernel is meant.


@_library.define(
    "sample_coalitions",
    "(Tensor thresholds, SymInt batch, SymInt coalitions, int players, int seed, SymInt offset, bool paired) -> Tensor",
)
def _fake(
    thresholds: Tensor, batch: int, coalitions: int, players: int, seed: int, offset: int, paired: bool
) -> Tensor:
    return thresholds.new_empty((batch, coalitions, _checks.words(players)), dtype=torch.int32)
