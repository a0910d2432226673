"""What a command trains or explains: the model that its flags name, and the data."""

from __future__ import annotations

import argparse
import difflib
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch

from .._checks import shortened
from .._runtime.processes import processes
from ..data import datasets
from ..images.preprocessing import Preprocessing
from ..models.file import CONFIG
from ..models.self_explaining import SelfExplainingClassifier
from ..training.run_folder import RUN, Run, dataset_of
from .arguments import DEFAULT_MODELS

#: What names the data, beside the folder.
DATA = ("dataset", "train_split", "val_split", "class_map", "input_key", "target_key", "download", "resize")


def choose_model(options: argparse.Namespace) -> None:
    """The model that was named, which timm must know, or one that suits the data."""
    if options.model is None:
        options.model, arguments = DEFAULT_MODELS[
            "digits" if options.dataset == "digits" and not options.pretrained else "folder"
        ]
        options.model_kwargs = arguments | options.model_kwargs
    of_flags = sorted({"num_classes", "img_size", "in_chans", "pretrained"} & options.model_kwargs.keys())
    if of_flags:
        raise ValueError(f"argument --model-kwargs: {of_flags[0]} has a flag of its own. Use it instead.")
    if options.drop_path is not None:
        options.model_kwargs = options.model_kwargs | {"drop_path_rate": options.drop_path}
    check_timm_name(options.model)


def check_timm_name(name: str) -> None:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        hint = f"Did you mean {', '.join(close)}?" if close else "timm's documentation lists its models."
        raise ValueError(f"argument --model: timm has no model {name!r}. {hint}")


def load_data(options: argparse.Namespace) -> tuple[Any, Any]:
    """The training data and the test data, as the model that is named expects its pictures."""
    if options.dataset == "digits" and options.crop_pct is not None:
        raise ValueError("argument --crop-pct: the digits are never cropped. Leave it out.")
    if options.dataset == "digits" and not options.pretrained:
        preprocessing = datasets.checked_preprocessing("digits", None, options.img_size, options.in_chans)
    else:
        preprocessing = Preprocessing.of_model(options.model, options.img_size, options.in_chans)
    if options.crop_pct is not None:
        preprocessing = replace(preprocessing, crop_pct=options.crop_pct)
    augment = _augmentation(options)
    train = dataset_of(vars(options), "train", preprocessing, augment)
    test = dataset_of(vars(options), "test", preprocessing, augment=False)  # whatever its split is called
    _check_streams(train)
    if train.classes != test.classes:
        raise ValueError(
            f"the test data have other classes ({len(test.classes)}) than the training data ({len(train.classes)}). "
            "Pass --class-map, which numbers both alike."
        )
    return train, test


def _augmentation(options: argparse.Namespace) -> dict[str, Any] | bool | None:
    """Arguments of timm's training transform, where flags name any."""
    flags = {"auto_augment": options.aa, "re_prob": options.reprob}
    given = {name: value for name, value in flags.items() if value is not None}
    if given and options.aug is False:
        raise ValueError("argument --no-aug: --aa and --reprob change images. Leave these or --no-aug out.")
    return given or options.aug


def _check_streams(data: Any) -> None:
    if isinstance(data, torch.utils.data.IterableDataset):
        raise ValueError(
            "argument --dataset: a stream has no index, by which images are shuffled, recorded and resumed. Read it as "
            "hfds/…, or copy it into a folder or a tar file."
        )


def build(options: argparse.Namespace, data: Any) -> SelfExplainingClassifier:
    channels, size, _ = data.input_size
    try:
        model = SelfExplainingClassifier(
            options.model,
            options.num_classes or len(data.classes),
            img_size=size,
            head=options.head,
            base=options.base,
            head_depth=options.head_depth,
            intermediates=options.intermediates,
            backbone_gradient=options.backbone_gradient,
            removal=options.removal,
            pretrained=options.pretrained,
            model_kwargs={"in_chans": channels} | options.model_kwargs,
            preprocessing=data.preprocessing,
        )
    except ValueError:
        raise
    except Exception as error:  # timm's models raise errors of any kind for arguments that don't suit them
        raise ValueError(
            f"timm cannot build {options.model!r} for images {tuple(data.input_size)} with {options.model_kwargs}: "
            f"{error}. Check --model-kwargs and --img-size."
        ) from error
    if options.initial_checkpoint is not None:
        _load_weights(model.backbone, options.initial_checkpoint)
    return model


def _load_weights(backbone: torch.nn.Module, path: Path) -> None:
    """A file that timm wrote, or the safetensors of one of its models; no pickle runs code."""
    try:
        timm.models.load_checkpoint(backbone, str(path), weights_only=True)
    except Exception as error:  # torch, safetensors and pickle raise errors of any kind
        raise ValueError(
            f"argument --initial-checkpoint: {str(path)!r} holds no weights of this model: {shortened(error)}. Pass a "
            "file of the same timm model, with as many classes."
        ) from error


def to_explain(options: argparse.Namespace) -> tuple[SelfExplainingClassifier, Any, Any, dict[str, Any]]:
    """What train-explainer explains: a model, its training and test data, and what a run's record says of both."""
    if options.checkpoint is not None and ((options.checkpoint / RUN).exists() or not _is_saved(options.checkpoint)):
        return _of_run(options)
    if options.dataset is None:
        raise ValueError("argument --dataset: only a run of fastshap train knows its data. Name them.")
    if options.checkpoint is not None:
        model = SelfExplainingClassifier.from_pretrained(options.checkpoint)
    elif options.pretrained:
        model = _of_timm(options.model)
    else:
        raise ValueError(
            "argument --model: only a trained model can be explained. Add --pretrained, or pass --checkpoint."
        )
    preprocessing = model.preprocessing
    if preprocessing is None:
        raise ValueError(
            "argument --checkpoint: the model is of images that are neither greyscale nor RGB. Use Python."
        )
    train, test = (dataset_of(vars(options), split, preprocessing, augment=False) for split in ("train", "test"))
    _check_streams(train)
    for data in (train, test):
        if len(data.classes) != model.num_classes:
            raise ValueError(
                f"the data has {len(data.classes)} classes, but the model has {model.num_classes} outputs. Pass the "
                "data of its classes (--class-map numbers them), or train it for these: fastshap train --pretrained."
            )
    name = model.config["model_name"]
    return model, train, test, {"dataset": options.dataset, "model": name}


def _of_timm(name: str) -> SelfExplainingClassifier:
    check_timm_name(name)
    classes = timm.get_pretrained_cfg(name).num_classes
    if not classes:
        raise ValueError(f"argument --model: the weights of {name} have no classifier. Train one: fastshap train.")
    return SelfExplainingClassifier(name, classes, pretrained=True)


def _is_saved(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def _of_run(options: argparse.Namespace) -> tuple[SelfExplainingClassifier, Any, Any, dict[str, Any]]:
    run = Run.read(options.checkpoint, processes().device)
    named = {name: getattr(options, name) for name in DATA if getattr(options, name)}
    run.arguments.update(named)
    options.data_dir = options.data_dir or run.data_dir
    train, test = run.dataset("train", options.data_dir), run.dataset("test", options.data_dir)
    kept = {name: run.arguments.get(name) for name in ("model", *DATA)}
    return run.model, train, test, kept
