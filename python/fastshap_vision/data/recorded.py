"""Explaining a model that is trained already: its coalitions are evaluated once, and its explainer learns from them.

    recorded = fv.record_coalitions(model, data)
    fv.fit(model, recorded, objective=fv.ExplainerObjective(), **fv.recipe.training(model, mirrored=False))

The encoder and the classifier stay as they are, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from fastshap_kernels import pack_bits, unpack_bits
from fastshap_kernels._checks import check_dense, check_flag, fail, words

from .._modes import evaluating
from .._runtime.digest import digest_of_words
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.base import variance_of
from ..objectives.explainer import values_of
from .identity import images_identity
from .shards import MANIFEST, InMemory, Manifest, Shards, path_of, write_shard

#: Images that are read twice, to see that they are the same.
READ_TWICE = 32
#: Evaluated again, values may differ by so much of their spread, as lower precision does, and of their size.
_OF_SPREAD, _OF_SIZE = 0.1, 0.01
#: Another version of an image library may decode a picture a little differently: of mean and deviation, so much.
_OF_PIXELS = 0.02
#: Images that are written at once.
_SHARD = 1024


class RecordedCoalitions(Dataset):
    """Images with coalitions of their patches and the values of these: (image, {"label", "bits", "values"}).

    In place of "values" there are "features" where those were recorded; beside them, "classes" where only the likeliest
    were. See `record_coalitions`.

    Args:
        data: the dataset of (image, label), N of them.
        bits (int32): (N, M, W) coalitions, as `fastshap_kernels.pack_bits` packs them.
        values (float32 or float16): (N, M, K) v(S).

    Raises:
        ValueError: for coalitions or values of another shape, type or number of images.

    Example:
        >>> recorded = fv.record_coalitions(model, data, coalitions=8)
        >>> image, found = recorded[0]
        >>> image.shape, found["bits"].shape, found["values"].shape
        (torch.Size([3, 48, 48]), torch.Size([8, 1]), torch.Size([8, 10]))
    """

    def __init__(self, data: Any, bits: Tensor, values: Tensor) -> None:
        remedy = "Make it with fv.record_coalitions."
        bits = check_dense("RecordedCoalitions", "bits", bits, "int32 (N, M, W)", remedy)
        values = check_dense("RecordedCoalitions", "values", values, "floating-point (N, M, K)", remedy)
        if bits.dtype != torch.int32 or bits.ndim != 3:
            fail("RecordedCoalitions", "bits", "int32 (N, M, W)", bits)
        if not values.is_floating_point() or values.ndim != 3:
            fail("RecordedCoalitions", "values", "floating-point (N, M, K)", values)
        if not values.isfinite().all():
            fail("RecordedCoalitions", "values", "finite", "NaN or infinite in places", "Check the model's weights.")
        if bits.shape[:2] != values.shape[:2]:
            fail("RecordedCoalitions", "values", f"(N, M, K) of bits {tuple(bits.shape)}", values)
        if len(data) != len(bits):
            fail("RecordedCoalitions", "data", f"the {len(bits)} recorded images", f"{len(data)} images")
        self.data = data
        self.stored: InMemory | Shards = InMemory({"bits": bits, "values": values}, _SHARD)
        self.manifest: Manifest | None = None

    @classmethod
    def _of(cls, data: Any, stored: InMemory | Shards, manifest: Manifest) -> RecordedCoalitions:
        found = cls.__new__(cls)
        found.data, found.stored, found.manifest = data, stored, manifest
        return found

    def save(self, path: str | Path) -> None:
        """Writes coalitions and values, not the images, into a new or empty folder, as `record_coalitions` does.

        Digests of both, and mean and deviation of some of the images, are kept with them.

        Args:
            path: the folder; it is made where there is none.

        Raises:
            OSError: when it can't be written, or holds files already.

        Example:
            >>> recorded = fv.record_coalitions(model, data, coalitions=8)
            >>> recorded.save("coalitions")
            >>> fv.RecordedCoalitions.load("coalitions", data).digest == recorded.digest
            True
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if any(folder.iterdir()):
                raise OSError("it is not empty")
            manifest = self._described()
            for index in range(manifest.shards):
                write_shard(path_of(folder, index), self.stored.rows(manifest.rows(index)))
            manifest.write(folder)
        except OSError as error:
            raise OSError(
                f"RecordedCoalitions.save: argument `path`, {str(path)!r}, can't be written: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path, data: Any, *, partial: bool = False) -> RecordedCoalitions:
        """What `save` or `record_coalitions` wrote, of the same images. Rows are read as they are wanted.

        Args:
            path: the folder.
            data: the images that were recorded, in their order.
            partial: takes what is there of a recording that is not finished, with the images that it is of.

        Raises:
            FileNotFoundError: when there is no such recording.
            ValueError: when it is damaged, holds no coalitions or is not finished, or `data` holds other images. A
                damaged row is found when it is read.
        """
        folder = Path(path)
        check_flag("RecordedCoalitions.load", "partial", partial)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(
                f"RecordedCoalitions.load: there is no recording in {str(path)!r}. Record it: fv.record_coalitions."
            )
        manifest = Manifest.read(folder)
        present = [index for index in range(manifest.shards) if path_of(folder, index).is_file()]
        if len(present) < manifest.shards and not (partial and present):
            raise ValueError(
                f"RecordedCoalitions.load: the recording in {str(path)!r} is not finished: {len(present)} of "
                f"{manifest.shards} parts are there. Call fv.record_coalitions(model, data) again with its arguments, "
                "or pass partial=True."
            )
        if len(data) != manifest.images:
            fail("RecordedCoalitions", "data", f"the {manifest.images} recorded images", f"{len(data)} images")
        others = manifest.other_settings(replace(manifest, data=images_identity(data)))
        if others or not is_near(pictures_of(data), manifest.pictures):
            raise ValueError(
                f"RecordedCoalitions.load: argument `data` must hold the images that {str(path)!r} was recorded from, "
                f"in their order, but these are others{': ' if others else ''}{'; '.join(others)}. Pass that dataset, "
                "or call fv.record_coalitions(model, data) again."
            )
        stored = Shards(folder, manifest, present)
        found = cls._of(data if len(present) == manifest.shards else Subset(data, stored.images), stored, manifest)
        if manifest.digests is not None and stored.digests() != [manifest.digests[index] for index in present]:
            raise ValueError(
                f"RecordedCoalitions.load: the files in {str(path)!r} are not those that its manifest names. Call "
                "fv.record_coalitions(model, data) again, into another folder."
            )
        return found

    @property
    def bits(self) -> Tensor:
        """(N, M, W) of all images; from a folder, all are read."""
        return self.stored.rows(range(len(self)))["bits"]

    @property
    def values(self) -> Tensor:
        """(N, M, K) of all images; from a folder, all are read. Only where values of all classes were recorded."""
        found = self.stored.rows(range(len(self)))
        if "values" not in found or "classes" in found:
            kept = "features" if "features" in found else f"values of {found['values'].shape[2]} classes"
            raise AttributeError(
                f"RecordedCoalitions: values of all classes were not recorded, but {kept}. Read rows()."
            )
        return found["values"]

    def rows(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The tensors of some images: "bits" (n, M, W), "values" (n, M, K), or what was recorded in place of them."""
        return self.stored.rows(rows)

    @property
    def digest(self) -> str:
        """Of coalitions and values: by it `fit` knows on resuming whether they are the same."""
        return digest_of_words(self.stored.digests())[:16]

    def check(self, model: SelfExplainingClassifier) -> None:
        """Raises a ValueError where `model` gives coalitions of the first images other values than the record.

        `fit` calls it before the first step.
        """
        count, device = min(READ_TWICE, len(self)), next(model.parameters()).device
        found = {name: tensor.to(device) for name, tensor in self.rows(range(count)).items()}
        found = {name: tensor if name == "classes" else tensor[:, :2] for name, tensor in found.items()}
        bits = found["bits"]
        is_of_players = bits.shape[2] == words(model.players) and torch.equal(
            pack_bits(unpack_bits(bits, model.players)), bits
        )
        if is_of_players and self._is_of_outputs(model, found):
            images = self.images(range(count), model)
            with evaluating(model):
                wanted, _ = values_of(model, found)
                expected = model.coalition_values(images, bits).float()
                if "classes" in found:
                    chosen = found["classes"].long().unsqueeze(1).expand(-1, bits.shape[1], -1)
                    wanted, expected = wanted.gather(2, chosen), expected.gather(2, chosen)
            error = (expected - wanted).square().mean().sqrt()
            if error <= _OF_SPREAD * variance_of(wanted).sqrt() + _OF_SIZE * wanted.square().mean().sqrt():
                return
        raise ValueError(
            "fit: these coalitions were recorded with another model, with this one before it was trained further, or "
            "with another removal: their values are not this model's. Call fv.record_coalitions(model, data) again."
        )

    def _is_of_outputs(self, model: SelfExplainingClassifier, found: dict[str, Tensor]) -> bool:
        if "features" in found:
            return found["features"].shape[2] == model.game.vote_weight()[0].shape[1] + 1
        if "classes" in found:
            return int(found["classes"].max()) < model.num_classes
        return found["values"].shape[2] == model.num_classes

    def _described(self) -> Manifest:
        """What is known of them, with the digests."""
        if self.manifest is not None:
            described = replace(self.manifest, digests=self.stored.digests())
            # What was taken of a recording that is not finished is saved as one of these images.
            is_whole = len(self) == described.images
            return described if is_whole else replace(described, **self._of_images())
        found = self.rows([0])
        return Manifest(
            coalitions=found["bits"].shape[1],
            players=32 * found["bits"].shape[2],
            seed=None,
            precision=None,
            dtype=str(found["values"].dtype).removeprefix("torch."),
            store="values",
            classes=None,
            shard=_SHARD,
            model=None,
            digests=self.stored.digests(),
            **self._of_images(),
        )

    def _of_images(self) -> dict[str, Any]:
        return {"images": len(self), "pictures": pictures_of(self.data), "data": images_identity(self.data)}

    @property
    def classes(self) -> Any:
        return getattr(self.data, "classes", None)

    def images(self, rows: Iterable[int], model: SelfExplainingClassifier) -> Tensor:
        """(rows, C, H, W), with the dtype and on the device of the model's weights."""
        return as_weights(model, images_of([self.data[row] for row in rows]))

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: int) -> tuple[Tensor, dict[str, Any]]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, dict[str, Any]]]:
        """A batch at once, as torch's DataLoader takes it."""
        items = Subset(self.data, rows).__getitems__(list(range(len(rows))))
        stored = self.rows(rows)
        return [
            # No label becomes a number, so that items can be stacked: labels have no part in v(S).
            (image, {"label": -1 if label is None else label} | {name: part[at] for name, part in stored.items()})
            for at, (image, label) in enumerate(items)
        ]


def pictures_of(data: Any) -> list[list[float]]:
    """Mean and standard deviation of some images, evenly spread over all."""
    rows = torch.linspace(0, len(data) - 1, min(READ_TWICE, len(data))).long().tolist()
    images = [torch.as_tensor(data[row][0]).double() for row in rows]
    return [[float(image.mean()), float(image.std(correction=0))] for image in images]


def is_near(found: list[list[float]], expected: list[list[float]]) -> bool:
    """Whether both are `pictures_of` the same images, decoded by whatever version of a library."""
    pair = (torch.tensor(found), torch.tensor(expected))
    return pair[0].shape == pair[1].shape and torch.allclose(*pair, rtol=_OF_PIXELS, atol=_OF_PIXELS)


def images_of(items: list[Any]) -> Tensor:
    """A batch without labels, which have no part in v(S)."""
    return torch.stack([item[0] for item in items])


def as_weights(model: SelfExplainingClassifier, images: Tensor) -> Tensor:
    """On the device and in the dtype of the model."""
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)
