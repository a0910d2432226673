"""The networks that are trained here, as arguments of `fv.SelfExplainingClassifier`: patches of both can vote."""

from __future__ import annotations

from typing import Any


def vit(img_size: int, model_name: str = "vit_tiny_patch16_224", **sizes: Any) -> dict[str, Any]:
    """A vision transformer whose patches are averaged before a linear classifier."""
    averaged = {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return {"model_name": model_name, "img_size": img_size, "model_kwargs": sizes | averaged}


def cnn(img_size: int, **sizes: Any) -> dict[str, Any]:
    """A residual network without batch norm."""
    return {"model_name": "nf_resnet26", "img_size": img_size, "model_kwargs": sizes}
