"""One call that explains any number of images, and writes a row for each."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from fastshap_kernels._checks import check_count, check_flag, fail

from .._modes import evaluating
from .._runtime.digest import digest_of_tensors
from .._runtime.errors import SendableErrors
from .._runtime.progress import progress_bar
from ..explanations.link import probabilities
from ..models.self_explaining import SelfExplainingClassifier
from .parts import Parts
from .rows import ParquetFile, Rows, ShardFiles, joined
from .stored import Batch, Inputs, StoredImage, collate, digest_of, find_images

#: A part holds about so many bytes of Shapley values, and so many images at most.
PART_BYTES, PART_IMAGES = 2**26, 4096
_MOST = 2**31 - 1


class ExplainedImages(NamedTuple):
    """What `explain_images` has written: where, how many images, and how many of them could not be read.

    Example:
        >>> fv.ExplainedImages("out.parquet", images=1000, unreadable=2).unreadable
        2
    """

    path: Path
    images: int
    unreadable: int


def explain_images(
    model: SelfExplainingClassifier,
    source: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    top_k: int | str = 5,
    batch_size: int = 256,
    workers: int = 0,
    classes: Sequence[str] | None = None,
    progress: bool = True,
) -> ExplainedImages:
    """Explains all images of folders or tar shards, in one forward pass each, and writes them as they come.

    Started again after a stop, it goes on: finished parts lie in the folder `output`.parts until all are there, each
    whole or absent. Started as several processes (torchrun, accelerate launch), each takes its share of the parts,
    with the model on its own device. However often it was stopped, and with any number of processes, the rows are the
    same: one for each image, in the order of the images.

    Args:
        model: with a `preprocessing`; it computes where it is, in its own precision or under the caller's autocast.
        source: a folder, with all folders in it; a tar file; or a list of paths, of images too. A tar file in a folder
            is read as a folder would be. Names are those below the folder or in the tar file, of a list with its paths.
        output: a Parquet file (.parquet), or for all classes the folder of the safetensors files.
        top_k: so many of an image's likeliest classes, all where there are fewer; or "all".
        batch_size: images at once.
        workers: processes that read images.
        classes: K names.
        progress: shows a bar on a terminal.

    A row of the Parquet file has `image` (its name), `classes`, `names`, `probabilities`, `values` (k lists of P
    float16, patches row by row, in logits), `expected_error` (of a calibrated model) and `error`: null, or why the
    image can't be read, with null for all else. Of all classes, files of about 64 MB hold `logits` (n, K), `values`
    (n, P, K) and `expected_error` (n, K) of the images named in their metadata, under `images`; `unreadable` names
    the others, with the reason.

    Returns:
        `ExplainedImages`, once all processes are done.

    Raises:
        ValueError: no image, an argument out of its range, or an `output` that holds something else, such as the
            explanations of other images, or with another model or batch size.
        ModuleNotFoundError: where a Parquet file is to be written and pyarrow is not installed.

    Deterministic: as the model is.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (64, 48), "red").save("red.png")
        >>> fv.explain_images(model, ["red.png"], "explained", top_k="all").images
        1
    """
    if not isinstance(model, SelfExplainingClassifier):
        fail("explain_images", "model", "a SelfExplainingClassifier", type(model), "Use fv.convert(timm_model).")
    if model.preprocessing is None:
        raise ValueError(
            "explain_images: argument `model` must know how a picture becomes its input, but its preprocessing is "
            "None, as its images are neither greyscale nor RGB. Explain tensors, with model.explain."
        )
    count = _checked_count(top_k, model.num_classes)
    path = _checked_path(output, count)
    batch_size = check_count("explain_images", "batch_size", batch_size, 1, _MOST)
    workers = check_count("explain_images", "workers", workers, 0, _MOST)
    check_flag("explain_images", "progress", progress)
    names = _checked_names(classes, model.num_classes)
    images = find_images(source)
    facts = {
        "images": len(images),
        "images_digest": digest_of(images),
        "model_digest": digest_of_model(model),
        "preprocessing": model.preprocessing.as_dict(),
        "batch_size": batch_size,
        "top_k": "all" if count is None else count,
        "classes": names,
        "grid": model.grid,
        "seen": model.seen,
        "untrained": model._warn_if_untrained(),
    }
    form: ParquetFile | ShardFiles
    if count is None:
        form = ShardFiles(facts, model.players, model.num_classes, model.calibration is not None)
    else:
        form = ParquetFile(facts, names)
    size = _images_of_part(model.players * (count or model.num_classes), batch_size)
    pieces = [images[start : start + size] for start in range(0, len(images), size)]
    parts = Parts(path, form, facts, len(pieces))
    with parts.pending() as mine:
        left = [image for part in mine for image in pieces[part]]
        loader = loader_of(model, left, batch_size, workers)
        shows = None if progress and parts.state.is_main_process else False
        with evaluating(model), progress_bar(shows, total=len(left), desc="explaining", unit=" images") as bar:
            batches = _explained(model, loader, count, bar)
            for part in mine:
                parts.write(part, _rows(pieces[part], batches))
        return ExplainedImages(path, *parts.finish())


def _explained(
    model: SelfExplainingClassifier, loader: Iterable[Batch], count: int | None, bar: tqdm
) -> Iterator[tuple[dict[str, Tensor], list[str | None]]]:
    """Of each batch, the tensors of the images that could be read, and of all of them the reasons."""
    weight, null = next(model.parameters()), model.null_value()
    errors = None if model.calibration is None else model.calibration.expected_error(model.players)
    for inputs, reasons in loader:
        found: dict[str, Tensor] = {}
        if len(inputs):
            inputs = inputs.to(weight.device, weight.dtype, non_blocking=True)
            features, logits = model.game.features_and_logits(inputs)
            chosen = None if count is None else logits.topk(count).indices
            values = model.head(features, logits, null, chosen)
            found["values"] = values.to(torch.float16).cpu()
            if chosen is None:
                found["logits"] = logits.float().cpu()
            else:
                found["classes"] = chosen.cpu()
                found["probabilities"] = probabilities(logits).gather(1, chosen).float().cpu()
            if errors is not None:
                found["expected_error"] = errors.expand(len(inputs), -1) if chosen is None else errors[chosen.cpu()]
        bar.update(len(reasons))
        yield found, reasons


def _rows(images: Sequence[StoredImage], batches: Iterator[tuple[dict[str, Tensor], list[str | None]]]) -> Rows:
    """Those of a part, which consists of whole batches."""
    tensors, reasons = list[dict[str, Tensor]](), list[str | None]()
    while len(reasons) < len(images):
        found, of_batch = next(batches)
        tensors += [found] if found else []
        reasons += of_batch
    return Rows([image.name for image in images], reasons, joined(tensors))


def loader_of(
    model: SelfExplainingClassifier, images: Sequence[StoredImage], batch_size: int, workers: int
) -> DataLoader:
    """The images' batches, in their order. A generator of its own leaves the process's as it is."""
    data = SendableErrors(Inputs(images, model.preprocessing))  # type: ignore[arg-type]
    pin = next(model.parameters()).device.type == "cuda"
    return DataLoader(
        data, batch_size, num_workers=workers, collate_fn=collate, pin_memory=pin, generator=torch.Generator()
    )


def _images_of_part(values: int, batch_size: int) -> int:
    """A multiple of the batch: each image is then in the same batch whatever was finished before."""
    images = min(PART_IMAGES, PART_BYTES // (2 * values))
    return batch_size * max(1, images // batch_size)


def _checked_count(top_k: Any, classes: int) -> int | None:
    """The classes explained of each image, None for all."""
    if isinstance(top_k, str):
        if top_k != "all":
            fail("explain_images", "top_k", "a whole number or 'all'", top_k)
        return None
    return min(check_count("explain_images", "top_k", top_k, 1, _MOST), classes)


def _checked_path(output: Any, count: int | None) -> Path:
    if not isinstance(output, str | os.PathLike):
        fail("explain_images", "output", "a path", output)
    path = Path(output)
    if count is None and path.suffix == ParquetFile.suffix:
        remedy = "Name a folder, or give a number for top_k."
        fail("explain_images", "output", "a folder, where all classes are explained", str(output), remedy)
    if count is not None and path.suffix != ParquetFile.suffix:
        remedy = "Name such a file, or pass top_k='all', which writes into a folder."
        fail("explain_images", "output", f"a file that ends in {ParquetFile.suffix}", str(output), remedy)
    return path


def _checked_names(classes: Any, count: int) -> list[str] | None:
    if classes is None:
        return None
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    if not is_list or len(classes) != count or not all(isinstance(name, str) for name in classes):
        fail("explain_images", "classes", f"{count} names, or None", classes)
    return list(classes)


def digest_of_model(model: SelfExplainingClassifier) -> str:
    """Of its weights, and of all else that decides its explanations."""
    return digest_of_tensors(model.state_dict(), about=model.config)
