"""The settings of a run: checks, optimiser."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from torch import nn

from fastshap_kernels._checks import check_count, check_flag, check_number, fail

from .._checks import check_choice

_MOST = 2**31 - 1

# timm's schedules that follow the updates; "none" keeps the learning rate.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

PRECISIONS = ("no", "bf16", "fp16")

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


def _of_accelerate() -> dict[str, Any]:
    """What `accelerate launch`, or its variables, say of the arguments that it has too; refused where `fit` can't."""
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    mode = os.environ.get("ACCELERATE_DYNAMO_MODE", "default")
    regions = "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"
    wrong = {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": not steps.isdecimal() or int(steps) < 1,
        "ACCELERATE_MIXED_PRECISION": precision not in PRECISIONS,
        "ACCELERATE_DYNAMO_BACKEND": backend not in ("no", "inductor"),
        "ACCELERATE_DYNAMO_MODE": backend != "no" and mode != "default",
        regions: backend != "no" and parse_flag_from_env(regions),
    }
    for name, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(
                f"fit: accelerate's {name} is {os.environ[name]!r}, which is not supported: a number of steps; "
                f"{', '.join(PRECISIONS)}; the dynamo backends no and inductor, mode default, without regions. Change "
                "it in `accelerate config`, or unset it."
            )
    return {"grad_accum_steps": int(steps), "mixed_precision": precision, "compile": backend == "inductor"}


def checked_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as plain numbers and words; numpy's become Python's, and None accelerate's own."""
    of_accelerate = _of_accelerate()
    settings = {name: of_accelerate.get(name) if value is None else value for name, value in given.items()}
    check_flag("fit", "compile", settings["compile"])
    bounds = {"epochs": (1, _MOST), "batch_size": (1, _MOST), "workers": (0, _MOST), "seed": (0, 2**32 - 1)}
    bounds["grad_accum_steps"] = (1, _MOST)
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
    check_choice("mixed_precision", settings["mixed_precision"], PRECISIONS)
    if settings["sched"] not in SCHEDULES:
        raise ValueError(
            f"fit: argument `sched` must be one of {', '.join(SCHEDULES)}, but it is {settings['sched']!r}."
        )
    return settings


def check_batch(settings: dict[str, Any]) -> None:
    """An update needs full batches in each process."""
    batch, images, processes, steps = (
        settings[name] for name in ("batch_size", "images", "processes", "grad_accum_steps")
    )
    batches = processes * steps
    if images < batch * batches:
        most = images // batches
        remedy = f"Lower batch_size to at most {most}." if most else "Pass more images, or use fewer processes."
        accumulated = f", grad_accum_steps {steps}" if steps > 1 else ""
        raise ValueError(
            f"fit: train_data has {images} images, fewer than one step takes (batch_size {batch}, {processes} "
            f"process{'es' if processes > 1 else ''}{accumulated}). {remedy}"
        )
