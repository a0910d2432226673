"""Saving and loading a self-explaining model: a folder, or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from safetensors import SafetensorError
from torch import Tensor, nn

from fastshap_kernels._checks import fail

from .._checks import shortened
from .._modes import evaluation_mode
from ..games.base import Game
from ..games.probe import probe_images
from ..images.preprocessing import Preprocessing
from .arguments import check_name, checked_model_kwargs, checked_size
from .backbone import check_unchanged, timm_arguments
from .file import (
    CONFIG,
    WEIGHTS,
    Header,
    Probe,
    check_description,
    check_probe,
    check_size,
    find_file,
    read_config,
    read_header,
    read_weights,
    write_weights,
)
from .refine import Calibration

if TYPE_CHECKING:
    from typing_extensions import Self


class Pretrained(nn.Module, PyTorchModelHubMixin):
    """What saves and loads a model whose constructor takes what `config` holds; subclasses are that model."""

    backbone: nn.Module
    head: nn.Module
    game: Game
    num_classes: int
    _hub_mixin_config: dict[str, Any]
    _preprocessing: Preprocessing | None
    _calibration: Calibration | None

    @property
    def config(self) -> dict[str, Any]:
        """The JSON-able constructor arguments, as saved beside the weights."""
        return dict(self._hub_mixin_config)

    @property
    def preprocessing(self) -> Preprocessing | None:
        return self._preprocessing

    @preprocessing.setter
    def preprocessing(self, value: Preprocessing | None) -> None:
        if value is not None and value.input_size != self.game.input_size:
            raise ValueError(
                f"Argument `preprocessing` must have the model's input_size {self.game.input_size}, but it has "
                f"{value.input_size}. Change its input_size, or create the model for that size."
            )
        self._preprocessing = value
        self._hub_mixin_config["preprocessing"] = None if value is None else value.as_dict()

    @property
    def calibration(self) -> Calibration | None:
        """How wrong explanations are, and so their standard errors; saved with the model."""
        return self._calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        if value is not None and len(value.variance) != self.num_classes:
            fail("SelfExplainingClassifier", "calibration", f"one of {self.num_classes} classes", len(value.variance))
        self._calibration = value
        self._hub_mixin_config["calibration"] = None if value is None else value.as_dict()

    def null_value(self) -> Tensor:
        """v(∅): (K,)."""
        raise NotImplementedError

    def check_saveable(self) -> None:
        """Whether a saved model could be loaded again; saving makes sure of it, training may before it starts.

        Raises:
            ValueError: where the backbone is not what its arguments describe, such as one with replaced layers.
        """
        check_unchanged(self)
        described = ("model_name", "num_classes", "img_size", "model_kwargs")
        name, outputs, size, kwargs = (self._hub_mixin_config[key] for key in described)
        arguments = timm_arguments(name, outputs, size, kwargs)
        check_description(self.backbone, name, arguments, probe_images(self.backbone, self.game.input_size))

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Writes config.json and model.safetensors, which `from_pretrained` reads; options are the Hub's.

        The answers of the model to two fixed images are kept with the weights, and compared on loading.

        Args:
            save_directory: the folder, which is made where there is none.
            options: of the Hub, such as push_to_hub.

        Raises:
            ValueError: where the backbone is not what its arguments describe; nothing is written then.

        Example:
            >>> model.save_pretrained("explained")
            >>> fv.SelfExplainingClassifier.from_pretrained("explained").grid
            (3, 3)
        """
        self.check_saveable()
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        write_weights(self, save_directory, self._probe())

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        map_location: str | torch.device = "cpu",
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        token: str | bool | None = None,
        **arguments: Any,
    ) -> Self:
        """Loads what `save_pretrained` wrote, from a folder or the Hub, in evaluation mode.

        It has the dtype that it was saved in. No pickle is ever read, and no backbone larger than the file is built.

        Args:
            pretrained_model_name_or_path: a folder, or the name of a model on the Hub.
            map_location: the device of the model.
            revision, cache_dir, force_download, local_files_only, token: as in `huggingface_hub.hf_hub_download`.
            arguments: of `SelfExplainingClassifier`, in place of those that were saved.

        Returns:
            the model.

        Raises:
            ValueError: for what can't be found or read, or is another model than the one that was saved.

        Example:
            >>> model.save_pretrained("explained")
            >>> loaded = fv.SelfExplainingClassifier.from_pretrained("explained")
            >>> torch.allclose(loaded.explain(images).values, model.explain(images).values, atol=1e-5)
            True
        """
        name = str(pretrained_model_name_or_path)
        known = [key for key in cls._hub_mixin_init_parameters if key != "self"]
        for argument in arguments:
            if argument not in known:
                raise TypeError(f"from_pretrained: there is no argument `{argument}`. Pass one of {', '.join(known)}.")
        hub: dict[str, Any] = {
            "revision": revision,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
            "token": token,
        }
        try:
            config = read_config(find_file(name, CONFIG, hub))
            path = find_file(name, WEIGHTS, hub)
            header = read_header(path)
            model = cls._build({key: config[key] for key in config if key in known} | arguments, header)
            read_weights(model, path, header, map_location)
            if header.probe is not None:
                check_probe(model._probe(), header.probe, next(model.parameters()).dtype)
        except (SafetensorError, OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"The checkpoint {name!r} can't be read: {shortened(error).rstrip('.')}. It must be a folder written "
                f"by save_pretrained ({CONFIG}, {WEIGHTS}), or the name of a model on the Hub."
            ) from error
        return model.eval()

    @classmethod
    def _build(cls, arguments: dict[str, Any], header: Header) -> Self:
        """The model of a configuration that comes from elsewhere: its types and size are checked first."""
        if "scores.texts" in header.shapes and "texts" not in cls._hub_mixin_init_parameters:
            raise ValueError("it scores texts: load it with fastshap_vision.ImageTextClassifier.from_pretrained")
        if "model_name" not in arguments:
            raise ValueError(f"{CONFIG} has no `model_name`")
        try:
            name, classes = arguments["model_name"], arguments.get("num_classes", 1000)
            size, kwargs = checked_size(arguments.get("img_size")), checked_model_kwargs(arguments.get("model_kwargs"))
            for key in ("backbone", "pretrained"):
                if arguments.get(key):
                    raise ValueError(f"`{key}` must be null or false, but it is {arguments[key]!r}")
            check_name(name, classes)
            check_size(name, timm_arguments(name, classes, size, kwargs), header)
            return cls(**arguments)
        except Exception as error:  # whatever a model raises that nobody would build
            raise ValueError(f"{CONFIG} describes no model of these weights: {error}") from error

    @torch.no_grad()
    def _probe(self) -> Probe:
        """What the model answers to two fixed images, whatever autocast is on."""
        images = probe_images(self.backbone, self.game.input_size)
        with evaluation_mode(self), torch.autocast(images.device.type, enabled=False):
            features, logits = self.game.features_and_logits(images)
            values = self.head(features, logits, self.null_value())
        return Probe(features.last.mean(1), logits, values[..., 0])
