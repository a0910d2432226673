"""The settings of a run: checks, optimiser."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from fastshap_kernels._checks import check_count, check_number, fail

from .._checks import check_choice

_MOST = 2**31 - 1

# timm's schedules that follow the updates; "none" keeps the learning rate.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

_OF_OBJECTIVES = ("state_dict", "load_state_dict", "check", "label_classes", "evaluate")


def create_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    opt = settings["opt"]
    try:
        get_optimizer_info(opt.lower().split("_")[-1])
    except ValueError as error:
        close = difflib.get_close_matches(opt, list_optimizers(), 3) or ["adamw", "sgd"]
        raise ValueError(f"fit: timm has no optimizer `opt` = {opt!r} ({error}). Try {', '.join(close)}.") from error
    try:
        return create_optimizer_v2(model, opt=opt, lr=settings["lr"], weight_decay=settings["weight_decay"])
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"fit: timm can't make the optimizer `opt` = {opt!r} for this model, lr and weight_decay: {error}. Try "
            "opt='adamw'."
        ) from error


def check_kinds(model: object, objective: object, output: object) -> None:
    """The arguments that are no numbers or words."""
    if not isinstance(model, nn.Module):
        fail("fit", "model", "a torch.nn.Module that returns logits", model, "Use timm.create_model or fv.convert.")
    parts = (objective, *(getattr(objective, name, None) for name in _OF_OBJECTIVES))
    has_settings = isinstance(getattr(objective, "settings", None), dict)
    if isinstance(objective, type) or not has_settings or not all(map(callable, parts)):
        fail(
            "fit",
            "objective",
            "an objective: a subclass of fv.Objective, or with all of its methods",
            objective,
            "Use fv.JointObjective() or fv.TaskObjective().",
        )
    if output is not None and not isinstance(output, (str, os.PathLike)):
        fail("fit", "output", "the path of a folder, or None", output)


def checked_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as plain numbers and words; numpy's become Python's."""
    settings = dict(given)
    bounds = {"epochs": (1, _MOST), "batch_size": (1, _MOST), "workers": (0, _MOST), "seed": (0, 2**32 - 1)}
    for name, (low, high) in bounds.items():
        settings[name] = check_count("fit", name, settings[name], low, high)
    for name in ("lr", "weight_decay", "warmup_epochs", "clip_grad"):
        if settings[name] is None and name == "clip_grad":
            continue
        settings[name] = check_number("fit", name, settings[name], 0)
        if settings[name] == 0 and name in ("lr", "clip_grad"):
            fail("fit", name, "above 0", settings[name])
    for name in ("opt", "sched", "mixed_precision"):
        if not isinstance(settings[name], str):
            fail("fit", name, "a name", settings[name])
    check_choice("mixed_precision", settings["mixed_precision"], ("no", "bf16", "fp16"))
    if settings["sched"] not in SCHEDULES:
        raise ValueError(
            f"fit: argument `sched` must be one of {', '.join(SCHEDULES)}, but it is {settings['sched']!r}."
        )
    return settings


def check_batch(settings: dict[str, Any]) -> None:
    """A step needs a full batch in each process."""
    batch, processes, images = settings["batch_size"], settings["processes"], settings["images"]
    if images < batch * processes:
        most = images // processes
        remedy = f"Lower batch_size to at most {most}." if most else "Pass more images, or use fewer processes."
        raise ValueError(
            f"fit: train_data has {images} images, fewer than one step takes (batch_size {batch}, {processes} "
            f"process{'es' if processes > 1 else ''}). {remedy}"
        )
