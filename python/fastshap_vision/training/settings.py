"""The settings of a run: checks, optimiser."""

from __future__ import annotations

import difflib
import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from timm.optim import (
    create_optimizer_v2,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from torch import nn

from fastshap_kernels._checks import check_count, check_flag, check_number, fail

from .._checks import check_choice
from ..models.self_explaining import SelfExplainingClassifier

_MOST = 2**31 - 1

# timm's schedules that follow the updates; "none" keeps the learning rate.
SCHEDULES = ("cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none")

PRECISIONS = ("no", "bf16", "fp16")

#: The settings that are numbers from 0 on; those that may be None; and what they must be above or below.
_NUMBERS = (
    *("lr", "weight_decay", "warmup_epochs", "clip_grad", "layer_decay", "min_lr", "warmup_lr"),
    *("model_ema_decay", "smoothing", "mixup", "cutmix"),
)
_OPTIONAL = ("clip_grad", "layer_decay", "model_ema_decay")
_ABOVE_0 = ("lr", "clip_grad", "layer_decay")
_BELOW_1 = ("model_ema_decay", "smoothing")

_OF_OBJECTIVES = ("trained", "state_dict", "load_state_dict", "check", "label_classes", "evaluate")


def create_optimizer(model: nn.Module, settings: dict[str, Any]) -> torch.optim.Optimizer:
    opt = settings["opt"]
    try:
        info = get_optimizer_info(opt.lower().split("_")[-1])
    except ValueError as error:
        close = difflib.get_close_matches(opt, list_optimizers(), 3) or ["adamw", "sgd"]
        raise ValueError(f"fit: timm has no optimizer `opt` = {opt!r} ({error}). Try {', '.join(close)}.") from error
    options: dict[str, Any] = {"lr": settings["lr"], "weight_decay": settings["weight_decay"]}
    if settings["opt_betas"] is not None:
        if not info.has_betas:
            fail("fit", "opt_betas", f"None for the optimizer {opt!r}, which has none", settings["opt_betas"])
        options["betas"] = settings["opt_betas"]
    if settings["layer_decay"] is not None:
        options |= {"layer_decay": settings["layer_decay"]} | _layers_of(model, settings)
    try:
        return create_optimizer_v2(model, opt=opt, **options)
    except (ValueError, TypeError, AssertionError, ImportError) as error:
        raise ValueError(
            f"fit: timm can't make the optimizer `opt` = {opt!r} for this model and {', '.join(options)}: {error}. Try "
            "opt='adamw'."
        ) from error


def _layers_of(model: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """How a self-explaining model is cut into layers: timm's of the backbone, and the explainer beside the last one."""
    if not isinstance(model, SelfExplainingClassifier):
        return {}

    def groups(model: SelfExplainingClassifier) -> list[dict[str, Any]]:
        backbone: Any = model.backbone
        decay = settings["weight_decay"]
        kept: set[str] = getattr(backbone, "no_weight_decay", set)()
        found = param_groups_layer_decay(backbone, decay, kept, layer_decay=settings["layer_decay"])
        return found + [group for group in param_groups_weight_decay(model.head, decay) if group["params"]]

    return {"param_group_fn": groups}


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


def checked_checkpoints(steps: Any, output: Any) -> int | None:
    """Updates between two checkpoints."""
    if steps is None:
        return None
    if output is None:
        raise ValueError("fit: argument `checkpoint_steps` needs a folder to write to, but `output` is None. Pass one.")
    return check_count("fit", "checkpoint_steps", steps, 1, _MOST)


def checked_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run as plain numbers and words; numpy's become Python's, and None accelerate's own."""
    of_accelerate = _of_accelerate()
    settings = {name: of_accelerate.get(name) if value is None else value for name, value in given.items()}
    check_flag("fit", "compile", settings["compile"])
    bounds = {"epochs": (1, _MOST), "batch_size": (1, _MOST), "workers": (0, _MOST), "seed": (0, 2**32 - 1)}
    bounds["grad_accum_steps"] = (1, _MOST)
    for name, (low, high) in bounds.items():
        settings[name] = check_count("fit", name, settings[name], low, high)
    for name in _NUMBERS:
        if settings[name] is None and name in _OPTIONAL:
            continue
        settings[name] = value = check_number("fit", name, settings[name], 0)
        if value == 0 and name in _ABOVE_0:
            fail("fit", name, "above 0", value)
        if value >= 1 and name in _BELOW_1:
            fail("fit", name, "below 1", value)
    settings["opt_betas"] = _checked_betas(settings["opt_betas"])
    for name in ("opt", "sched", "mixed_precision"):
        if not isinstance(settings[name], str):
            fail("fit", name, "a name", settings[name])
    check_choice("mixed_precision", settings["mixed_precision"], PRECISIONS)
    if settings["sched"] not in SCHEDULES:
        raise ValueError(
            f"fit: argument `sched` must be one of {', '.join(SCHEDULES)}, but it is {settings['sched']!r}."
        )
    if settings["layer_decay"] is not None and settings["sched"] == "none":
        fail(
            "fit",
            "sched",
            "a schedule where `layer_decay` is given, such as 'constant', which scales the rates",
            "none",
        )
    return settings


def _checked_betas(betas: Any) -> tuple[float, float] | None:
    if betas is None:
        return None
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        fail("fit", "opt_betas", "two numbers from 0 to below 1, or None", betas)
    first, second = (check_number("fit", "opt_betas", beta, 0) for beta in betas)
    if max(first, second) >= 1:
        fail("fit", "opt_betas", "two numbers from 0 to below 1, or None", betas)
    return first, second


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
