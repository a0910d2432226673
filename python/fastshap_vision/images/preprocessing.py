"""How pictures become a model's input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import PretrainedCfg
from torch import Tensor, nn
from torchvision.transforms import Compose, PILToTensor, Resize, v2

from fastshap_kernels._checks import check_count, fail

from .._checks import check_choice
from .decode import read_image
from .normalise import Normalised

LARGEST_SIZE = 16384  # pixels a side: what is more is a mistake, and would take all memory
LARGEST_CROP = 1.25
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a model's input: JSON-able, so that a checkpoint can keep it.

    Args:
        input_size: (C, H, W) of the model's input; C is 1 (greyscale) or 3 (RGB).
        mean, std: per channel, for pixels in [0, 1]; finite, std above 0.
        crop_pct: the share of the resized image that the centre crop keeps, as in timm, above 0. Above 1, as of timm's
            VOLO models, at most 1.25, a black border is left.
        interpolation: how pictures are resized: "nearest", "bilinear", "bicubic", "box", "hamming" or "lanczos".
        crop_mode: as in timm: "center" resizes the shorter side and crops; "squash" resizes both sides; "border"
            resizes the longer side and fills the rest with the mean colour.

    Raises:
        ValueError: for values out of their range.

    Example:
        >>> preprocessing = fv.Preprocessing((1, 8, 8), mean=(0.5,), std=(0.25,))
        >>> fv.Preprocessing.from_dict(preprocessing.as_dict()) == preprocessing
        True
    """

    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float = 1.0
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        size = self.input_size
        if not isinstance(size, (tuple, list)) or len(size) != 3 or size[0] not in (1, 3):
            fail("Preprocessing", "input_size", "(C, H, W) with C 1 or 3", size)
        channels, height, width = (check_count("Preprocessing", "input_size", side, 1, LARGEST_SIZE) for side in size)
        (share,) = _numbers("Preprocessing", "crop_pct", [self.crop_pct], (1,), above_0=True)
        if share > LARGEST_CROP:
            fail("Preprocessing", "crop_pct", f"a number above 0, and {LARGEST_CROP} at most", self.crop_pct)
        check_choice("interpolation", self.interpolation, INTERPOLATIONS)
        check_choice("crop_mode", self.crop_mode, CROP_MODES)
        found = {
            "input_size": (channels, height, width),
            "mean": _numbers("Preprocessing", "mean", self.mean, (size[0],)),
            "std": _numbers("Preprocessing", "std", self.std, (size[0],), above_0=True),
            "crop_pct": share,
        }
        for name, value in found.items():  # as plain numbers in tuples, whatever they came in
            object.__setattr__(self, name, value)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Preprocessing:
        """What `as_dict` gave, whether or not it was written as JSON in between."""
        names = {field.name for field in fields(cls)}
        if not isinstance(record, Mapping) or set(record) != names:
            got = sorted(map(str, record)) if isinstance(record, Mapping) else record
            fail("Preprocessing.from_dict", "record", f"a dict of {', '.join(sorted(names))}", got)
        return cls(**record)

    @classmethod
    def of_model(
        cls, model: str | nn.Module, img_size: int | tuple[int, int] | None = None, in_chans: int | None = None
    ) -> Preprocessing:
        """How timm prepares pictures for one of its models, as `timm.data.resolve_data_config` says.

        At the larger size that timm tests some models with, its crop for that size.

        Args:
            model: a timm model, or the name of one, with the tag of its weights ("resnet50.a1_in1k") or without.
            img_size: image size in pixels, one number or (H, W); default the model's.
            in_chans: 1 (greyscale) or 3; default the model's. Statistics of three channels are averaged to one's.

        Raises:
            ValueError: for a name that timm does not know, a model that it did not make, or sizes out of range.

        Example:
            >>> found = fv.Preprocessing.of_model("resnet50.a1_in1k")
            >>> found.input_size, found.crop_pct, found.interpolation
            ((3, 224, 224), 0.95, 'bicubic')
        """
        config = _config_of(model)
        channels, height, width = config["input_size"]
        if img_size is not None:
            height, width = img_size if isinstance(img_size, (tuple, list)) else (img_size, img_size)
        tested = config.get("test_input_size")
        is_tested = tested is not None and (height, width) == tuple(tested[1:]) != tuple(config["input_size"][1:])
        found = resolve_data_config(pretrained_cfg=config, use_test_size=is_tested)
        size = (in_chans or channels, height, width)
        mean, std = (of_channels(name, found[name], size[0]) for name in ("mean", "std"))
        return cls(size, mean, std, found["crop_pct"], found["interpolation"], found["crop_mode"])

    def transform(
        self, augment: bool | Mapping[str, Any] = False, resize: str = "pillow"
    ) -> Callable[[Image.Image], Tensor]:
        """timm's transform from a PIL image to a normalised tensor (C, H, W).

        Args:
            augment: whether it is that of training, with random changes; or arguments of `timm.data.create_transform`
                for it, such as auto_augment and re_prob.
            resize: "pillow", as timm does; or "torch", of images that are not augmented: faster, and a few pixels
                (without AVX2, many) differ by up to two of 255 levels.
        """
        options = {"mean": self.mean, "std": self.std, "interpolation": self.interpolation}
        if augment or isinstance(augment, Mapping):
            more = dict(augment) if isinstance(augment, Mapping) else {}
            try:
                return create_transform(self.input_size, is_training=True, **options | more)
            except (TypeError, AssertionError, ValueError, KeyError) as error:
                fail("Preprocessing.transform", "augment", f"arguments of timm.data.create_transform ({error!r})", more)
        crop = {"crop_pct": self.crop_pct, "crop_mode": self.crop_mode}
        found = create_transform(self.input_size, **crop, **options, normalize=False)
        steps = _of_tensors(found.transforms) if resize == "torch" else found.transforms
        return Compose([*steps, Normalised(self.mean, self.std)])

    @property
    def mode(self) -> str:
        """Of the PIL images that `transform` takes."""
        return "L" if self.input_size[0] == 1 else "RGB"

    def load(self, path: str | Path) -> Tensor:
        """Reads an image file as a normalised tensor (C, H, W): upright, transparency as white, 16 bits as 8."""
        return self.transform()(read_image(path, self.mode))

    def restore(self, images: Tensor) -> Tensor:
        """The inverse of the normalisation: pixels in [0, 1], for pictures."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        return (images * std + mean).clamp(0, 1)


def _config_of(model: object) -> dict[str, Any]:
    """timm's configuration of a model's weights; its defaults for an architecture that has none."""
    if isinstance(model, str) and timm.is_model(model):
        try:
            return (timm.get_pretrained_cfg(model) or PretrainedCfg()).to_dict()
        except RuntimeError:  # weights that it does not know
            pass
    elif isinstance(model, nn.Module) and isinstance(getattr(model, "pretrained_cfg", None), Mapping):
        return PretrainedCfg().to_dict() | dict(model.pretrained_cfg)  # type: ignore[arg-type]
    fail("Preprocessing.of_model", "model", "a timm model, or the name of one", model, "See timm.list_models().")


def _of_tensors(steps: list[Any]) -> list[Any]:
    """timm's steps after a picture has become uint8 (C, H, W), which torchvision's second version resizes as such."""
    found: list[Any] = [PILToTensor()]
    for step in steps:
        is_resize = isinstance(step, Resize)
        found.append(v2.Resize(step.size, step.interpolation, antialias=True) if is_resize else step)
    return found


def of_channels(argument: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Fits the statistics to the channels: one channel's are repeated, three are averaged to one."""
    found = _numbers("load_dataset", argument, values, (1, 3), above_0=argument == "std")
    return found if len(found) == channels else (sum(found) / len(found),) * channels


def _numbers(
    op: str, argument: str, values: Iterable[float], counts: tuple[int, ...], above_0: bool = False
) -> tuple[float, ...]:
    """As many finite numbers as one of the counts."""
    try:
        found = () if isinstance(values, (str, bytes)) else tuple(float(value) for value in values)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        found = ()
    if len(found) not in counts or not all(math.isfinite(value) and (value > 0 or not above_0) for value in found):
        expected = f"{' or '.join(map(str, counts))} finite number{'s' if counts != (1,) else ''}"
        fail(op, argument, expected + (" above 0" if above_0 else ""), values)
    return found
