"""The heads: what turns features of patches into Shapley values."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastshap_kernels import coalition_sum, linear_shapley_loss

from .._runtime.onednn_linear import cpu_linears
from .._runtime.packed_sdpa import cpu_attention
from .._runtime.precision import at_least_float32
from ..games.base import Features, Game
from ..games.coalitions import Coalitions
from ..games.hooks import is_plain
from ..games.mask_cells_cnn import CellRemoval

#: Past this width an explanation costs more, and R² gains nothing.
WIDEST = 256
#: Up to this width (or the model's own) the layers that explain may have any share of the model's parameters: of
#: tokens, and of a feature map, whose cells are few beside the pixels that the model's own parameters are applied to.
_ALWAYS, _ALWAYS_OF_CELLS = 96, 128
#: Beyond it they have at most this share, so that an explanation stays cheap beside the prediction.
_SHARE = 0.13
_STEP = 32


class _Head(nn.Module):
    """What both heads keep: the game that they explain, and γ."""

    def __init__(self, game: Game, backbone_gradient: float) -> None:
        super().__init__()
        self._game = (game,)  # in a tuple: the encoder is no part of its head
        self.backbone_gradient = backbone_gradient

    @property
    def game(self) -> Game:
        return self._game[0]


class VotesHead(_Head):
    """Φ_p = (W e_p + b)/P, W and b the classifier's own, and an equal part of what that leaves of f(x) − v(∅).

    Args:
        game: of the model, whose patches vote.
        backbone_gradient: γ, how much of the regression's gradient goes on into the encoder.
    """

    def __init__(self, game: Game, backbone_gradient: float = 1.0) -> None:
        super().__init__(game, backbone_gradient)

    def forward(self, features: Features, logits: Tensor, null: Tensor, target: Tensor | None = None) -> Tensor:
        """Shapley values (B, P, K), float32 at least, that add up to logits (B, K) − null (K,).

        Of some classes of each image, where `target` is given: (B, P) for one, (B,), and (B, P, k) for k, (B, k).
        """
        return _completed(at_least_float32(votes_of_patches(self.game, features.last, target)), logits, null, target)

    def regression_loss(
        self,
        features: Features,
        logits: Tensor,
        coalitions: Coalitions,
        values: Tensor,
        null: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """As `SelfExplainingClassifier.regression_loss`."""
        last = features.scaled_gradient(self.backbone_gradient).last
        weight, bias = self.game.vote_weight()
        players = self.game.players
        bias = None if bias is None else bias / players
        return loss_of_classes(classes, last, weight / players, bias, coalitions, values, null)


class SharesHead(_Head):
    """Φ_p = base_p + δ_p, δ = G(E) W_sᵀ minus its mean over p: the logits never move.

    G brings the features to its width, where that is another, adds a linear map of the normalised features of earlier
    stages, and then has `depth` blocks of the model's own kind. W_s starts at 0: training starts from the base.

    Args:
        game: of the model; it says which features there are, and gives the blocks and the votes.
        classes: K.
        base: "even", (f − v(∅))/P, or "votes", where patches vote.
        depth: blocks of G.
        width: of G; None for `width_of`.
        backbone_gradient: γ, how much of the regression's gradient goes on into the encoder.
    """

    def __init__(
        self,
        game: Game,
        classes: int,
        base: str = "even",
        depth: int = 1,
        width: int | None = None,
        backbone_gradient: float = 0.0,
    ) -> None:
        super().__init__(game, backbone_gradient)
        self.base = base
        width = width_of(game, classes, depth) if width is None else width
        self.explainer = Explainer(game, depth, width)
        self.shares = nn.Linear(self.explainer.width, classes, bias=False)
        nn.init.zeros_(self.shares.weight)
        self.to(next(game.backbone.parameters()))

    @property
    def is_untrained(self) -> bool:
        """Whether W_s is still 0, so that nothing was learnt."""
        weight = getattr(self.shares, "weight", None)  # an adapter may have none
        return weight is not None and not weight.is_meta and not bool(weight[0].any()) and not bool(weight.any())

    def forward(self, features: Features, logits: Tensor, null: Tensor, target: Tensor | None = None) -> Tensor:
        """As `VotesHead.forward`."""
        with cpu_linears(features.last):
            found = at_least_float32(self._shares_of(self.explainer(features), target))
        if self.base == "votes":
            found = found + at_least_float32(votes_of_patches(self.game, features.last, target))
        return _completed(found, logits, null, target)

    def _shares_of(self, explained: Tensor, target: Tensor | None) -> Tensor:
        """(B, P, K), or (B, P) or (B, P, k) of some classes of each image."""
        if target is not None and is_plain(self.shares, nn.Linear):
            return linear_of(explained, self.shares.weight, None, target)
        found = self.shares(explained)
        if target is None:
            return found
        wanted = target.reshape(len(target), 1, -1).expand(-1, found.shape[1], -1)
        return found.gather(2, wanted).reshape(*found.shape[:2], *target.shape[1:])

    def regression_loss(
        self,
        features: Features,
        logits: Tensor,
        coalitions: Coalitions,
        values: Tensor,
        null: Tensor,
        classes: Tensor | None = None,
    ) -> Tensor:
        """As `SelfExplainingClassifier.regression_loss`; logits and base are detached."""
        features = features.scaled_gradient(self.backbone_gradient)
        if self.base == "even":
            grand = logits.detach()
        else:
            # What the votes leave is a game whose grand value is 0.
            values = values - votes_of_coalitions(self.game, features.last.detach(), coalitions)
            null, grand = null.detach() * 0, torch.zeros_like(logits)
        with cpu_linears(features.last), cpu_attention(features.last):
            explained = self.explainer(features)
        return loss_of_classes(classes, explained, self._weight(), None, coalitions, values, null, grand)

    def _weight(self) -> Tensor:
        """W_s (K, width), of whatever linear module stands for it."""
        if is_plain(self.shares, nn.Linear):
            return self.shares.weight
        like = next(self.parameters())
        return self.shares(torch.eye(self.explainer.width, dtype=like.dtype, device=like.device)).T


class Explainer(nn.Module):
    """G: features to (B, P, width).

    Args:
        game: says which features there are, and gives the blocks.
        depth: blocks.
        width: of the blocks. Without blocks and earlier features, G is the identity.
    """

    def __init__(self, game: Game, depth: int, width: int) -> None:
        super().__init__()
        is_identity = depth == 0 and not game.intermediate_widths
        self.width = game.feature_width if is_identity else width
        self.projection = nn.Identity() if self.width == game.feature_width else nn.Linear(game.feature_width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(earlier) for earlier in game.intermediate_widths)
        self.linear = nn.Linear(sum(game.intermediate_widths), self.width) if game.intermediate_widths else None
        self.blocks = nn.Sequential(*(game.explanation_block(self.width) for _ in range(depth)))

    def forward(self, features: Features) -> Tensor:
        found = self.projection(features.last)
        if self.linear is not None:
            normed = [norm(stage) for norm, stage in zip(self.norms, features.earlier, strict=True)]
            found = found + self.linear(torch.cat(normed, -1))
        return self.blocks(found)


def width_of(game: Game, classes: int, depth: int) -> int:
    """G's width: the model's own, where that is at most 256 and G then has at most 13 % of the model's parameters.

    Else the largest multiple of 32 of which this holds, and in any case 96 (of a feature map 128), or the model's own
    where that is less.
    """
    own, always = game.feature_width, _ALWAYS_OF_CELLS if isinstance(game, CellRemoval) else _ALWAYS
    allowed = _SHARE * sum(parameter.numel() for parameter in game.backbone.parameters())
    for width in [min(own, WIDEST), *range(min(own, WIDEST) // _STEP * _STEP, always, -_STEP)]:
        if width <= always:
            return width
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            explainer = Explainer(game, depth, width)
        if sum(parameter.numel() for parameter in explainer.parameters()) + width * classes <= allowed:
            return width
    return always


def votes_of_patches(game: Game, features: Tensor, target: Tensor | None = None) -> Tensor:
    """(W e_p + b)/P of features (B, P, L): (B, P, K), or of the classes in `target`, as `VotesHead.forward` says."""
    return linear_of(features, *game.vote_weight(), target) / game.players


def linear_of(features: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor | None) -> Tensor:
    """W e_p + b for every class, or for some of each image: then the others cost nothing."""
    if target is None:
        return nn.functional.linear(features, weight, bias)
    found = features @ weight[target.reshape(len(target), -1)].mT
    found = found.reshape(*features.shape[:2], *target.shape[1:])
    return found if bias is None else found + bias[target].unsqueeze(1)


def votes_of_coalitions(game: Game, features: Tensor, coalitions: Coalitions) -> Tensor:
    """Σ_{p∈S} (W e_p + b)/P without gradient: (B, M, K)."""
    with torch.no_grad():
        weight, bias = game.vote_weight()
        votes = coalition_sum(features, coalitions.bits) @ weight.T
        if bias is not None:
            votes = votes + coalitions.sizes.unsqueeze(2).to(features.dtype) * bias
        return votes / game.players


def loss_of_classes(
    classes: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    coalitions: Coalitions,
    values: Tensor,
    null: Tensor,
    grand: Tensor | None = None,
) -> Tensor:
    """`linear_shapley_loss` of some classes of each image, (B, k), or of all; normalised additively to a `grand`."""
    if classes is None:
        normalization = "none" if grand is None else "additive"
        return linear_shapley_loss(
            features, weight, bias, coalitions.bits, values, null, grand, normalization=normalization
        )
    with torch.autocast(features.device.type, enabled=False):  # differences of near numbers
        dtype = torch.promote_types(features.dtype, torch.float32)
        features, values, null = features.to(dtype), values.to(dtype), null.to(dtype)
        rows, null = weight.to(dtype)[classes], null[classes].unsqueeze(1)
        size = coalitions.sizes.unsqueeze(2).to(dtype)
        found = coalition_sum(features, coalitions.bits) @ rows.mT
        if bias is not None:
            found = found + size * bias.to(dtype)[classes].unsqueeze(1)
        if grand is not None:
            missing = grand.to(dtype).gather(1, classes).unsqueeze(1) - null - features.sum(1, keepdim=True) @ rows.mT
            found = found + size / features.shape[1] * missing
        wanted = values.gather(2, classes.unsqueeze(1).expand(-1, values.shape[1], -1))
        return (wanted - null - found).square().mean()


def _completed(found: Tensor, logits: Tensor, null: Tensor, target: Tensor | None) -> Tensor:
    """Shapley values of all classes or of the target's, with an equal part each of what they leave of f(x) − v(∅)."""
    if target is not None:
        logits, null = logits.gather(1, target.reshape(len(target), -1)).reshape(target.shape), null[target]
    missing = at_least_float32(logits) - at_least_float32(null) - found.sum(1)
    return found + (missing / found.shape[1]).unsqueeze(1)
