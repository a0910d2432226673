"""The linear classifier behind a model's average: what it makes of one patch is that patch's vote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from timm.layers.linear import Linear
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._modes import evaluation_mode
from .base import SUPPORTED, Features, UnsupportedModelError
from .hooks import is_plain


def linear_classifier(backbone: Any) -> tuple[Tensor, Tensor | None]:
    """(W, b) of a timm model's linear classifier; a distilled model's two are averaged, as in its forward pass.

    Of a classifier that is more than a plain `Linear`, such as one with a low-rank adapter or with hooks, they are what
    it makes of the unit vectors and of 0.

    Raises:
        UnsupportedModelError: where there is no classifier, or one that is not linear.
    """
    found = [_weight_and_bias(part, backbone) for part in _parts(backbone)]
    if len(found) == 1:
        return found[0]
    (first, first_bias), (second, second_bias) = found
    bias = None if first_bias is None or second_bias is None else (first_bias + second_bias) / 2
    return (first + second) / 2, bias


def mean_patch(features: Tensor) -> Tensor:
    """The mean of features (B, P, L) over P, in float32 at least."""
    return features.mean(1, dtype=torch.promote_types(features.dtype, torch.float32))


def vote(backbone: Any, pooled: Tensor, sizes: Tensor | None = None, players: int = 1) -> Tensor:
    """Σ_{p∈S} (W e_p + b)/P of Σ_{p∈S} e_p/P, (N, L), and |S|, (N, 1): (N, K). Without `sizes`, S is everybody.

    In float32 at least, since votes must add up; then in the model's dtype, outside of autocast.
    """
    dtype = torch.promote_types(pooled.dtype, torch.float32)
    share = 1.0 if sizes is None else sizes.to(dtype) / players
    parts = _parts(backbone)
    votes = [_vote(part, pooled, share, dtype) for part in parts]
    mean = votes[0] if len(votes) == 1 else (votes[0] + votes[1]) / 2
    is_autocast = torch.is_autocast_enabled(pooled.device.type)
    return mean if is_autocast else mean.to(next(parts[0].parameters()).dtype)


def _vote(part: Any, pooled: Tensor, share: Tensor | float, dtype: torch.dtype) -> Tensor:
    if _is_plain(part):
        with torch.autocast(pooled.device.type, enabled=False):
            logits = nn.functional.linear(pooled.to(dtype), part.weight.to(dtype))
            return logits if part.bias is None else logits + share * part.bias.to(dtype)
    rows = pooled.to(next(part.parameters()).dtype)
    absent = part(torch.zeros_like(rows[:1]))
    return part(rows).to(dtype) + (share - 1.0) * absent.to(dtype)


def read_images(
    game: Any, output: Tensor, features: Tensor, earlier: Sequence[Tensor], dropout: nn.Module | None = None
) -> tuple[Features, Tensor]:
    """Features, and logits (B, K), of full images.

    Args:
        game: which says whether the logits are the model's own, or the mean of its patches' votes.
        output: what the model's `forward_head` reads.
        features: (B, P, L) of the patches.
        earlier: (B, P, C) of each stage before.
        dropout: of the mean patch, where it votes.
    """
    if game.is_exact_conversion:
        logits = game.backbone.forward_head(output)
    else:
        pooled = mean_patch(features)
        logits = vote(game.backbone, pooled if dropout is None else dropout(pooled))
    return Features(features, tuple(earlier)), logits


def check_votes(backbone: Any, votes: bool, is_classified: bool) -> None:
    """Raises an error where votes are wanted of a classifier that is more than its one linear layer."""
    if votes and not is_classified:
        raise UnsupportedModelError(
            f"Argument `head` can't be 'votes' for this {type(backbone).__name__}, whose classifier is more than one "
            "linear layer behind the pooled features. Use head='shares'."
        )


def is_plain_classifier(backbone: Any) -> bool:
    """Whether the model's classifier is one linear layer and nothing else."""
    return isinstance(backbone.get_classifier(), nn.Module) and _is_plain(backbone.get_classifier())


@contextmanager
def features_as_values(backbone: Any) -> Iterator[None]:
    """For the while, a coalition's value is what its classifier reads: (h(S), c(S)), with v(S) = W h(S) + c(S)·b.

    c is the share of the bias: 1, or |S|/P where patches vote.
    """
    classifier = backbone.get_classifier()
    name = next(name for name, module in backbone.named_modules() if module is classifier)
    width = classifier.in_features
    reader = nn.Linear(width, width + 1).to(classifier.weight).requires_grad_(False)
    reader.weight.copy_(torch.eye(width + 1, width))
    reader.bias.copy_(torch.eye(width + 1)[width])
    backbone.set_submodule(name, reader)
    try:
        yield
    finally:
        backbone.set_submodule(name, classifier)


def values_of_features(backbone: Any, features: Tensor) -> Tensor:
    """v(S) of what was read with `features_as_values`, (..., L + 1): (..., K), in float32 at least."""
    weight, bias = linear_classifier(backbone)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        values = nn.functional.linear(features[..., :-1].to(dtype), weight.to(dtype))
        return values if bias is None else values + features[..., -1:].to(dtype) * bias.to(dtype)


def _parts(backbone: Any) -> tuple[Any, ...]:
    found = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    return found if isinstance(found, tuple) else (found,)


def _is_plain(part: Any) -> bool:
    return is_plain(part, nn.Linear, Linear)


def _weight_and_bias(part: Any, backbone: Any) -> tuple[Tensor, Tensor | None]:
    if _is_plain(part):
        return part.weight, part.bias
    kind, name = type(part).__name__, type(backbone).__name__
    refusal = UnsupportedModelError(f"{name} has no linear classifier (it has a {kind}). {SUPPORTED}")
    if not isinstance(part, nn.Module) or any(isinstance(inside, _BatchNorm) for inside in part.modules()):
        raise refusal
    parameter = next(part.parameters(), None)
    width = getattr(part, "in_features", None) or getattr(backbone, "head_hidden_size", None)
    if parameter is None or not isinstance(width, int):
        raise refusal
    device = parameter.device
    drawn = torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(device, parameter.dtype)
    rows = torch.cat([torch.zeros_like(drawn), torch.eye(width, device=device, dtype=parameter.dtype), drawn])
    with evaluation_mode(part), torch.autocast(device.type, enabled=False):
        try:
            outputs = part(rows)
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as error:
            raise refusal from error
    if not isinstance(outputs, Tensor) or outputs.ndim != 2:
        raise refusal
    bias, units, of_drawn = outputs[0], outputs[1:-1], outputs[-1]
    weight = (units - bias).mT
    if not torch.compiler.is_compiling() and not _is_near(nn.functional.linear(drawn[0], weight, bias), of_drawn):
        raise refusal
    return weight, bias


def _is_near(found: Tensor, expected: Tensor) -> bool:
    """Within the rounding of a sum of hundreds."""
    tolerance = 100 * torch.finfo(expected.dtype).eps
    return bool((found - expected).detach().abs().max() <= tolerance * (1 + expected.detach().abs().max()))
