"""The command line: fastshap train | record | train-explainer | explain | evaluate | info, with timm's flag names."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from .._runtime.processes import processes
from ..explanations.explanation import Explanation
from ..metrics.fidelity import fidelity
from ..models.convert import convert
from ..models.head import SharesHead
from ..objectives.joint import JointObjective
from ..offline.explain_images import explain_images
from ..training import recipe
from ..training.checkpoint import find_checkpoint
from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.run_folder import VISION_PACKAGES, Run, RunRecord
from .arguments import AMP_DTYPES, EXACT_PLAYERS
from .inputs import build, choose_model, load_data, to_explain

#: Who wrote a picture: `explain` replaces its own and no other.
MARK = "fastshap explain"


def train(options: argparse.Namespace) -> None:
    """Trains a model and writes the run's folder."""
    _check_output(options.output)
    choose_model(options)
    train_data, test_data = load_data(options)
    torch.manual_seed(options.seed)
    model = build(options, train_data)
    objective = JointObjective(
        options.coalitions,
        options.regression_weight,
        options.masked_task_weight,
        error=options.error,
        target=options.target,
        target_precision=options.target_precision,
        regression_ramp=tuple(options.regression_ramp),
        masked_task_ramp=tuple(options.masked_task_ramp),
        seed=options.seed,
    )
    run_record = RunRecord(options, train_data)
    names = ("grad_checkpointing", "layer_decay", "smoothing", "mixup", "cutmix", "sync_bn", "keep_best")
    more = {name: getattr(options, name) for name in names} | {"compile": options.compile or None}
    with _epochs_logged():
        result = fit(
            model, train_data, test_data, objective=objective, callbacks=[run_record], **_settings(options), **more
        )
    if processes().is_main_process:
        print(
            f"accuracy {result.accuracy:.2f} % (best {result.best_accuracy:.2f} %) after {options.epochs} epochs in "
            f"{result.seconds:.0f} s; the run is in {options.output}"
        )


def record(options: argparse.Namespace) -> None:
    """Records the coalitions of a trained model, in the folder in which its explainer is trained later."""
    _check_output(options.output)
    model, train_data, _, kept = to_explain(options)
    _check_shares(model)  # which train-explainer would refuse
    mirror = kept["dataset"] != "digits" if options.mirror is None else options.mirror
    recorded = recipe.record(
        model.to(processes().device),
        train_data,
        coalitions=options.coalitions,
        mirror=mirror,
        seed=options.seed,
        output=options.output,
        shard=options.shard,
        dtype=options.dtype,
        store=options.store,
        classes=options.top_classes,
        batch_size=options.batch_size,
        precision=options.precision,
        workers=options.workers,
    )
    if processes().is_main_process:
        trained, held_out = map(len, recorded)
        print(
            f"recorded {options.coalitions} coalitions of {trained} images, and of {held_out} that are held out, in "
            f"{options.output}. Go on with: fastshap train-explainer --output {options.output}"
        )


def train_explainer(options: argparse.Namespace) -> None:
    """Trains an explainer of a run's model, which stays as it is, and writes a run's folder."""
    if options.checkpoint is not None and options.output.resolve() == options.checkpoint.resolve():
        raise ValueError("argument --output: the explainer's run needs a folder of its own, not that of --checkpoint.")
    _check_output(options.output)
    find_checkpoint(options.output, options.resume)  # before the coalitions, which take longest
    explained, train_data, test_data, kept = to_explain(options)
    _check_shares(explained)
    if options.mirror is None:
        options.mirror = kept["dataset"] != "digits"
    torch.manual_seed(options.seed)
    model = convert(
        explained.backbone,
        img_size=explained.game.input_size[1:],
        head_depth=options.head_depth,
        intermediates=options.intermediates,
        removal=explained.removal,
        preprocessing=train_data.preprocessing,
    ).to(processes().device)
    for name, value in recipe.training(model, options.mirror).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    run_record = RunRecord(argparse.Namespace(**vars(options) | kept), train_data)
    more = {"coalitions": options.coalitions, "mirror": options.mirror, "callbacks": [run_record]}
    with _epochs_logged():
        result = recipe.train_explainer(model, train_data, **_settings(options), **more)
    accuracy, _ = evaluate(model, test_data, options.batch_size, workers=options.workers, accelerator=_accelerator())
    if processes().is_main_process:
        print(
            f"accuracy {accuracy:.2f} %, as before; explained in {options.epochs} epochs and {result.seconds:.0f} s; "
            f"the run is in {options.output}"
        )


def _check_shares(model: Any) -> None:
    if not isinstance(model.head, SharesHead):
        raise ValueError("argument --checkpoint: the model's votes are its explanation already. Train --head shares.")


def _settings(options: Any) -> dict[str, Any]:
    """Arguments of `fit`, as the flags say."""
    return {
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "opt": options.opt,
        "lr": options.lr,
        "weight_decay": options.weight_decay,
        "sched": options.sched,
        "warmup_epochs": options.warmup_epochs,
        "clip_grad": options.clip_grad,
        "min_lr": options.min_lr,
        "warmup_lr": options.warmup_lr,
        "opt_betas": options.opt_betas,
        "grad_accum_steps": options.grad_accum_steps,
        "model_ema_decay": options.model_ema_decay if options.model_ema else None,
        "channels_last": options.channels_last,
        "fsdp": options.fsdp,
        "checkpoint_hist": options.checkpoint_hist,
        "checkpoint_steps": options.checkpoint_steps,
        "log_with": options.log_with,
        "log_interval": options.log_interval,
        "seed": options.seed,
        "workers": options.workers,
        "mixed_precision": AMP_DTYPES[options.amp_dtype] if options.amp else None,
        "output": options.output,
        "resume": options.resume,
    }


def explain(options: argparse.Namespace) -> None:
    """Writes a picture and the Shapley values of each image; of many, no pictures, and a row each."""
    if options.source:
        return _explain_many(options)
    from matplotlib import pyplot

    _check_output(options.output)
    run = Run.read(options.checkpoint, options.device)
    target = None if options.target_class is None else run.class_index(options.target_class)
    if options.images:
        names = _output_names(options.images)
        images = torch.stack([run.preprocessing.load(path) for path in options.images])
    else:
        rows, images, _ = _examples(run.dataset("test", options.data_dir), options.num_images)
        names = [f"test_{row:05d}" for row in rows]
    _check_overwritten(options.output.resolve(), names, options.images)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images.split(1), strict=True):
        explanation = run.model.explain(image.to(run.device), target="all", evaluations=options.evaluations)
        explanation.save(options.output / f"{name}.safetensors")
        pictured = run.preprocessing.restore(image)
        figure, _ = explanation.plot(pictured, target=target, classes=run.classes)
        figure.savefig(options.output / f"{name}.png", metadata={"Software": MARK})
        pyplot.close(figure)
        predicted = int(explanation.predicted)
        share = float(explanation.probabilities[0, predicted])
        print(f"{name}: {run.classes[predicted]} ({share:.0%})")
    print(f"wrote {len(names)} pictures (.png) and Shapley values of every class (.safetensors) to {options.output}")


def _explain_many(options: argparse.Namespace) -> None:
    for name in ("images", "target_class", "evaluations"):
        if getattr(options, name):
            flag = "of single images" if name == "images" else f"--{name.replace('_', '-')}"
            raise ValueError(
                f"argument --images: it can't be combined with {flag}, which is for pictures. Leave one out."
            )
    run = Run.read(options.checkpoint, options.device or processes().device)
    source = options.source[0] if len(options.source) == 1 else options.source
    found = explain_images(
        run.model,
        source,
        options.output,
        top_k=options.top_k,
        batch_size=options.batch_size,
        workers=options.workers,
        classes=run.classes,
    )
    if processes().is_main_process:
        bad = f"; {found.unreadable} could not be read, and say why" if found.unreadable else ""
        print(f"explained {found.images - found.unreadable} of {found.images} images in {found.path}{bad}")


def evaluate_run(options: argparse.Namespace) -> None:
    """Prints accuracy, and how close the model's Shapley values are to exact or estimated ones."""
    accelerator = _accelerator()
    of_process = accelerator.device if accelerator.num_processes > 1 else None
    run = Run.read(options.checkpoint, options.device or of_process)
    test_data = run.dataset("test", options.data_dir)
    accuracy, loss = evaluate(
        run.model, test_data, options.batch_size, workers=options.workers, accelerator=accelerator
    )
    if not accelerator.is_main_process:
        return
    _, images, _ = _examples(test_data, options.num_images)
    reference = options.reference or ("exact" if run.model.players <= EXACT_PLAYERS else "kernel_shap")
    found = fidelity(
        run.model,
        images.to(run.device),
        reference,
        coalitions=options.coalitions,
        seed=options.seed,
        progress=not options.json and sys.stderr.isatty(),
    )
    if options.json:
        record = {"accuracy": accuracy, "loss": loss, "test_images": len(test_data), "fidelity": found.as_dict()}
        print(json.dumps(record, indent=2))
    else:
        print(f"accuracy {accuracy:.2f} %, cross-entropy {loss:.4f} on {len(test_data)} test images\n\n{found}")


def _accelerator() -> Accelerator:
    """Of an evaluation by all processes, in the model's own precision."""
    processes()
    return Accelerator(mixed_precision="no", dynamo_backend="no")


def info(options: argparse.Namespace) -> None:
    """Prints versions and which backends are available."""
    from fastshap_kernels.info import report

    print(report(), end="\n\n")
    for name in VISION_PACKAGES:
        print(f"{name:<16}  {version(name)}")


def _check_output(output: Path) -> None:
    """Before anything is computed: the folder is there, or can be made."""
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"argument --output: {str(nearest)!r} is no folder that can be written to. Choose another.")


def _examples(data: Any, count: int) -> tuple[list[int], Tensor, Tensor]:
    """Images spread evenly over the data, which may be sorted by class: their rows, (B, C, H, W), labels (B,)."""
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    images, labels = zip(*(data[row] for row in rows), strict=True)
    return rows, torch.stack(images), torch.tensor(labels)


def _output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image's files: its own, numbered where two images share it. No two are alike."""
    stems = [path.stem for path in paths]
    taken = Counter(stem.casefold() for stem in stems)  # some file systems tell no upper case from lower
    names = []
    for stem in stems:
        name, number = stem, 0
        while taken[stem.casefold()] > 1 and taken[name.casefold()]:
            name, number = f"{stem}_{number}", number + 1
        taken[name.casefold()] += name != stem
        names.append(name)
    return names


def _check_overwritten(output: Path, names: Sequence[str], inputs: Sequence[Path]) -> None:
    """Before anything is written: an earlier explanation may be replaced, an input or another's file may not."""
    for path in (output / f"{name}{suffix}" for name in names for suffix in (".png", ".safetensors")):
        if path.exists() and (any(path.samefile(image) for image in inputs) or not _is_explanation(path)):
            raise ValueError(
                f"argument --output: {str(path)!r} exists, and would be overwritten. Choose another folder."
            )


def _is_explanation(path: Path) -> bool:
    """Whether an earlier `explain` wrote this file."""
    try:
        if path.suffix == ".safetensors":
            return bool(Explanation.load(path))
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except (ValueError, OSError):
        return False


@contextmanager
def _epochs_logged() -> Iterator[None]:
    """Shows one line an epoch on stderr, above the progress bar where there is one."""
    logger, handler = logging.getLogger("fastshap_vision"), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
