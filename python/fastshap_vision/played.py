"""Explaining a model that is trained already: its games are played once, and its explainer learns from the record.

    games = fv.play(model, data)
    fv.fit(model, games, objective=fv.ExplainerObjective(), epochs=24, opt="muon", lr=5e-3)

The encoder and the classifier stay as they are, to the bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from fastshap_kernels import pack_bits, sample_coalitions, unpack_bits
from fastshap_kernels._checks import check_count, fail, words

from ._checks import check_choice
from .classifier import SelfExplainingClassifier
from .coalition_objective import ObjectiveTerms, even_split_error, variance_of
from .fidelity import evaluating
from .precision import PRECISIONS

#: Images that are read twice, to see that they are the same.
_READ_TWICE = 32
#: Played again, values may differ so much: of their spread, as lower precision differs, and of their size, by rounding.
_OF_SPREAD, _OF_SIZE = 0.1, 0.01


class PlayedGames(Dataset):
    """Images with coalitions of their patches and what these are worth: (image, (label, bits, values)).

    Args:
        data: the dataset of (image, label), N of them.
        bits (int32): (N, M, W) coalitions, as `fastshap_kernels.pack_bits` packs them.
        values (float32): (N, M, K) v(S).

    Raises:
        ValueError: for coalitions or values of another number of images.
    """

    def __init__(self, data: Any, bits: Tensor, values: Tensor) -> None:
        if bits.shape[:2] != values.shape[:2]:
            fail("PlayedGames", "values", f"(N, M, K) of bits {tuple(bits.shape)}", values)
        if len(data) != len(bits):
            fail("PlayedGames", "data", f"the {len(bits)} images that were played", f"{len(data)} images")
        self.data, self.bits, self.values = data, bits, values

    def save(self, path: str | Path) -> None:
        """Writes coalitions and values, not the images, as a safetensors file: whole or not at all."""
        path = Path(path)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        save_file({"bits": self.bits.contiguous(), "values": self.values.contiguous()}, unfinished)
        unfinished.replace(path)

    @classmethod
    def load(cls, path: str | Path, data: Any) -> PlayedGames:
        """The games that `save` wrote, of the same images."""
        found = load_file(path)
        return cls(data, found["bits"], found["values"])

    @property
    def digest(self) -> str:
        """Of coalitions and values: by it `fit` knows on resuming whether the games are the same."""
        found = hashlib.sha256()
        for tensor in (self.bits, self.values):
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()[:16]

    def check(self, model: SelfExplainingClassifier) -> None:
        """Raises a ValueError where coalitions of the first images are not worth to `model` what the record says.

        `fit` calls it before the first step.
        """
        count, device = min(_READ_TWICE, len(self)), next(model.parameters()).device
        bits, values = (part[:count, :2].to(device) for part in (self.bits, self.values))
        is_of_players = bits.shape[2] == words(model.players) and torch.equal(
            pack_bits(unpack_bits(bits, model.players)), bits
        )
        if is_of_players and values.shape[2] == model.num_classes:
            images = _images_of([self.data[row] for row in range(count)]).to(device)
            with evaluating(model):
                error = (model.coalition_values(images, bits).float() - values).square().mean().sqrt()
            if error <= _OF_SPREAD * variance_of(values).sqrt() + _OF_SIZE * values.square().mean().sqrt():
                return
        raise ValueError(
            "fit: these games were played by another model, by this one before it was trained further, or with another "
            "removal of patches: their values are not this model's. Call fv.play(model, data) again."
        )

    @property
    def classes(self) -> Any:
        return getattr(self.data, "classes", None)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[Any, Tensor, Tensor]]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, tuple[Any, Tensor, Tensor]]]:
        """A batch at once, which is what torch's DataLoader asks for."""
        items = Subset(self.data, rows).__getitems__(list(range(len(rows))))
        return [
            (image, (label, self.bits[row], self.values[row])) for row, (image, label) in zip(rows, items, strict=True)
        ]


def play(
    model: SelfExplainingClassifier,
    data: Dataset,
    coalitions: int = 64,
    *,
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> PlayedGames:
    """Evaluates paired coalitions of every image once, in evaluation mode and without gradients.

    A model that is not trained further plays the same game in every epoch: values that are kept cost nothing the
    next time, so that each step can learn from all of an image's coalitions at once.

    Args:
        model: trained already; only its game matters here.
        data: a dataset of (image, label); images (C, H, W) that are the same whenever they are read: no augmentation.
            `WithMirrorImages` makes more of them.
        coalitions: M of each image, even, drawn from the Shapley kernel.
        seed: of the coalitions.
        batch_size: images evaluated at once; the model cuts their coalitions to what memory holds.
        precision: of v(S): "auto", bfloat16 autocast for a float32 model on a GPU, else "same", the model's own;
            "bf16"; "fp8"; see `fastshap_vision.precision`.
        workers: processes that load data.
        progress: shows a bar on a terminal.

    Returns:
        `PlayedGames`, for `fit` with an `ExplainerObjective`. It holds N·M·(4·K + 4·⌈P/32⌉) bytes on the CPU: for many
        classes, play on a part of the data. Each process of several plays all of it.

    Raises:
        ValueError: for an odd or too small number of coalitions, no image, or images that change as they are read.

    Deterministic: as the model is; the coalitions follow from `seed` and an image's place in the data.
    """
    check_count("play", "coalitions", coalitions, 2, 2**31 - 2)
    if coalitions % 2:
        fail("play", "coalitions", "even, as coalitions come in pairs", coalitions)
    check_choice("precision", precision, PRECISIONS)
    check_count("play", "batch_size", batch_size, 1, 2**31 - 1)
    _check_data(model, data)
    device = next(model.parameters()).device
    loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_images_of)
    all_bits, all_values = [], []
    played = 0
    total, hidden = len(data), None if progress else True  # type: ignore[arg-type]
    with evaluating(model), tqdm(total=total, desc="games", unit=" images", disable=hidden, leave=False) as bar:
        for images in loader:
            images = images.to(device)
            offset = played * coalitions
            bits = sample_coalitions(len(images), coalitions, model.players, seed=seed, offset=offset, device=device)
            values = model.coalition_values(images, bits, paired=True, precision=precision)
            all_bits.append(bits.cpu())
            all_values.append(values.float().cpu())
            played += len(images)
            bar.update(len(images))
    return PlayedGames(data, torch.cat(all_bits), torch.cat(all_values))


def _images_of(items: list[Any]) -> Tensor:
    """A batch without labels, which have no part in a game."""
    return torch.stack([item[0] for item in items])


def _check_data(model: Any, data: Any) -> None:
    if not isinstance(model, SelfExplainingClassifier):
        fail("play", "model", "a SelfExplainingClassifier", type(model), "Use fv.convert(timm_model).")
    if len(data) == 0:
        fail("play", "data", "a dataset of at least one image", "an empty one")
    item, expected = data[0], model.game.input_size
    image = item[0] if isinstance(item, (tuple, list)) and len(item) == 2 else item
    if image is item or not isinstance(image, Tensor) or tuple(image.shape) != expected or image.dtype == torch.uint8:
        remedy = "Let the dataset normalise and resize, as fv.load_dataset does."
        fail("play", "data", f"a dataset of (image, label), each image a float tensor {expected}", image, remedy)
    rows = range(min(_READ_TWICE, len(data)))
    first, second = (_images_of([data[row] for row in rows]) for _ in range(2))
    if not first.isfinite().all():
        fail("play", "data", "finite", "NaN or infinite in some pixels", "Clean the data.")
    if not torch.equal(first, second):
        raise ValueError(
            "play: argument `data` must hold images that are the same whenever they are read, but they change. Leave "
            "the augmentation out: what a coalition is worth was found on the image as it was."
        )


class ExplainerObjective:
    """R on games that were played before: trains the shares and the blocks before them, and nothing else.

    R = mean over B, M, K of (v(S) − v(∅) − Σ_{p∈S} Φ_p)², divided by what the even split (f − v(∅))/P leaves. The
    encoder runs in evaluation mode and without gradient: no weight, statistic or logit of it changes.

    Attributes:
        progress: share of the training done, in [0, 1]; `fit` sets it each step.

    Deterministic: yes.

    Source: the regression: Jethani et al., FastSHAP, ICLR 2022.
    """

    def __init__(self) -> None:
        self.progress = 1.0

    def __call__(
        self, model: SelfExplainingClassifier, images: Tensor, played: Sequence[Tensor] | Tensor
    ) -> ObjectiveTerms:
        """The loss of one batch.

        Args:
            model: with the shares head; it played the games.
            images: (B, C, H, W).
            played: labels, which have no part in it; bits, int32 (B, M, W); values, (B, M, K).

        Returns:
            the terms of the loss: regression and r2, the share of the variance of these v(S) that is explained. The
            best values leave what is not additive in the game: this r2 says nothing of how near they are to it.

        Raises:
            ValueError: for a model with another head, or data that `play` did not make.
        """
        if getattr(model, "head", None) != "shares":
            raise ValueError(
                "ExplainerObjective trains the shares of a model that stays as it is, but this one has none. Use "
                "fv.convert(timm_model)."
            )
        if isinstance(played, Tensor) or len(played) != 3:
            raise ValueError(
                "ExplainerObjective learns from games that were played before, but it was given labels. Pass "
                "fv.play(model, data) to fit in place of the data."
            )
        _, bits, values = played
        with evaluating(model):
            features, logits = model.game.features_and_logits(images)
            null = model.null_value()
        residual = model.regression_loss(features, logits, bits, values.to(logits.dtype), null)
        regression = residual / even_split_error(values, logits, null, bits, model.players)
        r2 = 1 - residual.detach() / variance_of(values)
        return ObjectiveTerms(regression, regression=regression.detach(), r2=r2)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass
