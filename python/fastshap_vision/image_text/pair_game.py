"""The game of an image and a text: patches and words are its players, and v(S) is the score of what is present."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fastshap_kernels import pack_bits, unpack_bits

from .._runtime.precision import at_least_float32
from ..games.coalitions import Coalitions, coalitions_of

#: Coalitions whose embeddings are gathered at once.
_ROWS = 4096


class PairGame:
    """v(S) = exp(scale)·⟨e(S ∩ patches), t(S ∩ words)⟩ + bias, e and t of norm 1: the players are patches, then words.

    A tower runs once for each of its own coalitions among those that are asked for: of all 2^(P + n), it sees 2^P
    images or 2^n texts.

    Args:
        embed_image: an image (1, C, H, W) and coalitions of its patches to embeddings (1, U, D).
        embed_text: which words are present, bool (U, n), to embeddings (U, D).
        patches, words: P and n.
        plays_image, plays_text: whether they play; what does not is whole in every coalition.
        logit_scale, logit_bias: of the score; the scale as its logarithm.
    """

    def __init__(
        self,
        embed_image: Callable[[Tensor, Coalitions], Tensor],
        embed_text: Callable[[Tensor], Tensor],
        patches: int,
        words: int,
        plays_image: bool,
        plays_text: bool,
        logit_scale: float,
        logit_bias: float,
    ) -> None:
        self._embed_image, self._embed_text = embed_image, embed_text
        self._patches, self._words = patches, words
        self._plays_image, self._plays_text = plays_image, plays_text
        self._scale, self._bias = math.exp(logit_scale), logit_bias
        self.players = patches * plays_image + words * plays_text

    def coalition_values(self, image: Tensor, coalitions: Coalitions | Tensor) -> Tensor:
        """v(S) of coalitions of one image and its text: (1, M, 1), in float32 at least."""
        present = unpack_bits(coalitions_of(image, coalitions, self.players, "explain_pair").bits, self.players)[0]
        count = len(present)
        patches = present[:, : self._patches] if self._plays_image else present.new_ones(count, self._patches)
        words = present[:, self.players - self._words :] if self._plays_text else present.new_ones(count, self._words)
        kept, which_image = _distinct(patches)
        images = self._embed_image(image, Coalitions(pack_bits(kept[None]), self._patches))[0]
        kept, which_text = _distinct(words)
        texts = self._embed_text(kept)
        images, texts = (functional.normalize(at_least_float32(part), dim=1) for part in (images, texts))
        rows = zip(which_image.split(_ROWS), which_text.split(_ROWS), strict=True)
        cosines = torch.cat([(images[one] * texts[other]).sum(1) for one, other in rows])
        return (self._scale * cosines + self._bias).reshape(1, -1, 1)


def _distinct(present: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows of bool (M, n), and which of them each is."""
    if not present.shape[1]:
        return present[:1], torch.zeros(len(present), dtype=torch.int64, device=present.device)
    return torch.unique(present, dim=0, return_inverse=True)
