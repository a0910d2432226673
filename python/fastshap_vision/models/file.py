"""What a saved model says of itself, so that loading it gives the same model or an error.

`config.json` holds the constructor's arguments, `model.safetensors` the weights and, in its header, the answers of the
model that was saved to two fixed images.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import safetensors
import timm
import torch
from accelerate import init_empty_weights
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from .._modes import evaluation_mode
from .arguments import LARGEST

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
PROBE = "fastshap.probe"
#: Relative difference (of L2 norms) between two computations of one model on other devices, by its dtype.
_ROUNDING = {torch.float64: 0.02, torch.float32: 0.02, torch.bfloat16: 0.1, torch.float16: 0.1}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_description(backbone: nn.Module, name: str, arguments: Mapping[str, Any], images: Tensor) -> None:
    """Whether timm makes this model from its name and arguments: the same modules, shapes and logits of `images`.

    No weight is copied.

    Raises:
        ValueError: where something differs; it names the first.
    """
    described = _made_anew(name, arguments)
    for kind, list_parts in (("module", _modules), ("weight", _shapes)):
        ours, theirs = list_parts(backbone), list_parts(described)
        for part in [*ours, *(part for part in theirs if part not in ours)]:
            if ours.get(part) != theirs.get(part):
                was, made = ours.get(part, "absent"), theirs.get(part, "absent")
                raise _cannot_save(f"the {kind} {part or 'itself'!r} is {was}, and would be loaded as {made}")
    described.load_state_dict(backbone.state_dict(), assign=True)
    known = dict(backbone.named_buffers())
    for part, buffer in described.named_buffers():
        buffer.data = buffer.to(known[part]) if part in known else buffer.to(images.device)
    with torch.no_grad(), torch.autocast(images.device.type, enabled=False):
        with evaluation_mode(backbone):
            ours = backbone(images)
        if not _is_near(described.eval()(images), ours):
            raise _cannot_save("its logits are others than those of the model that would be loaded")


def _made_anew(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The described model, where timm can without memory for its weights, which are going to be replaced."""
    with torch.random.fork_rng(devices=[]):
        try:
            with init_empty_weights(include_buffers=False):
                model = timm.create_model(name, **arguments)
            if not any(buffer.is_meta for buffer in model.buffers()):
                return model
        except Exception:  # a Swin V2 computes with its weights, as others do for their buffers
            pass
        try:
            return timm.create_model(name, **arguments)
        except Exception as error:  # whatever a timm model raises for arguments that it does not know
            raise _cannot_save(f"timm can't make {name!r} with {dict(arguments)}: {error}") from error


def _cannot_save(reason: str) -> ValueError:
    return ValueError(
        f"The model can't be saved so that it can be loaded, since its arguments don't describe it: {reason}. Create "
        "the backbone by arguments of timm.create_model and convert it again, or save model.state_dict() and build the "
        "model as you did."
    )


def _modules(model: nn.Module) -> dict[str, str]:
    """Each module as it prints; batch norms alike whether or not they synchronise."""
    printed = {part: f"{type(module).__name__}({module.extra_repr()})" for part, module in model.named_modules()}
    return {part: re.sub(r"^(Sync)?BatchNorm(Act)?(\dd)?\(", r"BatchNorm\2(", text) for part, text in printed.items()}


def _shapes(model: nn.Module) -> dict[str, str]:
    return {part: str(tuple(tensor.shape)) for part, tensor in model.state_dict().items()}


class Probe(NamedTuple):
    """What a model answers to two fixed images."""

    features: Tensor  # (2, L), the mean over the patches
    logits: Tensor  # (2, K)
    values: Tensor  # (2, P), Shapley values of class 0

    def as_text(self) -> str:
        rows = {name: part.double().cpu().tolist() for name, part in self._asdict().items()}
        return json.dumps({name: [[float(f"{x:.8g}") for x in row] for row in part] for name, part in rows.items()})


def check_probe(found: Probe, text: str, dtype: torch.dtype) -> None:
    """Compares with what was kept when the model was saved.

    Raises:
        ValueError: for a difference that rounding on another device does not explain, or a probe that can't be read.
    """
    try:
        kept = Probe(**{name: torch.tensor(rows, dtype=torch.float64) for name, rows in json.loads(text).items()})
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"the probe in its header can't be read ({error})") from error
    for name, ours, theirs in zip(Probe._fields, found, kept, strict=True):
        if not _is_near(ours, theirs, _ROUNDING.get(dtype, 0.1)):
            raise ValueError(
                f"it answers other {name} to the images kept with it than the model that was saved, so that model was "
                "another one. Build the model as its author did, load the weights into it, and save it again"
            )


def _is_near(found: Tensor, expected: Tensor, rounding: float = 0.005) -> bool:
    """Within rounding, as a vector; NaN where the other is NaN."""
    if found.shape != expected.shape:
        return False
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    finite = expected.isfinite()
    if not torch.equal(found.isfinite(), finite):
        return False
    found, expected = found[finite], expected[finite]
    return bool((found - expected).norm() <= rounding * expected.norm())


def find_file(model_id: str, name: str, options: Mapping[str, Any]) -> str:
    """One of the two files of a model, in a folder or on the Hub; never a pickle.

    Raises:
        ValueError: where it is not there.
    """
    if Path(model_id).is_dir():
        if (Path(model_id) / name).is_file():
            return str(Path(model_id) / name)
    else:
        try:
            return hf_hub_download(repo_id=model_id, filename=name, **options)
        except LocalEntryNotFoundError as error:  # also where the Hub can't be reached
            raise ValueError(f"there is no such folder, and the Hub can't give it: {error}") from error
        except EntryNotFoundError:
            pass
        except (HFValidationError, HfHubHTTPError, OSError) as error:
            raise ValueError(f"there is no such folder, and the Hub says: {error}") from error
    raise ValueError(f"it has no {name} (pickles, such as pytorch_model.bin, are never loaded)")


def read_config(path: str | Path) -> dict[str, Any]:
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} must hold an object, but it holds a {type(config).__name__}")
    return config


def write_weights(model: nn.Module, folder: Path, probe: Probe) -> None:
    save_model(model, str(folder / WEIGHTS), {"format": "pt", PROBE: probe.as_text()})


class Header(NamedTuple):
    """What a file of weights says before any is read."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]
    probe: str | None  # None in files from before there was one, and in those that other programs wrote


def read_header(path: str | Path) -> Header:
    """Reads the names, shapes and dtypes of a file of weights, and its probe."""
    with safetensors.safe_open(str(path), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
        dtypes = {name: _DTYPES[part.get_dtype()] for name, part in slices.items() if part.get_dtype() in _DTYPES}
        return Header(shapes, dtypes, (file.metadata() or {}).get(PROBE))


def check_size(name: str, arguments: Mapping[str, Any], header: Header) -> None:
    """Whether the weights in a file are those of the model described, before memory is taken for that model.

    Raises:
        ValueError: for a model of other shapes, or of far more weights than the file holds.
    """
    for key, number in _numbers(arguments):
        if key != "num_classes" and abs(number) > LARGEST:
            raise ValueError(f"`model_kwargs` has {key}={number}, past the largest allowed, {LARGEST}")
    # Twice, since some models make a layer and then another in its place.
    left = 2 * sum(torch.Size(shape).numel() for shape in header.shapes.values())

    def count(module: nn.Module, part: str, parameter: Tensor | None) -> None:
        nonlocal left
        left -= 0 if parameter is None else parameter.numel()
        if left < 0:
            raise ValueError(f"{name!r} with {dict(arguments)} has far more weights than the file holds")

    handle = register_module_parameter_registration_hook(count)
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            empty = timm.create_model(name, **arguments)
    except Exception as error:  # whatever a timm model raises for arguments that it does not know
        raise ValueError(f"timm can't make {name!r} with {dict(arguments)}: {type(error).__name__}: {error}") from error
    finally:
        handle.remove()
    for part, tensor in empty.state_dict().items():
        shape = header.shapes.get(f"backbone.{part}")
        if shape is not None and shape != tuple(tensor.shape):
            raise ValueError(
                f"`backbone.{part}` is {shape} in the file, but {tuple(tensor.shape)} by the configuration"
            )


def _numbers(value: Any, key: str = "") -> Iterable[tuple[str, int]]:
    """The whole numbers in JSON-able arguments, with the names that they stand under."""
    if isinstance(value, Mapping):
        return chain.from_iterable(_numbers(inner, str(name)) for name, inner in value.items())
    if isinstance(value, list | tuple):
        return chain.from_iterable(_numbers(inner, key) for inner in value)
    return [(key, value)] if isinstance(value, int) else []


def read_weights(model: nn.Module, path: str | Path, header: Header, device: str | torch.device) -> None:
    """Fills a model, which takes the dtypes that were saved."""
    if header.dtypes:  # that of most, also for what is not saved, such as rotary tables
        model.to(Counter(header.dtypes.values()).most_common(1)[0][0])
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(header.dtypes.get(name, tensor.dtype))
    load_model(model.to(device), str(path), strict=True, device=str(device))
