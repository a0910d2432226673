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
    """A model that can't be converted; the message is the reason and what to do about it, or what is supported."""

    def __init__(self, reason: str, remedy: str = "") -> None:
        super().__init__(f"{reason} {remedy}".rstrip())
        self.reason = reason


class JointPass(NamedTuple):
    """Full images and their coalitions from one forward pass."""

    features: Tensor  # (B, P, L) of the full images, or (B, P, L + ΣC) with intermediate ones
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
    intermediate_widths: list[int]  # C of each earlier stage whose features follow the last ones'; empty for none
    patches_vote: bool  # v(S) is a sum of votes and v(∅) = 0
    is_exact_conversion: bool  # the logits are the timm model's

    @property
    def packs(self) -> bool:
        """Whether a coalition costs its tokens only; the game then has a `prefix`, Q."""
        ...

    def features_and_logits(self, images: Tensor) -> tuple[Tensor, Tensor]: ...

    def values(self, images: Tensor, coalitions: Coalitions) -> Tensor: ...

    def joint(self, images: Tensor, coalitions: Coalitions) -> JointPass: ...

    def null(self) -> Tensor: ...

    def vote_weight(self) -> tuple[Tensor, Tensor | None]: ...

    def explanation_block(self) -> nn.Module:
        """A new block of the model's own kind, on features (B, P, L)."""
        ...


def pass_of_nothing(game: Game, coalitions: int = 0) -> JointPass:
    """What a game makes of no images, which timm's own layers may not take."""
    weight = game.vote_weight()[0]
    width = game.feature_width + sum(game.intermediate_widths)
    classes = weight.shape[0]
    return JointPass(
        features=weight.new_zeros(0, game.players, width),
        logits=weight.new_zeros(0, classes),
        values=weight.new_zeros(0, coalitions, classes),
    )
