"""Evaluating coalitions of every image once, in memory or into a folder, by one process or by many."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from fastshap_kernels import sample_coalitions
from fastshap_kernels._checks import check_count, check_flag, fail

from .._checks import check_choice
from .._modes import evaluating
from .._runtime.digest import digest_of_tensors
from .._runtime.errors import SendableErrors
from .._runtime.precision import PRECISIONS, resolved
from .._runtime.processes import processes
from .._runtime.progress import progress_bar
from ..games.coalitions import Coalitions
from ..games.readout import features_as_values, is_plain_classifier
from ..models.image_text import ImageTextClassifier
from ..models.self_explaining import SelfExplainingClassifier
from .identity import images_identity
from .recorded import READ_TWICE, RecordedCoalitions, as_weights, images_of, is_near, pictures_of
from .shards import MANIFEST, InMemory, Manifest, Shards, path_of, write_shard

DTYPES = {"float16": torch.float16, "float32": torch.float32}
STORES = ("values", "features")
#: Images of a shard: 131 MB of 64 coalitions and 1 000 classes in float16.
SHARD = 1024
LOCK = ".lock"
SECONDS_TO_WAIT = 10.0


def record_coalitions(
    model: SelfExplainingClassifier,
    data: Dataset,
    coalitions: int = 64,
    *,
    output: str | Path | None = None,
    shard: int = SHARD,
    dtype: str | None = None,
    store: str = "values",
    classes: int | None = None,
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
        output: None keeps all in memory, and each process of several records all of it. A folder, which all processes
            share, takes safetensors files of `shard` images, each written whole or not at all: the processes divide
            them, called again with the same arguments only those that are missing are recorded, and training reads the
            rows that it wants. Memory is that of one shard.
        shard: images in a file. No batch crosses its end.
        dtype: of what is kept, "float16" or "float32"; None for float16 in a folder and float32 in memory.
        store: "values" keeps v(S). "features" keeps what the classifier reads, h(S), from which v(S) = W h(S) + b
            follows for any classifier of the same encoder: less where there are more classes than features.
        classes: of each image, keeps only its likeliest ones, so many, and which they are; None keeps all.
        seed: of the coalitions, below 2⁶⁴.
        batch_size: images evaluated at once; the model cuts their coalitions to what memory holds.
        precision: of v(S): "auto", bfloat16 autocast for a float32 model on a GPU, else "same", the model's own;
            "bf16"; "fp8"; see `_runtime.precision.lowered`.
        workers: processes that load data.
        progress: shows a bar on a terminal.

    Returns:
        `RecordedCoalitions`, for `fit` with an `ExplainerObjective`: M·(K·4 + ⌈P/32⌉·4) bytes an image in float32, with
        K the classes, or the features and one more, that are kept.

    Raises:
        ValueError: for an odd or too small number of coalitions, no image, images that change as they are read, values
            that `dtype` can't hold, or a folder that holds another recording.
        OSError: when the folder can't be written.

    Deterministic: as the model is, for equal `shard` and `batch_size`; one process or many, stopped or not. The
    coalitions follow from `seed` and an image's place in the data.

    Example:
        >>> recorded = fv.record_coalitions(model, data, coalitions=8)
        >>> recorded.bits.shape, recorded.values.shape
        (torch.Size([4, 8, 1]), torch.Size([4, 8, 10]))
        >>> kept = fv.record_coalitions(model, data, coalitions=8, output="coalitions", classes=3)
        >>> kept[0][1]["classes"].shape, kept[0][1]["values"].dtype
        (torch.Size([3]), torch.float16)
    """
    coalitions = check_count("record_coalitions", "coalitions", coalitions, 2, 2**31 - 2)
    if coalitions % 2:
        fail("record_coalitions", "coalitions", "even, as coalitions come in pairs", coalitions)
    check_choice("precision", precision, PRECISIONS)
    check_choice("store", store, STORES)
    check_choice("dtype", dtype, (None, *DTYPES))
    shard = check_count("record_coalitions", "shard", shard, 1, 2**31 - 1)
    batch_size = check_count("record_coalitions", "batch_size", batch_size, 1, 2**31 - 1)
    workers = check_count("record_coalitions", "workers", workers, 0, 2**31 - 1)
    seed = check_count("record_coalitions", "seed", seed, 0, 2**64 - 1)
    check_flag("record_coalitions", "progress", progress)
    _check_data(model, data)
    if classes is not None:
        classes = check_count("record_coalitions", "classes", classes, 1, model.num_classes)
        if store == "features":
            fail("record_coalitions", "classes", "None with store='features', which holds every class", classes)
    scores_texts = isinstance(model, ImageTextClassifier)
    if store == "features" and (scores_texts or not is_plain_classifier(model.backbone)):
        expected = "'values' for this model, which has no single linear classifier before its outputs"
        fail("record_coalitions", "store", expected, store)
    manifest = Manifest(
        images=len(data),  # type: ignore[arg-type]
        coalitions=coalitions,
        players=model.players,
        seed=seed,
        precision=resolved(model, precision),
        dtype=dtype or ("float32" if output is None else "float16"),
        store=store,
        classes=classes,
        shard=shard,
        model=_fingerprint(model, store),
        pictures=pictures_of(data),
        data=images_identity(data),
    )
    options = (batch_size, workers, progress)
    if output is None:
        recorder = _Recorder(model, data, manifest, *options)
        parts = list(recorder.shards(range(manifest.shards)))
        whole = {name: torch.cat([part[name] for _, part in parts]) for name in parts[0][1]}
        return RecordedCoalitions._of(data, InMemory(whole, shard), manifest)
    folder, state = Path(output), processes()
    with _held(folder, manifest, keeps_precision=precision == "auto") as manifest:
        recorder = _Recorder(model, data, manifest, *options)
        own = range(state.process_index, manifest.shards, state.num_processes)
        for index, tensors in recorder.shards([index for index in own if not path_of(folder, index).exists()]):
            write_shard(path_of(folder, index), tensors)
        state.wait_for_everyone()
        if state.is_main_process:
            _finish(folder, manifest)
        state.wait_for_everyone()
    return RecordedCoalitions.load(folder, data)


class _Recorder:
    """Evaluates the coalitions of shards, one after the other."""

    def __init__(
        self, model: Any, data: Any, manifest: Manifest, batch_size: int, workers: int, progress: bool
    ) -> None:
        self.model, self.data, self.manifest = model, data, manifest
        self.batch_size, self.workers = batch_size, workers
        self.shows = None if progress and processes().is_main_process else False

    def shards(self, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """The tensors of each."""
        batches = [
            list(rows[at : at + self.batch_size])
            for rows in map(self.manifest.rows, indices)
            for at in range(0, len(rows), self.batch_size)
        ]
        # A generator of its own: the loader draws a seed for its workers, and the process's stays as it was.
        generator = torch.Generator()
        data, workers = SendableErrors(self.data), self.workers
        loader = DataLoader(data, batch_sampler=batches, num_workers=workers, collate_fn=images_of, generator=generator)
        features = self.manifest.store == "features"
        total, parts = sum(map(len, batches)), []
        with (
            evaluating(self.model),
            features_as_values(self.model.backbone) if features else nullcontext(),
            progress_bar(self.shows, total=total, desc="recording", unit=" images", leave=False) as bar,
        ):
            for rows, images in zip(batches, loader, strict=True):
                parts.append(self._evaluated(rows, as_weights(self.model, images)))
                bar.update(len(rows))
                index = rows[0] // self.manifest.shard
                if rows[-1] + 1 == self.manifest.rows(index).stop:
                    yield index, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
                    parts = []

    def _evaluated(self, rows: list[int], images: Tensor) -> dict[str, Tensor]:
        model, manifest = self.model, self.manifest
        bits = sample_coalitions(
            len(rows),
            manifest.coalitions,
            model.players,
            seed=manifest.seed or 0,
            offset=rows[0] * manifest.coalitions,
            device=images.device,
        )
        coalitions = Coalitions(bits, model.players, paired=True)
        values = model.coalition_values(images, coalitions, precision=manifest.precision)
        found = {"bits": bits}
        if manifest.classes is not None:
            likeliest = model(images).float().topk(manifest.classes, 1).indices
            values = values.gather(2, likeliest.unsqueeze(1).expand(-1, manifest.coalitions, -1))
            found["classes"] = likeliest.int()
        kept = values.float().to(DTYPES[manifest.dtype])
        if not kept.isfinite().all():
            if values.isfinite().all():
                largest = f"values up to {float(values.abs().max()):.3g}"
                fail("record_coalitions", "dtype", f"one that holds {largest}", manifest.dtype, "Pass 'float32'.")
            remedy = "Check the model's weights."
            fail("record_coalitions", "model", "one whose values are finite", "NaN or infinite values", remedy)
        found[manifest.store] = kept
        return {name: tensor.cpu() for name, tensor in found.items()}


@contextmanager
def _held(folder: Path, manifest: Manifest, keeps_precision: bool) -> Iterator[Manifest]:
    """Keeps other runs out of the folder, in which the manifest is: written now, or the same as was written.

    Where the precision is left to the machine, that of the first one holds.
    """
    state, lock = processes(), FileLock(folder / LOCK)
    try:
        if state.is_main_process:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=SECONDS_TO_WAIT)
            _begin(folder, manifest)
    except Timeout as error:
        raise ValueError(
            f"record_coalitions: another run records into {str(folder)!r} now. Wait for its end, or pass another "
            "`output`."
        ) from error
    except OSError as error:
        raise OSError(f"record_coalitions: argument `output`, {str(folder)!r}, can't be written: {error}") from error
    try:
        state.wait_for_everyone()
        if keeps_precision and (folder / MANIFEST).exists():
            manifest = replace(manifest, precision=Manifest.read(folder).precision)
        _check_begun(folder, manifest)
        yield manifest
    finally:
        lock.release()


def _begin(folder: Path, manifest: Manifest) -> None:
    found = sorted(folder.iterdir())
    # Of a run that was killed while it wrote its first file, or another one.
    unfinished = [
        path for path in found if re.match(rf"\.{MANIFEST}\.|\d{{6,}}\.safetensors\.\d+\.unfinished", path.name)
    ]
    strangers = [path.name for path in found if path.name != LOCK and path not in unfinished]
    if strangers and MANIFEST not in strangers:
        got, remedy = f"one with {strangers[0]!r}", "Pass an empty or a new folder."
        fail("record_coalitions", "output", "a folder for this recording alone", got, remedy)
    for path in unfinished:
        path.unlink()
    if not strangers:
        manifest.write(folder)


def _check_begun(folder: Path, manifest: Manifest) -> None:
    if not (folder / MANIFEST).exists():
        found = f"{str(folder)!r}, which another process sees alone"
        fail("record_coalitions", "output", "a folder that all processes share", found)
    begun = Manifest.read(folder)
    others = begun.other_settings(manifest)
    if not is_near(manifest.pictures, begun.pictures):
        others.append("the images are others")
    if others:
        raise ValueError(
            f"record_coalitions: argument `output`, {str(folder)!r}, holds another recording: {'; '.join(others)}. "
            "Record with the same settings, or into another folder."
        )


def _finish(folder: Path, manifest: Manifest) -> None:
    """Writes the shards' digests into the manifest."""
    present = [index for index in range(manifest.shards) if path_of(folder, index).exists()]
    if len(present) < manifest.shards:
        found = f"{str(folder)!r}, in which {manifest.shards - len(present)} of {manifest.shards} parts are missing"
        fail("record_coalitions", "output", "a folder that all processes share", found)
    replace(Manifest.read(folder), digests=Shards(folder, manifest, present).digests()).write(folder)


def _fingerprint(model: SelfExplainingClassifier, store: str) -> str:
    """Of the weights and statistics that v(S) follows from, and of what removing a patch means."""
    about = [model.config["model_name"], model.removal, model.game.patches_vote]
    classifier: Any = model.backbone.get_classifier()  # type: ignore[operator]
    left_out = {id(tensor) for tensor in classifier.parameters()} if store == "features" else set()
    tensors = [named for named in model.backbone.state_dict(keep_vars=True).items() if id(named[1]) not in left_out]
    if isinstance(model, ImageTextClassifier):
        about += [model.scores.logit_scale, model.scores.logit_bias]
        tensors.append(("texts", model.texts))
    return digest_of_tensors(tensors, about)[:32]


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
    rows = range(min(READ_TWICE, len(data)))
    first, second = (images_of([data[row] for row in rows]) for _ in range(2))
    if not first.isfinite().all():
        fail("record_coalitions", "data", "finite", "NaN or infinite in some pixels", "Clean the data.")
    if not torch.equal(first, second):
        raise ValueError(
            "record_coalitions: argument `data` must hold images that are the same at every reading, but they change."
            " Leave the augmentation out: a coalition's value is that of the image as it was."
        )
