"""Making a timm model self-explaining."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastshap_kernels._checks import fail

from .._checks import check_choice
from ..games.base import UnsupportedModelError
from ..images.preprocessing import Preprocessing
from .backbone import describe_model, project_by_identity
from .image_text import ImageTextClassifier
from .self_explaining import SelfExplainingClassifier


def convert(
    model: nn.Module,
    *,
    img_size: int | tuple[int, int] | None = None,
    head: str = "shares",
    base: str | None = None,
    head_depth: int = 1,
    head_width: int | None = None,
    intermediates: bool = False,
    backbone_gradient: float | None = None,
    removal: str | None = None,
    preprocessing: dict[str, Any] | Preprocessing | None = None,
    texts: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    logit_bias: float | Tensor | None = None,
) -> SelfExplainingClassifier:
    """Makes a timm model, trained or not, self-explaining. The model itself becomes the backbone: no copy is made.

    With head="shares" (the default) its logits stay bit-identical.

    Args:
        model: made by `timm.create_model`, from arguments that JSON can hold.
        img_size: image size in pixels, one number or (H, W), of a model that takes any; default timm's. Others have
            the size that they were created for.
        head, base, head_depth, head_width, intermediates, backbone_gradient, removal, preprocessing: as in
            `SelfExplainingClassifier`.
        texts, logit_scale, logit_bias: of an image tower, such as CLIP's, whose outputs are an embedding: what it
            explains are its scores of these texts, (K, D); as in `ImageTextClassifier`, which is then returned. A
            tower without a projection (num_classes=0, as SigLIP's) gets the identity as one.

    Returns:
        the self-explaining model; `model` is its `backbone`.

    Raises:
        UnsupportedModelError: for a model that timm did not make, or a family that has no game.
        ValueError: for an image size that the model can't take, or a model made from arguments that can't be saved.

    Example:
        >>> classifier = timm.create_model("test_vit", num_classes=10, img_size=48).eval()
        >>> logits = classifier(images)
        >>> torch.equal(fv.convert(classifier)(images), logits)
        True
    """
    if isinstance(model, str):
        shown = model if len(model) <= 100 else f"{model[:100]}…"
        raise UnsupportedModelError(
            f"Argument `model` must be a model, but it is the name {shown!r}.",
            f"Use fv.SelfExplainingClassifier({shown!r}), or pass timm.create_model({shown!r}).",
        )
    name = (getattr(model, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise UnsupportedModelError(
            f"Argument `model` must be made by timm.create_model, but it is a {type(model).__name__} without timm's "
            "configuration."
        )
    if texts is None and (logit_scale is not None or logit_bias is not None):
        given = "logit_bias" if logit_scale is None else "logit_scale"
        fail("convert", given, "given with `texts`, whose scores it belongs to", logit_scale or logit_bias)
    if texts is not None:
        check_choice("head", head, ("shares",))
        check_choice("base", base, (None, "even"))
        project_by_identity(model)
    arguments = describe_model(model)
    outputs = arguments.pop("num_classes", 1000)
    options: dict[str, Any] = {
        "img_size": img_size,
        "head_depth": head_depth,
        "head_width": head_width,
        "intermediates": intermediates,
        "backbone_gradient": backbone_gradient,
        "removal": removal,
        "model_kwargs": arguments,
        "preprocessing": preprocessing,
        "backbone": model,
    }
    if texts is None:
        return SelfExplainingClassifier(name, outputs, head=head, base=base, **options)
    of_texts: dict[str, Any] = {"texts": texts, "logit_scale": logit_scale, "logit_bias": logit_bias}
    of_texts = {key: value for key, value in of_texts.items() if value is not None}
    return ImageTextClassifier(name, outputs, **of_texts, **options)
