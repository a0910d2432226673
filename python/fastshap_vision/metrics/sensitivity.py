"""Whether sums of attributions follow the output as sets of patches of one size come and go."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastshap_kernels._checks import check_count, fail

from .._checks import ROUNDING, check_choice
from ._arguments import Game, check_attributions, choose_target, values_with_full
from ._statistics import mean_and_error
from .score import Score

FORMS = ("ancona", "vit-shapley")


@dataclass(frozen=True, eq=False, repr=False)
class SensitivityN:
    """Correlations of B images for s sizes of subsets.

    Args:
        sizes (int64): (s,) players per subset.
        correlation (float64): (B, s). 0 where the sums of attributions do not vary; NaN where the output does not,
            which is left out below.

    Example:
        >>> values = model.explain(images).values
        >>> found = fv.metrics.sensitivity_n(model, images, values, sizes=(2, 5), subsets=10)
        >>> found.correlation.shape, found.mean.shape
        (torch.Size([4, 2]), torch.Size([2]))
    """

    sizes: Tensor
    correlation: Tensor

    @property
    def mean(self) -> Tensor:
        """(s,) mean over the images."""
        return mean_and_error(self.correlation)[0]

    @property
    def standard_error(self) -> Tensor:
        """(s,) standard error of the mean over the images."""
        return mean_and_error(self.correlation)[1]

    def score(self) -> Score:
        """Mean over the sizes, per image."""
        return Score(self.correlation.nanmean(1))

    def __repr__(self) -> str:
        return f"SensitivityN(sizes={self.sizes.tolist()}, mean={[round(x, 4) for x in self.mean.tolist()]})"


def sensitivity_n(
    game: Game,
    images: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    sizes: Sequence[int],
    subsets: int = 100,
    seed: int = 0,
    form: str = "ancona",
) -> SensitivityN:
    """Correlation between the attributions' sum over a random subset and its effect on the logit of the target.

    "ancona": Pearson, Σ_{p∈S} a_p with v(N) − v(N∖S), the fall when the n = |S| patches are removed.
    "vit-shapley": Spearman, Σ_{p∈S} a_p with v(S), when only the n = |S| patches are kept.

    Both are 1 for the attributions of a linear game. Values closer than 1e-6 of the image's largest are float32
    rounding: they count as equal.

    Args:
        game: a `SelfExplainingClassifier`, a `MaskedImageGame`, or another with `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as the game expects them.
        attributions (floating point): (B, P) of the target, larger = more important.
        target: None for the class that the game predicts from the whole image, an int, or (B,) classes.
        sizes: n, players per subset, each from 1 to P − 1.
        subsets: random subsets per image and size, drawn anew for every image.
        seed: of the subsets, below 2^32; those of an image depend on the seed and on its place in the batch.
        form: "ancona" or "vit-shapley".

    Returns:
        `SensitivityN`. It takes len(sizes) · subsets + 1 evaluations an image.

    Raises:
        ValueError: for attributions, a target, sizes or a form that do not fit, or values that are not finite.

    Deterministic: as the game is; the subsets follow from `seed`.

    Source: Ancona et al., Towards better understanding of gradient-based attribution methods, ICLR 2018; Covert, Kim,
    Lee, Learning to estimate Shapley values with vision transformers, ICLR 2023.

    Example:
        >>> values = model.explain(images).values
        >>> found = fv.metrics.sensitivity_n(model, images, values, sizes=(2, 5), form="vit-shapley")
        >>> found.score().values.shape
        torch.Size([4])
    """
    op = "sensitivity_n"
    check_choice("form", form, FORMS)
    attributions = check_attributions(op, game, images, attributions)
    subsets = check_count(op, "subsets", subsets, 2, 2**31 - 1)
    seed = check_count(op, "seed", seed, 0, 2**32 - 1, "PyTorch's generator reads no more bits of it.")
    sizes = _check_sizes(op, sizes, game.players)
    chosen = _subsets(len(images), game.players, sizes, subsets, seed).to(images.device)
    is_kept = form == "vit-shapley"
    full, values = values_with_full(op, game, images, chosen if is_kept else ~chosen)
    classes = choose_target(op, "target", target, full).view(-1, 1, 1).expand(-1, values.shape[1], 1)
    outputs = values.double().gather(2, classes).squeeze(2)
    sums = (chosen.double() @ attributions.unsqueeze(2)).squeeze(2)
    shape = (len(sizes), subsets)
    x, y = sums.unflatten(1, shape), outputs.unflatten(1, shape)
    # v(N) is the same for all subsets: the fall v(N) − v(N∖S) correlates as −v(N∖S) does.
    correlation = _correlation(x, y if is_kept else -y, ranked=is_kept)
    return SensitivityN(torch.tensor(sizes, device=images.device), correlation)


def _check_sizes(op: str, sizes: Sequence[int], players: int) -> list[int]:
    if players < 2:
        fail(op, "game.players", "at least 2, since one player alone has no subsets to compare", players)
    try:
        given = sizes.tolist() if isinstance(sizes, Tensor) else list(sizes)
    except TypeError:
        given = []
    if not isinstance(given, list) or not given:
        fail(op, "sizes", "a sequence of at least one number of players", sizes)
    remedy = "All subsets of P players are the same one."
    return [check_count(op, "sizes", size, 1, players - 1, remedy) for size in given]


def _subsets(images: int, players: int, sizes: list[int], subsets: int, seed: int) -> Tensor:
    """bool (B, s · subsets, P), uniform given their sizes; on the CPU, where a seed means the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor(sizes).view(-1, 1, 1)
    rows = []
    for _ in range(images):
        permutations = torch.rand(len(sizes), subsets, players, generator=generator).argsort(-1)
        rows.append((permutations < limits).flatten(0, 1))
    return torch.stack(rows)


def _correlation(x: Tensor, y: Tensor, ranked: bool) -> Tensor:
    """(B, s) over the last dimension of (B, s, subsets): NaN where y does not vary, 0 where only x does not."""

    def step(values: Tensor) -> Tensor:
        return ROUNDING * values.abs().amax((1, 2), keepdim=True)

    def is_constant(values: Tensor) -> Tensor:
        return (values.amax(2, keepdim=True) - values.amin(2, keepdim=True) <= step(values)).squeeze(2)

    constant_x, constant_y = is_constant(x), is_constant(y)
    if ranked:
        x, y = _ranks((x / step(x)).round()), _ranks((y / step(y)).round())
    x, y = x - x.mean(2, keepdim=True), y - y.mean(2, keepdim=True)
    product = (x * y).sum(2) / (x.square().sum(2) * y.square().sum(2)).sqrt()
    return product.masked_fill(constant_x, 0.0).masked_fill(constant_y, math.nan)


def _ranks(values: Tensor) -> Tensor:
    """Rank along the last dimension, equal values sharing the mean of theirs."""
    ordered = values.sort(-1).values
    before = torch.searchsorted(ordered, values.contiguous())
    through = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (before + through).double() / 2
