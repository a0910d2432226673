"""Calls of fastshap_vision, for the malformed ones: an error must name its argument; what is served is not judged.

Except for values that nothing here takes, such as an object() or a complex number: those must be refused.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timm
import torch

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision import metrics

SMALL = {"img_size": 12, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}


def _backbone() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **SMALL).eval()


@functools.cache
def _model() -> fv.SelfExplainingClassifier:
    model = fv.convert(_backbone()).eval()
    model.calibrate(_images(), coalitions=4)
    return model


class Pictures(torch.utils.data.Dataset):
    """Eight images and their labels."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 12, 12, generator=generator), index % 3


@dataclass(frozen=True)
class VisionCall:
    """A function, and what makes its arguments anew."""

    name: str
    function: Callable[..., Any]
    arguments: Callable[[], dict[str, Any]]

    @property
    def roles(self) -> dict[str, Any]:
        """Its arguments' names."""
        return self.arguments()

    def make(self, rng: random.Random) -> dict[str, Any]:
        """Valid arguments."""
        return self.arguments()

    def is_valid(self, arguments: dict[str, Any]) -> bool | None:
        """False for what nothing takes, None where that is not known."""
        never = (complex, bytes)
        return False if any(type(value) is object or isinstance(value, never) for value in arguments.values()) else None


def _images() -> torch.Tensor:
    return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def _attributions() -> torch.Tensor:
    return torch.randn(2, 9, generator=torch.Generator().manual_seed(1))


def _metric(function: Callable[..., Any], **options: Any) -> VisionCall:
    common = {"game": _model(), "images": _images(), "attributions": _attributions(), "target": 1}
    return VisionCall(function.__name__, function, lambda: common | options)


def _fit(**arguments: Any) -> Any:
    return fv.fit(fv.convert(_backbone()), **arguments)


_FIT = {"epochs": 1, "batch_size": 4, "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "sched": "cosine"}
_FIT |= {"warmup_epochs": 0, "clip_grad": None, "seed": 0, "workers": 0, "mixed_precision": "no"}
_FIT |= {"compile": False, "grad_checkpointing": False, "progress": False, "channels_last": False, "sync_bn": False}
_FIT |= {"fsdp": False}
_FIT |= {"layer_decay": None, "opt_betas": None, "min_lr": 0.0, "warmup_lr": 1e-5, "smoothing": 0.0, "mixup": 0.0}
_FIT |= {"cutmix": 0.0, "model_ema_decay": None, "grad_accum_steps": 1, "checkpoint_hist": 2, "checkpoint_steps": None}
_FIT |= {"keep_best": None, "callbacks": (), "log_with": None, "log_interval": 100}
_EXPLAIN = {"target": 1, "evaluations": 4, "seed": 0}
_RECORD = {"seed": 0, "batch_size": 4, "precision": "same", "workers": 0, "shard": 2, "dtype": None, "store": "values"}
_RECORD |= {"classes": None}
_OBJECTIVE = {"coalitions": 2, "regression_weight": 1.0, "masked_task_weight": 0.0, "error": "uniform", "seed": 0}
_OBJECTIVE |= {"target": "detached", "paired": True, "sizes": "shapley", "top_classes": None}
_OBJECTIVE |= {"regression_ramp": (0.0, 0.5), "masked_task_ramp": (0.0, 0.0), "target_precision": "auto"}
_CONVERT = {"img_size": None, "head": "shares", "base": None, "head_depth": 1, "intermediates": False}
_CONVERT |= {"backbone_gradient": None, "removal": None, "preprocessing": None}
_PIXELS = {"grid": (3, 3), "baseline": "mean", "mean": None, "std": None, "batch": 8, "link": "logit"}
_LOAD = {"name": "digits", "split": "test", "image_size": 12, "in_chans": 3, "mean": None, "std": None, "augment": None}
_MASKS = {"maps": torch.rand(2, 12, 12), "masks": torch.rand(2, 12, 12) < 0.5}


def _coalition_bits() -> torch.Tensor:
    return fk.sample_coalitions(2, 4, 9, seed=0)


#: Every call, by name.
CALLS = {
    call.name: call
    for call in (
        VisionCall("explain", lambda **given: _model().explain(**given), lambda: {"images": _images()} | _EXPLAIN),
        VisionCall("shapley_values", lambda **given: _model().shapley_values(**given), lambda: {"images": _images()}),
        VisionCall(
            "coalition_values",
            lambda **given: _model().coalition_values(**given),
            lambda: {
                "images": _images(),
                "coalitions": _coalition_bits(),
                "max_rows": "auto",
                "precision": "same",
                "progress": False,
            },
        ),
        VisionCall(
            "Coalitions",
            fv.Coalitions,
            lambda: {"bits": _coalition_bits(), "players": 9, "paired": True, "rows": None},
        ),
        VisionCall("convert", fv.convert, lambda: {"model": _backbone()} | _CONVERT),
        VisionCall(
            "evaluate", fv.evaluate, lambda: {"model": _model(), "data": Pictures(), "batch_size": 4, "workers": 0}
        ),
        VisionCall(
            "fidelity",
            fv.fidelity,
            lambda: {
                "model": _model(),
                "images": _images(),
                "reference": "exact",
                "coalitions": 64,
                "seed": 0,
                "batch": 512,
                "progress": False,
            },
        ),
        VisionCall(
            "exact_values",
            fv.exact_values,
            lambda: {"model": _model(), "images": _images(), "batch": 512, "progress": False},
        ),
        VisionCall(
            "kernel_shap_values",
            fv.kernel_shap_values,
            lambda: {
                "model": _model(),
                "images": _images(),
                "coalitions": 64,
                "seed": 0,
                "batch": 512,
                "progress": False,
            },
        ),
        _metric(metrics.insertion, levels=None),
        _metric(metrics.deletion, levels=None),
        _metric(metrics.aopc, signed=True),
        _metric(metrics.log_odds),
        _metric(metrics.removal_curve, order="most", keep=False, levels=None),
        _metric(metrics.sensitivity_n, sizes=(1, 3), subsets=4, seed=0, form="ancona"),
        VisionCall("pointing_game", metrics.pointing_game, lambda: _MASKS | {"tolerance": 1}),
        VisionCall("segmentation", metrics.segmentation, lambda: dict(_MASKS)),
        VisionCall("MaskedImageGame", fv.MaskedImageGame, lambda: {"model": _backbone()} | _PIXELS),
        VisionCall(
            "Preprocessing",
            fv.Preprocessing,
            lambda: {"input_size": (3, 12, 12), "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0},
        ),
        VisionCall("load_dataset", fv.load_dataset, lambda: dict(_LOAD)),
        VisionCall("JointObjective", fv.JointObjective, lambda: dict(_OBJECTIVE)),
        VisionCall(
            "FastSHAPObjective",
            fv.baselines.FastSHAPObjective,
            lambda: {"coalitions": 2, "sizes": "shapley", "paired": True, "seed": 0},
        ),
        VisionCall(
            "record_coalitions",
            fv.record_coalitions,
            lambda: {"model": _model(), "data": Pictures(), "coalitions": 4, "progress": False} | _RECORD,
        ),
        VisionCall("fit", _fit, lambda: {"train_data": Pictures(), "objective": fv.TaskObjective()} | _FIT),
    )
}
