"""What each op takes, as a table: from it come valid calls, and what a call that is not valid looks like.

A call has a role for each argument. A role makes values, and says of any value whether the op takes it. Sizes have the
names of the docstrings: the first tensor with a B decides what B is, and another B that differs makes a call invalid.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

import fastshap_kernels as fk
from fastshap_kernels import _backend

Sizes = dict[str, int]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def words(players: int) -> int:
    return (players + 31) // 32


def bind(shape: torch.Size, names: str, sizes: Sizes) -> bool:
    """Whether a shape is that of `names`, such as "B M K"; new names get their sizes from it."""
    wanted = names.split()
    if len(wanted) != len(shape):
        return False
    return all(sizes.setdefault(name, int(size)) == size for name, size in zip(wanted, shape, strict=True))


def is_plain(value: object, sizes: Sizes) -> bool:
    """A tensor of one value after another, on the device of the others."""
    if not isinstance(value, Tensor) or value.is_nested or value.layout != torch.strided or value.is_quantized:
        return False
    return sizes.setdefault("device", hash(value.device)) == hash(value.device)


class Role(Protocol):
    """What an argument is."""

    def make(self, rng: random.Random, sizes: Sizes) -> Any:
        """A value that the op takes."""

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        """Whether the op is to take the value; sizes that it decides are noted."""


@dataclass(frozen=True)
class Choice(Role):
    """One of a few values."""

    choices: tuple[Any, ...]

    def make(self, rng: random.Random, sizes: Sizes) -> Any:
        return rng.choice(self.choices)

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        return any(type(value) is type(choice) and value == choice for choice in self.choices)


@dataclass(frozen=True)
class Floats(Role):
    """A floating-point tensor; `shapes` are alternatives."""

    shapes: str = ""
    optional: bool = False
    scale: float = 1.0
    positive: bool = False

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor | None:
        if self.optional and rng.random() < 0.3:
            return None
        shape = [sizes[name] for name in rng.choice(self.shapes.split("|")).split()]
        values = torch.randn(shape, generator=torch.Generator().manual_seed(rng.getrandbits(32))) * self.scale
        return (values.abs() + 0.1 if self.positive else values).to(DTYPES[sizes["dtype"]])

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if value is None:
            return self.optional
        if not is_plain(value, sizes) or value.dtype not in DTYPES:
            return False
        if self.positive and not value.is_meta and not bool((value.isfinite() & (value >= 0)).all()):
            return False
        return any(bind(value.shape, shape, sizes) for shape in self.shapes.split("|"))


@dataclass(frozen=True)
class Bits(Role):
    """Packed coalitions, the players of which are `sizes["P"]`."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        generator = torch.Generator().manual_seed(rng.getrandbits(32))
        present = torch.rand(sizes["B"], sizes["M"], sizes["P"], generator=generator) < rng.random()
        return fk.pack_bits(present)

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if not is_plain(value, sizes) or value.dtype != torch.int32 or value.ndim != 3:
            return False
        return bind(value.shape[:2], "B M", sizes) and value.shape[2] == words(sizes["P"])


@dataclass(frozen=True)
class Boundaries(Role):
    """cu_seqlens of `sizes["T"]` rows."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        inner = sorted(rng.randint(0, sizes["T"]) for _ in range(rng.randint(0, 4)))
        return torch.tensor([0, *inner, sizes["T"]], dtype=torch.int32)

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if not is_plain(value, sizes) or value.dtype != torch.int32 or value.ndim != 1 or not value.numel():
            return False
        if value.is_meta:
            return True
        starts = value.tolist()
        sizes["longest"] = max((b - a for a, b in pairwise(starts)), default=0)
        return starts == sorted(starts) and starts[0] == 0 and starts[-1] == sizes["T"]


@dataclass(frozen=True)
class Count(Role):
    """A whole number; `low` and `high` may follow from sizes."""

    low: Callable[[Sizes], int] | int = 0
    high: Callable[[Sizes], int] | int = 2**31 - 1
    size: str = ""
    optional: bool = False

    def limits(self, sizes: Sizes) -> tuple[int, int]:
        low, high = (limit(sizes) if callable(limit) else limit for limit in (self.low, self.high))
        return low, high

    def make(self, rng: random.Random, sizes: Sizes) -> int | None:
        if self.optional and rng.random() < 0.5:
            return None
        if self.size:
            return sizes[self.size]
        low, high = self.limits(sizes)
        return rng.randint(low, min(high, low + 40))

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            return False
        low, high = self.limits(sizes)
        if self.size:
            sizes.setdefault(self.size, int(value))
            return low <= value <= high and sizes[self.size] == value
        return low <= value <= high


@dataclass(frozen=True)
class Number(Role):
    """A finite number from `low` on."""

    low: float = -math.inf
    optional: bool = False

    def make(self, rng: random.Random, sizes: Sizes) -> float | None:
        return None if self.optional and rng.random() < 0.5 else max(self.low, 0) + rng.random()

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if value is None:
            return self.optional
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            return False
        try:
            return self.low <= float(value) < math.inf
        except OverflowError:
            return False


@dataclass(frozen=True)
class Grid(Role):
    """(h, w), divisors of `sizes["H"]` and `sizes["W"]`."""

    def make(self, rng: random.Random, sizes: Sizes) -> tuple[int, int]:
        return sizes["h"], sizes["w"]

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if not isinstance(value, tuple | list) or len(value) != 2:
            return False
        if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in value):
            return False
        sizes["P"] = int(value[0]) * int(value[1])
        return sizes["H"] % value[0] == 0 and sizes["W"] % value[1] == 0


@dataclass(frozen=True)
class Baseline(Role):
    """A number, or a tensor (C,), (C, H, W) or (B, C, H, W)."""

    tensor: Floats = Floats(shapes="C|C H W|B C H W")

    def make(self, rng: random.Random, sizes: Sizes) -> Any:
        return self.tensor.make(rng, sizes) if rng.random() < 0.7 else rng.choice((0, 0.5, -1e3))

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
            return self.tensor.accepts(value, dict(sizes))
        most = torch.finfo(DTYPES[sizes["dtype"]]).max
        return -most <= value <= most or value != value or value in (math.inf, -math.inf)


@dataclass(frozen=True)
class Games(Role):
    """Values of every coalition, (..., 2^P, K)."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        leading = [rng.randint(0, 2) for _ in range(rng.randint(0, 2))]
        return torch.randn(*leading, 2 ** rng.randint(1, 6), sizes["K"]).to(DTYPES[sizes["dtype"]])

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if not is_plain(value, sizes) or value.dtype not in DTYPES or value.ndim < 2:
            return False
        coalitions = value.shape[-2]
        return 2 <= coalitions <= 2**20 and coalitions & (coalitions - 1) == 0


@dataclass(frozen=True)
class Present(Role):
    """A mask of players, (..., P)."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        return torch.rand(sizes["B"], sizes["M"], sizes["P"]) < 0.5

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        plain = is_plain(value, sizes) and value.dtype == torch.bool
        return plain and value.ndim >= 1 and 1 <= value.shape[-1] <= 4096


@dataclass(frozen=True)
class AnyBits(Role):
    """Packed coalitions with any leading dimensions, of `sizes["P"]` players."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        return Bits().make(rng, sizes)

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        plain = is_plain(value, sizes) and value.dtype == torch.int32
        return plain and value.ndim >= 1 and value.shape[-1] == words(sizes["P"])


@dataclass(frozen=True)
class Call:
    """A function, the roles of its arguments in the order in which sizes follow, and what else must hold."""

    function: Callable[..., Any]
    roles: dict[str, Role]
    also: Callable[[dict[str, Any], Sizes], bool] = lambda arguments, sizes: True

    @property
    def name(self) -> str:
        return self.function.__name__

    def make(self, rng: random.Random, draw: Callable[[random.Random], Sizes] | None = None) -> dict[str, Any]:
        """Valid arguments, of sizes that `draw` draws."""
        while True:
            sizes = (draw or draw_sizes)(rng)
            arguments = {name: role.make(rng, sizes) for name, role in self.roles.items()}
            if self.is_valid(arguments):
                return arguments

    def is_valid(self, arguments: dict[str, Any]) -> bool:
        """Whether the op is to take these arguments."""
        sizes: Sizes = {}
        first = next(iter(arguments.values()))
        sizes["dtype"] = DTYPES.index(first.dtype) if isinstance(first, Tensor) and first.dtype in DTYPES else 1
        for name, role in self.roles.items():
            if not role.accepts(arguments[name], sizes):
                return False
            if isinstance(role, Floats) and "P" in sizes and not 1 <= sizes["P"] <= 4096:
                return False
        # A backend that was chosen never falls back, and none serves tensors without values.
        chosen = arguments.get("backend") or _backend._choice.name
        if sizes.get("device") == hash(torch.device("meta")) and chosen not in (None, "reference"):
            return False
        return self.also(arguments, sizes)


def draw_sizes(rng: random.Random) -> Sizes:
    """Small sizes, with zeros now and then, and one and two words of bits."""
    sizes = {name: rng.choice((0, 1, 1, 2, 2, 3, 3)) for name in ("B", "M", "K", "D", "T")}
    sizes |= {"P": rng.choice((1, 2, 5, 31, 32, 33, 40)), "Q": rng.randint(0, 2), "L": rng.randint(1, 9)}
    sizes |= {"h": rng.randint(1, 3), "w": rng.randint(1, 4), "C": rng.randint(1, 3), "heads": rng.randint(1, 3)}
    sizes |= {"H": sizes["h"] * rng.randint(1, 4), "W": sizes["w"] * rng.randint(1, 5), "E": rng.choice((1, 8, 16, 20))}
    sizes |= {"dtype": rng.choice((0, 1, 1, 1, 2, 3)), "three": 3, "QP": sizes["Q"] + sizes["P"]}
    return sizes


BACKEND = Choice((None, _backend._choice.name or "cpu", "reference"))


def _fits_rows(arguments: dict[str, Any], sizes: Sizes) -> bool:
    """pack_tokens: coalitions that are the pairs that they are said to be, and rows that hold all tokens."""
    bits, rows, paired = arguments["bits"], arguments["rows"], arguments["paired"]
    if paired and (rows is not None or sizes["M"] % 2):
        return False
    if bits.is_meta:
        return bool(paired) or rows is not None
    present = fk.unpack_bits(bits, sizes["P"])
    counted = int(present.sum()) + sizes["B"] * sizes["M"] * int(arguments["prefix"])
    if paired:
        # What is counted can be checked; a batch of no pairs with the rows of pairs is the caller's promise.
        return counted == sizes["B"] * (sizes["M"] // 2) * (sizes["P"] + 2 * int(arguments["prefix"]))
    return rows is None or rows >= counted


@dataclass(frozen=True)
class Prefix(Role):
    """Q, which leaves at least one of `sizes["QP"]` tokens to play."""

    def make(self, rng: random.Random, sizes: Sizes) -> int:
        return sizes["Q"]

    def accepts(self, value: Any, sizes: Sizes) -> bool:
        if not Count(0, sizes["QP"] - 1).accepts(value, sizes):
            return False
        sizes["P"] = sizes["QP"] - int(value)
        return sizes["P"] <= 4096


@dataclass(frozen=True)
class PairedBits(Bits):
    """Half of the time, coalitions that are pairs."""

    def make(self, rng: random.Random, sizes: Sizes) -> Tensor:
        bits = super().make(rng, sizes)
        present = fk.unpack_bits(bits, sizes["P"])
        half = present[:, : sizes["M"] // 2]
        return bits if sizes["M"] % 2 else fk.pack_bits(torch.stack([half, ~half], 2).flatten(1, 2))


def _determined(arguments: dict[str, Any], sizes: Sizes) -> bool:
    """kernel_shap: coalitions with a weight that tell all players apart."""
    bits, weights, players = arguments["bits"], arguments["weights"], int(arguments["players"])
    if bits.is_meta:
        return True
    rows = fk.unpack_bits(bits, players).double()
    rows = rows - rows.mean(-1, keepdim=True)
    if weights is not None:
        rows = rows * weights.double().sqrt().unsqueeze(-1)
    return all(int(torch.linalg.matrix_rank(image)) == players - 1 for image in rows)


_LOSS = {
    "values": Floats(shapes="B M K"),
    "null": Floats(shapes="K|B K", optional=True),
    "grand": Floats(shapes="B K", optional=True),
    "weights": Floats(shapes="B M", optional=True),
    "normalization": Choice(("none", "additive")),
    "reduction": Choice(("mean", "sum", "none")),
    "backend": BACKEND,
}


def _has_grand(arguments: dict[str, Any], sizes: Sizes) -> bool:
    return arguments["normalization"] == "none" or arguments["grand"] is not None


def _calls() -> Iterator[Call]:
    counts = {"batch": Count(0, 2**31 - 1, "B"), "coalitions": Count(0, 2**31 - 1, "M"), "players": Count(2, 4096, "P")}
    yield Call(
        fk.sample_coalitions,
        counts
        | {
            "seed": Count(0, 2**64 - 1),
            "offset": Count(0, lambda sizes: 2**63 - 1 - sizes["B"] * sizes["M"]),
            "paired": Choice((True, False)),
            "sizes": Choice(("shapley", "uniform")),
            "device": Choice((None, "cpu", torch.device("cpu"), b"cpu")),  # as PyTorch itself
            "backend": BACKEND,
        },
    )
    yield Call(fk.pack_bits, {"present": Present()})
    yield Call(fk.unpack_bits, {"players": Count(1, 4096, "P"), "bits": AnyBits()})
    yield Call(fk.coalition_sizes, {"players": Count(1, 4096, "P"), "bits": AnyBits(), "backend": BACKEND})
    yield Call(
        fk.mask_patches,
        {
            "images": Floats(shapes="B C H W"),
            "grid": Grid(),
            "bits": Bits(),
            "baseline": Baseline(),
            "dtype": Choice((None, *DTYPES)),
            "backend": Choice((None, "reference")),
        },
    )
    yield Call(
        fk.pack_tokens,
        {
            "tokens": Floats(shapes="B QP D"),
            "prefix": Prefix(),
            "bits": PairedBits(),
            "paired": Choice((True, False)),
            "rows": Count(0, 500, optional=True),
            "backend": BACKEND,
        },
        _fits_rows,
    )
    yield Call(
        fk.packed_attention,
        {
            "qkv": Floats(shapes="T three heads E"),
            "cu_seqlens": Boundaries(),
            "max_seqlen": Count(0),
            "scale": Number(optional=True),
            "backend": Choice((None, "reference")),
        },
        lambda arguments, sizes: (
            sizes["three"] == 3
            and min(sizes["heads"], sizes["E"]) > 0
            and arguments["max_seqlen"] >= sizes.get("longest", 0)
        ),
    )
    rows = {"rows": Floats(shapes="T D"), "cu_seqlens": Boundaries(), "prefix": Count(0)}
    yield Call(fk.segment_sum, rows | {"backend": BACKEND})
    affine = {"weight": Floats(shapes="D", optional=True), "bias": Floats(shapes="D", optional=True), "eps": Number(0)}
    yield Call(fk.layer_norm_segment_sum, rows | affine | {"backend": Choice((None, "reference"))})
    yield Call(fk.coalition_sum, {"features": Floats(shapes="B P L"), "bits": Bits(), "backend": BACKEND})
    yield Call(fk.shapley_regression_loss, {"phi": Floats(shapes="B P K"), "bits": Bits()} | _LOSS, _has_grand)
    head = {
        "features": Floats(shapes="B P L"),
        "weight": Floats(shapes="K L"),
        "bias": Floats(shapes="K", optional=True),
    }
    yield Call(fk.linear_shapley_loss, head | {"bits": Bits()} | _LOSS, _has_grand)
    yield Call(fk.exact_shapley, {"values": Games(), "backend": BACKEND})
    yield Call(
        fk.kernel_shap,
        {
            "players": Count(1, 4096, "P"),
            "values": Floats(shapes="B M K"),
            "bits": Bits(),
            "null": Floats(shapes="K|B K"),
            "grand": Floats(shapes="B K"),
            "weights": Floats(shapes="B M", optional=True, positive=True),
            "backend": Choice((None, "reference")),
        },
        _determined,
    )


#: Every op that a user can call, by name.
CALLS = {call.name: call for call in _calls()}
