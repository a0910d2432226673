"""A run's folder: how the command line trained a model, and what it needs to use it again."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .._files import write_whole
from ..data import datasets
from ..data.timm_datasets import is_by_timm
from ..images.preprocessing import Preprocessing
from ..models.self_explaining import SelfExplainingClassifier
from .agreement import of_main
from .callbacks import Callback, RunStart
from .checkpoint import whole_checkpoints

RUN = "run.json"

VISION_PACKAGES = ("accelerate", "safetensors", "torchvision", "huggingface_hub")
VERSIONS = ("fastshap-kernels", "torch", "timm", *VISION_PACKAGES)


class Run(NamedTuple):
    """A finished or running training run, read from its folder."""

    model: SelfExplainingClassifier
    device: torch.device
    preprocessing: Preprocessing
    classes: tuple[str, ...]
    arguments: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, device: torch.device | None) -> Run:
        path = folder / RUN
        try:
            preprocessing, classes, arguments = _checked(json.loads(path.read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"argument --checkpoint: there is no run in {str(folder)!r} (no {RUN}). Pass the folder that "
                "fastshap train --output wrote."
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            what = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{str(path)!r} is no record of fastshap train ({what}). Train again, or restore the file."
            ) from error
        if not (folder / "model.safetensors").is_file():
            raise ValueError(f"the run in {str(folder)!r} has not finished its first epoch. Wait, or train again.")
        chosen = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model = SelfExplainingClassifier.from_pretrained(str(folder)).to(chosen).eval()
        return cls(model, chosen, preprocessing, classes, arguments)

    @property
    def data_dir(self) -> Path | None:
        found = self.arguments["data_dir"]
        return None if found is None else Path(found)

    def dataset(self, split: str, data_dir: Path | None = None) -> Any:
        """The run's own data as they are, not augmented, or the same kind of data from another folder."""
        arguments = self.arguments | {"data_dir": data_dir or self.data_dir}
        found = dataset_of(arguments, split, self.preprocessing, augment=False)
        if found.classes != self.classes:
            raise ValueError(
                f"the data has the classes {', '.join(found.classes[:5])}… ({len(found.classes)}), but the model was "
                f"trained for {', '.join(self.classes[:5])}… ({len(self.classes)}). Pass the data it was trained on."
            )
        return found

    def class_index(self, name: str) -> int:
        """A class by its name, or by its number."""
        if name in self.classes:
            return self.classes.index(name)
        if name.isdecimal() and int(name) < len(self.classes):
            return int(name)
        close = difflib.get_close_matches(name, self.classes, 3) or self.classes[:5]
        raise ValueError(
            f"argument --target-class: there is no class {name!r} among {len(self.classes)}. Try {', '.join(close)}."
        )


def dataset_of(
    arguments: Mapping[str, Any], split: str, preprocessing: Preprocessing, augment: bool | Mapping[str, Any] | None
) -> Any:
    """The "train" or "test" split of the data that a command's arguments name, by whatever name these have for it."""
    flag = {"train": "train_split", "test": "val_split"}[split]
    default = {"train": "train", "test": "validation" if is_by_timm(arguments["dataset"]) else "test"}[split]
    more = {name: arguments.get(name) for name in ("input_key", "target_key", "download", "resize")}
    return datasets.load_dataset(
        arguments["dataset"],
        arguments.get(flag) or default,
        data_dir=arguments["data_dir"],
        preprocessing=preprocessing,
        augment=augment,
        class_map=arguments.get("class_map"),
        **{name: value for name, value in more.items() if value},
    )


def _checked(record: Any) -> tuple[Preprocessing, tuple[str, ...], dict[str, Any]]:
    """Preprocessing, classes and arguments of a run's record."""
    classes, arguments = record["classes"], record["arguments"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    if not datasets.is_known(arguments["dataset"]) or not isinstance(arguments["model"], str):
        raise ValueError("its dataset or model is unknown")
    if not isinstance(arguments["data_dir"], (str, type(None))):
        raise ValueError("its data folder is no path")
    return Preprocessing.from_dict(record["preprocessing"]), tuple(classes), arguments


class RunRecord(Callback):
    """Writes the record of a new run: what explain and evaluate need to know, and what a reader wants to know.

    It is written where the run starts, when no other can write into the folder.

    Args:
        options: of the command.
        data: that are trained on.

    Raises:
        ValueError: the folder holds a file of that name that is no such record.
    """

    def __init__(self, options: argparse.Namespace, data: Any) -> None:
        hidden = ("command", "name", "parser")
        arguments = {name: value for name, value in vars(options).items() if name not in hidden}
        for name in ("data_dir", "class_map"):
            if arguments.get(name) is not None:
                arguments[name] = arguments[name].resolve()
        self.content = {
            "arguments": arguments,
            "classes": data.classes,
            "preprocessing": data.preprocessing.as_dict(),
            "versions": {name: version(name) for name in VERSIONS},
        }
        _check_own(options.output / RUN)

    def on_start(self, start: RunStart) -> None:
        of_main(lambda: self._write(start.output))

    def _write(self, output: Path | None) -> None:
        if output is not None and not whole_checkpoints(output):
            _check_own(output / RUN)
            write_whole(output / RUN, (json.dumps(self.content, indent=2, default=str) + "\n").encode())


def _check_own(path: Path) -> None:
    """There is no such file, or it is a run's record."""
    try:
        _checked(json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"argument --output: {str(path)!r} exists, and fastshap train did not write it. Choose another folder."
        ) from None
