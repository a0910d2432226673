"""What a model family provides so that it can be explained."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from .coalitions import Coalitions

SUPPORTED = (
    "Supported: timm models with a linear classifier that end in a feature map which they average (ResNet, RegNet, "
    "EfficientNet, MobileNet, ConvNeXt and the like), or in the tokens of a grid of patches (VisionTransformer, DeiT, "
    "Eva, DINOv3, Swin, MaxViT, BEiT, Hiera, mixers and the like)."
)


class UnsupportedModelError(ValueError):
    """A model that can't be converted; the message is the reason and what to do about it, or what is supported.

    Example:
        >>> try:
        ...     fv.convert(torch.nn.Linear(4, 2))
        ... except fv.UnsupportedModelError as error:
        ...     print(error.reason)
        Argument `model` must be made by timm.create_model, but it is a Linear without timm's configuration.
    """

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".rstrip())
        self.reason = reason


class Features(NamedTuple):
    """What an encoder makes of the patches of full images."""

    last: Tensor  # (B, P, L), before the classifier
    earlier: tuple[Tensor, ...] = ()  # (B, P, C) of every stage before, where a head reads them

    def scaled_gradient(self, share: float) -> Features:
        """The same features, of whose gradient that share goes on into the encoder."""
        return Features(_scaled(self.last, share), tuple(_scaled(stage, share) for stage in self.earlier))


def _scaled(features: Tensor, share: float) -> Tensor:
    if share == 0.0:
        return features.detach()
    return features if share == 1.0 else features.detach() + share * (features - features.detach())


class JointPass(NamedTuple):
    """Full images and their coalitions from one forward pass."""

    features: Features  # of the full images
    logits: Tensor  # (B, K) of the full images
    values: Tensor  # (B, M, K), v(S)
    null: Tensor | None = None  # (K,), v(∅), where it came with the pass


class Game(Protocol):
    """The game v_x(S) of a backbone, and the features that explain it.

    Games that don't pack ignore whether coalitions are paired, and the rows that they are padded to.
    """

    backbone: Any  # the timm model
    grid: tuple[int, int]  # (h, w), players row by row
    players: int  # P = h·w
    input_size: tuple[int, int, int]  # (C, H, W)
    view: tuple[int, int]  # (height, width) in pixels, from the top left, that the grid covers; the rest is not seen
    feature_width: int  # L
    intermediate_widths: list[int]  # C of each earlier stage whose features are wanted; empty for none
    patches_vote: bool  # v(S) is a sum of votes and v(∅) = 0
    is_exact_conversion: bool  # the logits are the timm model's

    @property
    def packs(self) -> bool:
        """Whether a coalition costs its tokens only; the game then has a `prefix`, Q."""
        ...

    def features_and_logits(self, images: Tensor) -> tuple[Features, Tensor]: ...

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor: ...

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass: ...

    def null(self) -> Tensor: ...

    def vote_weight(self) -> tuple[Tensor, Tensor | None]: ...

    def explanation_block(self, width: int) -> nn.Module:
        """A new block of the model's own kind, on features (B, P, width)."""
        ...


def pass_of_nothing(game: Game, coalitions: int = 0) -> JointPass:
    """What a game makes of no images, which timm's own layers may not take."""
    weight = game.vote_weight()[0]
    classes = weight.shape[0]
    last, *earlier = (
        weight.new_zeros(0, game.players, width) for width in (game.feature_width, *game.intermediate_widths)
    )
    return JointPass(
        features=Features(last, tuple(earlier)),
        logits=weight.new_zeros(0, classes),
        values=weight.new_zeros(0, coalitions, classes),
    )
