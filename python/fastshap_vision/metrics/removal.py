"""What happens to the output as patches are removed in the order of their attributions: curves and their scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastshap_kernels._checks import check_flag, fail

from .._checks import check_choice
from ..explanations.link import link_of, log_probabilities_of
from ._arguments import Game, check_attributions, choose_target, values_with_full
from .score import Score

#: 10 … 90 % of the players: the levels of AOPC and LOdds.
NINE_LEVELS = tuple(level / 10 for level in range(1, 10))
#: 0 … 90 %: the levels of Chefer's perturbation test, with the whole image.
TEN_LEVELS = (0.0, *NINE_LEVELS)


@dataclass(frozen=True, eq=False, repr=False)
class RemovalCurve:
    """The output for one class per image at n levels of removal (or, where `keep`, of presence).

    Args:
        counts (int64): (n,) players removed, or present where `keep`.
        log_probability: (B, n) logarithm of the target's probability at each level: of logits, their softmax; of one
            logit alone, its sigmoid.
        full_log_probability: (B,) the same with every player present.
        hit (bool): (B, n) whether the target is the most probable class; of one class alone, whether it is more
            probable than not.
        target (int64): (B,) the class per image.
        players: P.
        classes: K.
        keep: whether `counts` players are present instead of removed.

    Example:
        >>> curve = fv.metrics.removal_curve(model, images, model.explain(images).values)
        >>> curve.probability.shape, curve.area().values.shape
        (torch.Size([4, 10]), torch.Size([4]))
    """

    counts: Tensor
    log_probability: Tensor
    full_log_probability: Tensor
    hit: Tensor
    target: Tensor
    players: int
    classes: int
    keep: bool

    @property
    def probability(self) -> Tensor:
        """(B, n) probability of the target."""
        return self.log_probability.exp()

    def at(self, levels: Sequence[float]) -> RemovalCurve:
        """The same curve at some of its levels only, so that one curve can serve several metrics.

        Args:
            levels: shares of the players, as in `removal_curve`; their counts must be among `counts`.

        Raises:
            ValueError: for a level that the curve does not have.
        """
        known = {count: column for column, count in enumerate(self.counts.tolist())}
        wanted = _counts("RemovalCurve.at", levels, self.players)
        missing = [count for count in wanted if count not in known]
        if missing:
            fail("RemovalCurve.at", "levels", f"of {sorted(known)} players", f"{missing[0]} players")
        columns = torch.tensor([known[count] for count in wanted], device=self.counts.device)
        return replace(
            self,
            counts=self.counts[columns],
            log_probability=self.log_probability[:, columns],
            hit=self.hit[:, columns],
        )

    def area(self) -> Score:
        """Mean height of the target's probability between the first and the last of `counts`, in [0, 1].

        The trapezoid rule over `counts`, however they are spaced and in whatever order they come.

        Raises:
            ValueError: where all counts are the same.
        """
        return Score(self._mean_height(self.probability), self)

    def hit_area(self) -> Score:
        """Mean height of the hits, in [0, 1], by the same rule.

        Raises:
            ValueError: where all counts are the same, or there is one class alone.
        """
        if self.classes == 1:
            raise ValueError(
                "RemovalCurve.hit_area: hits need a game of at least two classes, but this one has one alone, which "
                "leads always. Take insertion, deletion or aopc, which follow its probability."
            )
        return Score(self._mean_height(self.hit), self)

    def _mean_height(self, heights: Tensor) -> Tensor:
        """float64 (B,) of (B, n)."""
        counts, order = self.counts.double().sort(stable=True)
        if counts[0] == counts[-1]:
            remedy = f"These all mean {int(counts[0])} of {self.players} players."
            fail("RemovalCurve", "levels", "at least two different numbers of players for an area", len(counts), remedy)
        return torch.trapezoid(heights.double()[:, order], counts) / (counts[-1] - counts[0])

    def aopc(self, *, signed: bool = True) -> Score:
        """Mean over the levels of p − p_k, or of |p − p_k| where not `signed`."""
        fall = (self.full_log_probability.exp().unsqueeze(1) - self.probability).double()
        return Score((fall if signed else fall.abs()).mean(1), self)

    def log_odds(self) -> Score:
        """Mean over the levels of log(p_k / p)."""
        return Score((self.log_probability - self.full_log_probability.unsqueeze(1)).double().mean(1), self)


def removal_curve(
    game: Game,
    images: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    order: str = "most",
    keep: bool = False,
    levels: Sequence[float] | None = None,
) -> RemovalCurve:
    """Removes the most (or least) important patches first, and records what becomes of a class.

    At level r, r · P players are removed, rounded half away from zero: 10 % of 64 are 6, of 5 are 1. Players with
    equal attributions go in the order of their numbers, whatever `order`; so a constant attribution removes patches
    row by row from the top left, which is an order like any other and not a neutral one.

    Args:
        game: a `SelfExplainingClassifier`, a `MaskedImageGame`, or another with `players` and `coalition_values`.
        images (floating point): (B, C, H, W), normalised as the game expects them.
        attributions (floating point): (B, P) of the target, larger = more important.
        target: the class followed: None for the one the game predicts from the whole image, an int, or (B,) classes.
        order: "most" or "least" important first.
        keep: the first players are the only ones present, instead of the ones removed.
        levels: shares of the players in [0, 1]; default all P + 1, from none to all.

    Returns:
        `RemovalCurve` of n = len(levels) levels. It takes n + 1 evaluations an image, and B · n · K logits of memory.

    Raises:
        ValueError: for attributions, a target or levels that do not fit, or values that are not finite.

    Example:
        >>> values = model.explain(images).values
        >>> curve = fv.metrics.removal_curve(model, images, values, levels=(0, 0.5, 1))
        >>> curve.counts.tolist(), curve.probability.shape
        ([0, 5, 9], torch.Size([4, 3]))
    """
    op = "removal_curve"
    check_choice("order", order, ("most", "least"))
    check_flag(op, "keep", keep)
    attributions = check_attributions(op, game, images, attributions)
    players = game.players
    steps = range(players + 1) if levels is None else _counts(op, levels, players)
    counts = torch.tensor(list(steps), device=images.device)
    sequence = attributions.sort(dim=1, descending=order == "most", stable=True).indices
    first = sequence.argsort(1).unsqueeze(1) < counts.view(1, -1, 1)
    full, values = values_with_full(op, game, images, first if keep else ~first)
    chosen = choose_target(op, "target", target, full)
    link = link_of(op, game)
    log_probability = log_probabilities_of(op, values, link)
    followed = log_probability.gather(2, chosen.view(-1, 1, 1).expand(-1, len(counts), 1)).squeeze(2)
    classes = values.shape[2]
    return RemovalCurve(
        counts=counts,
        log_probability=followed,
        full_log_probability=log_probabilities_of(op, full, link).gather(1, chosen.unsqueeze(1)).squeeze(1),
        hit=followed > math.log(0.5) if classes == 1 else values.argmax(2) == chosen.unsqueeze(1),
        target=chosen,
        players=players,
        classes=classes,
        keep=keep,
    )


def insertion(
    game: Game,
    images: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    levels: Sequence[float] | None = None,
) -> Score:
    """Area under the target's probability as its most important patches are added to nothing; higher is better.

    RISE adds 224 pixels a step to a blurred image; here a step is a patch and the game says what nothing is.

    Args:
        game, images, attributions, target, levels: see `removal_curve`.

    Returns:
        `Score` in [0, 1], with its curve.

    Raises:
        ValueError: as `removal_curve`, or for levels that mean fewer than two numbers of players.

    Source: Petsiuk, Das, Saenko, RISE, BMVC 2018; by patches: Covert, Kim, Lee, ViT-Shapley, ICLR 2023.

    Example:
        >>> score = fv.metrics.insertion(model, images, model.explain(images).values)
        >>> 0 <= score.mean <= 1, score.curve.counts.tolist()
        (True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    return removal_curve(game, images, attributions, target, keep=True, levels=levels).area()


def deletion(
    game: Game,
    images: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    levels: Sequence[float] | None = None,
) -> Score:
    """Area under the target's probability as its most important patches are removed; lower is better.

    RISE removes 224 pixels a step; here a step is a patch.

    Args:
        game, images, attributions, target, levels: see `removal_curve`.

    Returns:
        `Score` in [0, 1], with its curve.

    Raises:
        ValueError: as `removal_curve`, or for levels that mean fewer than two numbers of players.

    Source: Petsiuk, Das, Saenko, RISE, BMVC 2018; by patches: Covert, Kim, Lee, ViT-Shapley, ICLR 2023.

    Example:
        >>> score = fv.metrics.deletion(model, images, model.explain(images).values)
        >>> 0 <= score.mean <= 1, score.curve.counts.tolist()
        (True, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    return removal_curve(game, images, attributions, target, levels=levels).area()


def aopc(
    game: Game, images: Tensor, attributions: Tensor, target: int | Tensor | None = None, *, signed: bool = True
) -> Score:
    """Area over the perturbation curve: mean fall p − p_k of the target's probability; higher is better.

    k = 10 … 90 % of the patches, the most important first. Usually the removed pixels are black and are ranked one by
    one; here they go by patches, and the game says what they become.

    Args:
        game, images, attributions, target: see `removal_curve`.
        signed: False for the mean of |p − p_k|, which rewards a rise too.

    Returns:
        `Score` in [−1, 1], with its curve.

    Raises:
        ValueError: as `removal_curve`.

    Source: Samek et al., TNNLS 2017; Qiang et al., AttCAT, NeurIPS 2022 (the nine levels).

    Example:
        >>> score = fv.metrics.aopc(model, images, model.explain(images).values)
        >>> -1 <= score.mean <= 1, score.curve.counts.tolist()
        (True, [1, 2, 3, 4, 5, 5, 6, 7, 8])
    """
    check_flag("aopc", "signed", signed)
    return removal_curve(game, images, attributions, target, levels=NINE_LEVELS).aopc(signed=signed)


def log_odds(game: Game, images: Tensor, attributions: Tensor, target: int | Tensor | None = None) -> Score:
    """LOdds: mean log(p_k / p) of the target's probability, over the levels of `aopc`; lower is better.

    Args:
        game, images, attributions, target: see `removal_curve`.

    Returns:
        `Score`, with its curve.

    Raises:
        ValueError: as `removal_curve`.

    Source: Shrikumar, Greenside, Kundaje, DeepLIFT, ICML 2017; Qiang et al., AttCAT, NeurIPS 2022.

    Example:
        >>> fv.metrics.log_odds(model, images, model.explain(images).values).values.shape
        torch.Size([4])
    """
    return removal_curve(game, images, attributions, target, levels=NINE_LEVELS).log_odds()


def perturbation_test(
    game: Game, images: Tensor, attributions: Tensor, labels: int | Tensor | None = None, positive: bool = True
) -> Score:
    """Chefer's perturbation test: area under the top-1 accuracy as 0 … 90 % of the patches are removed.

    The area is a mean height over the patches removed, in [0, 1]; times 0.9 it is the area between 0 and 0.9 on an axis
    of shares removed. The original removes single pixels of an enlarged map and rounds their number down; here whole
    patches go.

    Args:
        game, images, attributions: see `removal_curve`.
        labels: the class that counts as a hit: an int, or (B,) classes; None for the class that the game predicts from
            the whole image.
        positive: remove the most important patches first (lower is better), else the least (higher is better).

    Returns:
        `Score` in [0, 1], with its curve; `curve.hit` has the single hits.

    Raises:
        ValueError: as `removal_curve`, or for a game of one class, where there is no other to lead.

    Source: Chefer, Gur, Wolf, Transformer Interpretability Beyond Attention Visualization, CVPR 2021.

    Example:
        >>> score = fv.metrics.perturbation_test(model, images, model.explain(images).values, labels)
        >>> score.curve.hit.shape
        torch.Size([4, 10])
    """
    order = "most" if check_flag("perturbation_test", "positive", positive) else "least"
    return removal_curve(game, images, attributions, labels, order=order, levels=TEN_LEVELS).hit_area()


def _counts(op: str, levels: Sequence[float], players: int) -> list[int]:
    """Players at each level, rounded half away from zero (1e-9 makes 0.29 · 50 the 14.5 that it means)."""
    try:
        given = [] if isinstance(levels, str | bytes) else list(levels)
        numbers = [math.nan if isinstance(level, bool) else float(level) for level in given]
    except (TypeError, ValueError, OverflowError):
        numbers = []
    if not numbers or not all(0 <= level <= 1 for level in numbers):
        fail(op, "levels", "a sequence of shares of the players in [0, 1], at least one", levels)
    return [math.floor(level * players + 0.5 + 1e-9) for level in numbers]
