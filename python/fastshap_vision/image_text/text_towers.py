"""The text tower of a model of images and texts, with tokens taken out of its attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastshap_kernels._checks import fail

from ..games.base import UnsupportedModelError
from ..games.probe import is_close

#: Texts that the tower sees at once.
_BATCH = 256


class Tokens(NamedTuple):
    """Texts as their tower reads them."""

    ids: Tensor  # int64 (K, L)
    players: Tensor  # bool (K, L): the tokens that play, neither special ones nor padding
    words: list[list[str]]  # what each token that plays says


class TextTower:
    """Texts to embeddings (K, D), before they are normalised, by transformers' or open_clip's text tower.

    Args:
        model: the model whose tower it is.
        tokenizer: its tokenizer, or a processor that has one: transformers', or open_clip's.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self._model = (model,)  # in a tuple: not a part of what this belongs to twice
        self._call = tokenizer
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self._is_known_to_forget = False
        end = getattr(self._tokenizer, "eos_token_id", None)
        #: -1 where the tokenizer has no end.
        self._end: int = getattr(self._tokenizer, "eot_token_id", -1) if end is None else end
        if not callable(tokenizer) or not hasattr(self._tokenizer, "all_special_ids"):
            expected = "a tokenizer of transformers or open_clip, which knows its special tokens (all_special_ids)"
            fail("ImageTextModel", "tokenizer", expected, type(tokenizer))

    @property
    def model(self) -> Any:
        return self._model[0]

    def tokens(self, op: str, texts: object) -> Tokens:
        """The tokens of texts, on the model's device."""
        is_list = isinstance(texts, Sequence) and not isinstance(texts, str) and len(texts) > 0
        if not is_list or not all(isinstance(text, str) for text in texts):  # type: ignore[attr-defined]
            fail(op, "texts", "a list of one text or more, each a str", texts)
        ids = self._ids(list(texts)).to(next(self.model.parameters()).device)  # type: ignore[call-overload]
        special = torch.tensor(sorted(set(self._tokenizer.all_special_ids)), device=ids.device)
        players = ~torch.isin(ids, special)
        is_end = ids == self._end
        is_end[:, 0] = False  # some tokenizers begin as they end
        players &= is_end.cumsum(1) == 0  # what follows the first end is padding, by whatever token
        words = [
            [self._tokenizer.decode([token]).strip() for token in row[plays].tolist()]
            for row, plays in zip(ids, players, strict=True)
        ]
        return Tokens(ids, players, words)

    def _ids(self, texts: list[str]) -> Tensor:
        if _is_of_open_clip(self.model):
            return self._call(texts)
        config = self.model.config.text_config
        # SigLIP reads the last position, after as much padding as it was trained with.
        padding = "max_length" if hasattr(self.model, "logit_bias") else "longest"
        length = config.max_position_embeddings
        found = self._tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        return found["input_ids"]

    @torch.no_grad()
    def encode(self, ids: Tensor, present: Tensor | None = None) -> Tensor:
        """Embeddings (N, D) of texts (N, L), of the tokens that are present, bool (N, L); None for all."""
        if present is None:
            return torch.cat([self._encode(part, None) for part in ids.split(_BATCH)])
        self._check_forgets(ids, present)
        parts = zip(ids.split(_BATCH), present.split(_BATCH), strict=True)
        return torch.cat([self._encode(part, kept) for part, kept in parts])

    def _encode(self, ids: Tensor, present: Tensor | None) -> Tensor:
        model = self.model
        if not _is_of_open_clip(model):
            mask = {} if present is None else {"attention_mask": present.long()}
            found = model.get_text_features(input_ids=ids, **mask)
            return found if isinstance(found, Tensor) else found.pooler_output
        tower = getattr(model, "text", model)
        with nullcontext() if present is None else _masked(tower, present):
            return model.encode_text(ids)

    def _check_forgets(self, ids: Tensor, present: Tensor) -> None:
        """Raises an error where what an absent token says still acts on the embedding; tried once."""
        absent = ~present.all(1)
        if self._is_known_to_forget or not bool(absent.any()):
            return
        row = int(absent.nonzero()[0])
        texts, kept = ids[row].repeat(2, 1), present[row].repeat(2, 1)
        beside = torch.where((ids[row] > 0) & (ids[row] - 1 != self._end), ids[row] - 1, ids[row] + 1)
        texts[1] = torch.where(kept[1], texts[1], beside)
        first, second = self._encode(texts, kept)
        if not is_close(first, second):
            raise UnsupportedModelError(
                f"The text tower of this {type(self.model).__name__} sees tokens past an attention mask, so a word "
                "that is absent would still act on others.",
                'Explain the image alone: players="image".',
            )
        self._is_known_to_forget = True


def _is_of_open_clip(model: Any) -> bool:
    return hasattr(model, "encode_text")


@contextmanager
def _masked(tower: Any, present: Tensor) -> Iterator[None]:
    """For the while, open_clip's text transformer gives no attention to absent tokens, (N, L), beside its own mask."""
    transformer: nn.Module = tower.transformer
    blocks = getattr(transformer, "resblocks", None)
    if blocks is None:
        raise UnsupportedModelError(
            f"The text tower of this model is a {type(transformer).__name__}, whose attention mask can't be reached.",
            'Explain the image alone: players="image".',
        )
    heads = blocks[0].attn.num_heads

    def add_mask(_: nn.Module, inputs: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tokens, own = inputs[0], options.get("attn_mask")
        seen = nn.functional.pad(present, (0, tokens.shape[1] - present.shape[1]), value=True)  # CoCa adds a token
        mask = torch.zeros_like(seen, dtype=tokens.dtype).masked_fill_(~seen, float("-inf"))
        mask = mask.repeat_interleave(heads, 0).unsqueeze(1).expand(-1, seen.shape[1], -1)
        return inputs, {**options, "attn_mask": mask if own is None else mask + own}

    handle = transformer.register_forward_pre_hook(add_mask, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
