"""The published removal tests by name: which game they use, and which scores they report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from fastshap_kernels._checks import fail

from .._checks import check_choice
from ..games.masked_image import MaskedImageGame
from .removal import deletion, insertion, perturbation_test
from .score import Score

PROTOCOLS = ("rise", "chefer2021", "vit-shapley")


def protocol_scores(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    attributions: Tensor,
    target: int | Tensor | None = None,
    *,
    protocol: str,
    grid: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch: int = 256,
) -> dict[str, Score]:
    """The scores of a published protocol, by patches.

    | protocol | absent patches | levels | scores |
    |---|---|---|---|
    | "rise" | mean colour for deletion, blurred image for insertion | 0 … P | "insertion", "deletion" |
    | "vit-shapley" | as the model itself removes them | 0 … P | "insertion", "deletion" |
    | "chefer2021" | black | 0 … 90 % | "positive", "negative" |

    RISE and Chefer et al. rank and remove single pixels (224 at a time; tenths of the image); here a patch comes or
    goes whole, so numbers compare with theirs in kind only. "insertion" and "deletion" come with
    "insertion_minus_deletion", whose standard error is that of paired numbers.

    Args:
        model: a classifier, images to logits; for "vit-shapley" a game, such as `SelfExplainingClassifier`.
        images (floating point): (B, C, H, W), normalised as the model expects them.
        attributions (floating point): (B, P) of the target, larger = more important.
        target: the class followed (of "chefer2021": the labels); None for the predicted one, an int, or (B,) classes.
        protocol: "rise", "chefer2021" or "vit-shapley".
        grid: (h, w) patches per column and per row; default the model's own.
        mean, std: of the normalisation, per channel, for pixels in [0, 1]; needed by "chefer2021".
        batch: images that the classifier sees at once, at most; a game cuts its work itself.

    Returns:
        `Score` by name.

    Raises:
        ValueError: for an unknown protocol, what it needs and lacks, or as `removal_curve`.

    Source: Petsiuk, Das, Saenko, BMVC 2018; Chefer, Gur, Wolf, CVPR 2021; Covert, Kim, Lee, ICLR 2023.

    Example:
        >>> values = model.explain(images).values
        >>> scores = fv.metrics.protocol_scores(model, images, values, protocol="vit-shapley")
        >>> sorted(scores)
        ['deletion', 'insertion', 'insertion_minus_deletion']
    """
    check_choice("protocol", protocol, PROTOCOLS)
    removed: Any = model
    inserted: Any = model
    if protocol == "vit-shapley":
        if not hasattr(model, "coalition_values"):
            fail("protocol_scores", "model", 'a game for "vit-shapley"', type(model), "Convert it, or use rise.")
    else:
        grid = grid or getattr(model, "grid", None)
        if grid is None:
            fail("protocol_scores", "grid", "(h, w) for a model that has none of its own", grid)
        if protocol == "chefer2021":
            game = MaskedImageGame(model, grid, "black", mean=mean, std=std, batch=batch)
            return {
                name: perturbation_test(game, images, attributions, target, name == "positive")
                for name in ("positive", "negative")
            }
        removed = MaskedImageGame(model, grid, "mean", batch=batch)
        inserted = MaskedImageGame(model, grid, "blur", batch=batch)
    scores = {
        "insertion": insertion(inserted, images, attributions, target),
        "deletion": deletion(removed, images, attributions, target),
    }
    return scores | {"insertion_minus_deletion": scores["insertion"] - scores["deletion"]}
