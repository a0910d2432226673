"""Explaining a model that is trained already: its coalitions are evaluated once, and its explainer learns from them.

    recorded = fv.record_coalitions(model, data)
    fv.fit(model, recorded, objective=fv.ExplainerObjective(), **fv.recipe.training(model, mirrored=False))

The encoder and the classifier stay as they are, to the bit.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset
from tqdm import tqdm

from fastshap_kernels import pack_bits, sample_coalitions, unpack_bits
from fastshap_kernels._checks import check_count, check_dense, check_flag, fail, words

from .._checks import check_choice
from .._modes import evaluating
from .._runtime.precision import PRECISIONS
from ..games.coalitions import Coalitions
from ..models.self_explaining import SelfExplainingClassifier
from ..objectives.base import variance_of

#: Images that are read twice, to see that they are the same.
_READ_TWICE = 32
#: Evaluated again, values may differ by so much of their spread, as lower precision does, and of their size.
_OF_SPREAD, _OF_SIZE = 0.1, 0.01
#: Another version of an image library may decode a picture a little differently: of mean and deviation, so much.
_OF_PIXELS = 0.02
_FORMAT = "fastshap_vision.RecordedCoalitions/1"


class RecordedCoalitions(Dataset):
    """Images with coalitions of their patches and the values of these: (image, (label, bits, values)).

    Args:
        data: the dataset of (image, label), N of them.
        bits (int32): (N, M, W) coalitions, as `fastshap_kernels.pack_bits` packs them.
        values (float32): (N, M, K) v(S).

    Raises:
        ValueError: for coalitions or values of another shape, type or number of images.

    Example:
        >>> recorded = fv.record_coalitions(model, data, coalitions=8)
        >>> image, (label, bits, values) = recorded[0]
        >>> image.shape, bits.shape, values.shape
        (torch.Size([3, 48, 48]), torch.Size([8, 1]), torch.Size([8, 10]))
    """

    def __init__(self, data: Any, bits: Tensor, values: Tensor) -> None:
        bits = check_dense("RecordedCoalitions", "bits", bits, "int32 (N, M, W)", "Make it with fv.record_coalitions.")
        remedy = "Make it with fv.record_coalitions."
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
        self.data, self.bits, self.values = data, bits, values

    def save(self, path: str | Path) -> None:
        """Writes coalitions and values, not the images, as a safetensors file: whole or not at all.

        A digest of both, and mean and deviation of some of the images, are kept with them.

        Args:
            path: the file; its folder must exist.

        Raises:
            OSError: when it can't be written.

        Example:
            >>> recorded = fv.record_coalitions(model, data, coalitions=8)
            >>> recorded.save("coalitions.safetensors")
            >>> fv.RecordedCoalitions.load("coalitions.safetensors", data).digest == recorded.digest
            True
        """
        path = Path(path)
        tensors = {"bits": self.bits, "values": self.values, "images": self._fingerprint()}
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            save_file(tensors, unfinished, {"format": _FORMAT, "digest": _digest(tensors)})
            unfinished.replace(path)
        except (OSError, SafetensorError) as error:
            unfinished.unlink(missing_ok=True)
            raise OSError(
                f"RecordedCoalitions.save: argument `path`, {str(path)!r}, can't be written: {error}"
            ) from error

    @classmethod
    def load(cls, path: str | Path, data: Any) -> RecordedCoalitions:
        """What `save` wrote, of the same images.

        Raises:
            FileNotFoundError: when there is no such file.
            ValueError: when the file is damaged or holds no coalitions, or `data` holds other images.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"RecordedCoalitions.load: there is no file {str(path)!r}. Record it: fv.record_coalitions."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in ("bits", "values", "images")}
            if metadata.get("format") != _FORMAT or metadata.get("digest") != _digest(tensors):
                raise ValueError("it is not what was written")
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"RecordedCoalitions.load: the file {str(path)!r} is damaged, or holds no coalitions: {error}. Call "
                "fv.record_coalitions(model, data) again."
            ) from error
        recorded = cls(data, tensors["bits"], tensors["values"])
        found = recorded._fingerprint()
        if found.shape != tensors["images"].shape or not torch.allclose(
            found, tensors["images"], rtol=_OF_PIXELS, atol=_OF_PIXELS
        ):
            raise ValueError(
                f"RecordedCoalitions.load: argument `data` must hold the images that {str(path)!r} was recorded from, "
                "in their order, but these are others. Pass that dataset, or call fv.record_coalitions(model, data) "
                "again."
            )
        return recorded

    def _fingerprint(self) -> Tensor:
        """Mean and standard deviation of some images, evenly spread over all: float32 (R, 2)."""
        rows = torch.linspace(0, len(self) - 1, min(_READ_TWICE, len(self))).long().tolist()
        images = [torch.as_tensor(self.data[row][0]).double() for row in rows]
        return torch.stack([torch.stack([image.mean(), image.std(correction=0)]) for image in images]).float()

    @property
    def digest(self) -> str:
        """Of coalitions and values: by it `fit` knows on resuming whether they are the same."""
        return _digest({"bits": self.bits, "values": self.values})[:16]

    def check(self, model: SelfExplainingClassifier) -> None:
        """Raises a ValueError where `model` gives coalitions of the first images other values than the record.

        `fit` calls it before the first step.
        """
        count, device = min(_READ_TWICE, len(self)), next(model.parameters()).device
        bits, values = (part[:count, :2].to(device) for part in (self.bits, self.values))
        is_of_players = bits.shape[2] == words(model.players) and torch.equal(
            pack_bits(unpack_bits(bits, model.players)), bits
        )
        if is_of_players and values.shape[2] == model.num_classes:
            images = self.images(range(count), model)
            with evaluating(model):
                error = (model.coalition_values(images, bits).float() - values).square().mean().sqrt()
            if error <= _OF_SPREAD * variance_of(values).sqrt() + _OF_SIZE * values.square().mean().sqrt():
                return
        raise ValueError(
            "fit: these coalitions were recorded with another model, with this one before it was trained further, or "
            "with another removal: their values are not this model's. Call fv.record_coalitions(model, data) again."
        )

    @property
    def classes(self) -> Any:
        return getattr(self.data, "classes", None)

    def images(self, rows: Iterable[int], model: SelfExplainingClassifier) -> Tensor:
        """(rows, C, H, W), with the dtype and on the device of the model's weights."""
        return _as_weights(model, _images_of([self.data[row] for row in rows]))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> tuple[Tensor, tuple[Any, Tensor, Tensor]]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, tuple[Any, Tensor, Tensor]]]:
        """A batch at once, as torch's DataLoader takes it."""
        items = Subset(self.data, rows).__getitems__(list(range(len(rows))))
        return [
            # No label becomes a number, so that items can be stacked: labels have no part in v(S).
            (image, (-1 if label is None else label, self.bits[row], self.values[row]))
            for row, (image, label) in zip(rows, items, strict=True)
        ]


def record_coalitions(
    model: SelfExplainingClassifier,
    data: Dataset,
    coalitions: int = 64,
    *,
    seed: int = 0,
    batch_size: int = 64,
    precision: str = "auto",
    workers: int = 0,
    progress: bool = True,
) -> RecordedCoalitions:
    """Evaluates paired coalitions of every image once, in evaluation mode and without gradients.

    A model that is not trained further gives the same values in every epoch: those that are kept cost nothing the
    next time, so that each step can learn from all of an image's coalitions at once.

    Args:
        model: trained already; its heads don't matter here.
        data: a dataset of (image, label); images (C, H, W) that are the same whenever they are read: no augmentation.
            `WithMirrorImages` makes more of them.
        coalitions: M of each image, even, drawn from the Shapley kernel.
        seed: of the coalitions, below 2⁶⁴.
        batch_size: images evaluated at once; the model cuts their coalitions to what memory holds.
        precision: of v(S): "auto", bfloat16 autocast for a float32 model on a GPU, else "same", the model's own;
            "bf16"; "fp8"; see `_runtime.precision.lowered`.
        workers: processes that load data.
        progress: shows a bar on a terminal.

    Returns:
        `RecordedCoalitions`, for `fit` with an `ExplainerObjective`. It holds
        N·M·(4·K + 4·⌈P/32⌉) bytes on the CPU: for many classes, record a part of the data. Each process of several
        records all of it.

    Raises:
        ValueError: for an odd or too small number of coalitions, no image, or images that change as they are read.

    Deterministic: as the model is; the coalitions follow from `seed` and an image's place in the data.

    Example:
        >>> recorded = fv.record_coalitions(model, data, coalitions=8)
        >>> recorded.bits.shape, recorded.values.shape
        (torch.Size([4, 8, 1]), torch.Size([4, 8, 10]))
    """
    coalitions = check_count("record_coalitions", "coalitions", coalitions, 2, 2**31 - 2)
    if coalitions % 2:
        fail("record_coalitions", "coalitions", "even, as coalitions come in pairs", coalitions)
    check_choice("precision", precision, PRECISIONS)
    batch_size = check_count("record_coalitions", "batch_size", batch_size, 1, 2**31 - 1)
    workers = check_count("record_coalitions", "workers", workers, 0, 2**31 - 1)
    seed = check_count("record_coalitions", "seed", seed, 0, 2**64 - 1)
    check_flag("record_coalitions", "progress", progress)
    _check_data(model, data)
    # A generator of its own: the loader draws a seed for its workers, and the process's generator stays as it was.
    generator = torch.Generator()
    loader = DataLoader(data, batch_size, num_workers=workers, collate_fn=_images_of, generator=generator)
    all_bits, all_values = [], []
    done = 0
    total, hidden = len(data), None if progress else True  # type: ignore[arg-type]
    with evaluating(model), tqdm(total=total, desc="recording", unit=" images", disable=hidden, leave=False) as bar:
        for images in loader:
            images = _as_weights(model, images)
            bits = sample_coalitions(
                len(images), coalitions, model.players, seed=seed, offset=done * coalitions, device=images.device
            )
            values = model.coalition_values(images, Coalitions(bits, model.players, paired=True), precision=precision)
            all_bits.append(bits.cpu())
            all_values.append(values.float().cpu())
            done += len(images)
            bar.update(len(images))
    return RecordedCoalitions(data, torch.cat(all_bits), torch.cat(all_values))


def _images_of(items: list[Any]) -> Tensor:
    """A batch without labels, which have no part in v(S)."""
    return torch.stack([item[0] for item in items])


def _as_weights(model: SelfExplainingClassifier, images: Tensor) -> Tensor:
    """On the device and in the dtype of the model."""
    weight = next(model.parameters())
    return images.to(weight.device, weight.dtype)


def _digest(tensors: dict[str, Tensor]) -> str:
    """Of the tensors' bytes, types and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _check_data(model: Any, data: Any) -> None:
    if not isinstance(model, SelfExplainingClassifier):
        fail("record_coalitions", "model", "a SelfExplainingClassifier", type(model), "Use fv.convert(timm_model).")
    if isinstance(data, DataLoader):
        remedy = "Pass its dataset (loader.dataset) and `batch_size`."
        fail("record_coalitions", "data", "a dataset of (image, label)", type(data), remedy)
    is_indexed = hasattr(data, "__len__") and hasattr(data, "__getitem__")
    if isinstance(data, IterableDataset | Tensor) or not is_indexed:
        remedy = "Wrap it in a torch.utils.data.Dataset."
        fail("record_coalitions", "data", "a dataset with a length whose items can be indexed", type(data), remedy)
    if len(data) == 0:
        fail("record_coalitions", "data", "a dataset of at least one image", "an empty one")
    item, expected = data[0], model.game.input_size
    image = item[0] if isinstance(item, (tuple, list)) and len(item) == 2 else item
    is_image = isinstance(image, Tensor) and image.is_floating_point() and tuple(image.shape) == expected
    if image is item or not is_image:
        remedy = "Let the dataset normalise and resize, as fv.load_dataset does."
        fail(
            "record_coalitions",
            "data",
            f"a dataset of (image, label), each image a float tensor {expected}",
            image,
            remedy,
        )
    rows = range(min(_READ_TWICE, len(data)))
    first, second = (_images_of([data[row] for row in rows]) for _ in range(2))
    if not first.isfinite().all():
        fail("record_coalitions", "data", "finite", "NaN or infinite in some pixels", "Clean the data.")
    if not torch.equal(first, second):
        raise ValueError(
            "record_coalitions: argument `data` must hold images that are the same at every reading, but they change."
            " Leave the augmentation out: a coalition's value is that of the image as it was."
        )
