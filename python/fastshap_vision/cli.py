"""The command line: fastshap train | train-explainer | explain | evaluate | info, with timm's flag names."""

from __future__ import annotations

import argparse
import difflib
import json
import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import timm
import torch
from accelerate import PartialState
from PIL import Image
from timm.utils import ParseKwargs
from torch import Tensor
from tqdm.contrib.logging import logging_redirect_tqdm

from . import data as datasets
from . import recipe
from .checkpoint import CheckpointError, find_checkpoint, whole_checkpoints
from .classifier import SelfExplainingClassifier, convert
from .explanation import Explanation
from .flags import in_flags
from .memory import keep_freed_memory
from .model_arguments import BASES, HEAD_DEPTHS, HEADS
from .objective import ERRORS, TARGETS, ShapleyObjective
from .played import ExplainerObjective, PlayedGames, play
from .precision import PRECISIONS
from .removal import REMOVALS
from .training import SCHEDULES, TrainingError, evaluate, fit

RUN = "run.json"
GAMES = "games.safetensors"
VISION_PACKAGES = ("accelerate", "safetensors", "torchvision", "huggingface_hub")
VERSIONS = ("fastshap-kernels", "torch", "timm", *VISION_PACKAGES)

#: Who wrote a picture: `explain` replaces its own and no other.
MARK = "fastshap explain"

#: The model, and arguments of timm.create_model, where no model is named: patches must be smaller than a small image.
DEFAULT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("vit_tiny_patch16_224", {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}),
    "cifar10": ("vit_small_patch16_224", {"patch_size": 4}),
    "folder": ("vit_small_patch16_224", {}),
}

# Up to this many players all coalitions of an image are evaluated in seconds; beyond, KernelSHAP estimates.
EXACT_PLAYERS = 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for a mistake in what was asked, 1 for a run that had to stop."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.command(options)
        return 0
    except (ValueError, CheckpointError, ModuleNotFoundError, OSError) as error:
        code, message = 2, str(error)
    except TrainingError as error:
        code, message = 1, str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, message = 1, f"the memory is full ({error}). Lower batch_size, or take smaller images."
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    print(f"{parser.prog} {options.name}: error: {in_flags(message, options.parser)}", file=sys.stderr)
    return code


def train(options: argparse.Namespace) -> None:
    """Trains a model and writes the run's folder."""
    _check_output(options.output)
    _choose_model(options)
    statistics = _statistics(options)
    train_data = _dataset(options, "train", **statistics)
    test_data = _dataset(options, "test", **statistics)
    torch.manual_seed(options.seed)
    model = _build(options, train_data)
    objective = ShapleyObjective(
        options.coalitions,
        options.regression_weight,
        options.masked_task_weight,
        error=options.error,
        target=options.target,
        target_precision=options.target_precision,
        regression_ramp=tuple(options.regression_ramp),
        masked_task_ramp=tuple(options.masked_task_ramp),
        seed=options.seed,
    )
    if PartialState().is_main_process and not whole_checkpoints(options.output):
        _write_run(options, train_data)
    _fit(model, train_data, test_data, objective, options)


def train_explainer(options: argparse.Namespace) -> None:
    """Trains an explainer of a run's model, which stays as it is, and writes a run's folder."""
    if options.output.resolve() == options.checkpoint.resolve():
        raise ValueError("argument --output: the explainer's run needs a folder of its own, not that of --checkpoint.")
    _check_output(options.output)
    find_checkpoint(options.output, options.resume)  # before the games, which take longest
    run = _Run.read(options.checkpoint, PartialState().device)
    if run.model.head != "shares":
        raise ValueError(
            "argument --checkpoint: the run's votes are its explanation already. Pass a run of --head shares."
        )
    options.data_dir = options.data_dir or run.data_dir
    if options.mirror is None:
        options.mirror = run.arguments["dataset"] != "digits"
    train_data, test_data = run.dataset("train", options.data_dir), run.dataset("test", options.data_dir)
    torch.manual_seed(options.seed)
    model = convert(
        run.model.backbone,
        img_size=run.model.game.input_size[1:],
        head_depth=options.head_depth,
        intermediates=options.intermediates,
        removal=run.model.removal,
        preprocessing=run.preprocessing,
    )
    for name, value in recipe.training(model, options.mirror).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if PartialState().is_main_process and not whole_checkpoints(options.output):
        kept = {name: run.arguments[name] for name in ("dataset", "model")}
        _write_run(argparse.Namespace(**kept | vars(options)), train_data)
    played = datasets.WithMirrorImages(train_data) if options.mirror else train_data
    _fit(model, _games(model, played, options), test_data, ExplainerObjective(), options)


def _games(model: SelfExplainingClassifier, data: Any, options: argparse.Namespace) -> PlayedGames:
    """The games of the run: played, and kept in its folder for a run that is resumed."""
    path = options.output / GAMES
    if options.resume and path.exists():
        games = PlayedGames.load(path, data)
        if games.bits.shape[1] != options.coalitions:
            raise ValueError(f"argument --coalitions: the games of this run, {path}, have {games.bits.shape[1]}.")
        return games
    games = play(model, data, options.coalitions, seed=options.seed, workers=options.workers)
    if PartialState().is_main_process:
        games.save(path)
    return games


def _fit(model: SelfExplainingClassifier, train_data: Any, test_data: Any, objective: Any, options: Any) -> None:
    """`fit` as the flags say."""
    keep_freed_memory()
    with _epochs_logged():
        result = fit(
            model,
            train_data,
            test_data,
            objective=objective,
            epochs=options.epochs,
            batch_size=options.batch_size,
            opt=options.opt,
            lr=options.lr,
            weight_decay=options.weight_decay,
            sched=options.sched,
            warmup_epochs=options.warmup_epochs,
            clip_grad=options.clip_grad,
            seed=options.seed,
            workers=options.workers,
            mixed_precision={"float16": "fp16", "bfloat16": "bf16"}[options.amp_dtype] if options.amp else "no",
            compile=getattr(options, "compile", False),
            grad_checkpointing=getattr(options, "grad_checkpointing", False),
            output=options.output,
            resume=options.resume,
        )
    if PartialState().is_main_process:
        print(
            f"accuracy {result.accuracy:.2f} % (best {result.best_accuracy:.2f} %) after {options.epochs} epochs in "
            f"{result.seconds:.0f} s; the run is in {options.output}"
        )


def explain(options: argparse.Namespace) -> None:
    """Writes a picture and the Shapley values of each image."""
    from matplotlib import pyplot

    _check_output(options.output)
    run = _Run.read(options.checkpoint, options.device)
    target = None if options.target_class is None else run.class_index(options.target_class)
    if options.images:
        names = _output_names(options.images)
        images = torch.stack([run.preprocessing.load(path) for path in options.images])
    else:
        rows, images, _ = _examples(run.dataset("test", options.data_dir), options.num_images)
        names = [f"test_{row:05d}" for row in rows]
    _check_overwritten(options.output.resolve(), names, options.images)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, image in zip(names, images.split(1), strict=True):
        explanation = run.model.explain(image.to(run.device), target="all")
        explanation.save(options.output / f"{name}.safetensors")
        pictured = run.preprocessing.restore(image)
        figure, _ = explanation.plot(pictured, target=target, classes=run.classes)
        figure.savefig(options.output / f"{name}.png", metadata={"Software": MARK})
        pyplot.close(figure)
        predicted = int(explanation.predicted)
        share = float(explanation.probabilities[0, predicted])
        print(f"{name}: {run.classes[predicted]} ({share:.0%})")
    print(f"wrote {len(names)} pictures (.png) and Shapley values of every class (.safetensors) to {options.output}")


def evaluate_run(options: argparse.Namespace) -> None:
    """Prints accuracy, and how close the model's Shapley values are to exact or estimated ones."""
    from .fidelity import fidelity

    run = _Run.read(options.checkpoint, options.device)
    test_data = run.dataset("test", options.data_dir)
    accuracy, loss = evaluate(run.model, test_data, options.batch_size, workers=options.workers)
    _, images, _ = _examples(test_data, options.num_images)
    reference = options.reference or ("exact" if run.model.players <= EXACT_PLAYERS else "kernel_shap")
    found = fidelity(
        run.model,
        images.to(run.device),
        reference,
        coalitions=options.coalitions,
        seed=options.seed,
        progress=not options.json and sys.stderr.isatty(),
    )
    if options.json:
        record = {"accuracy": accuracy, "loss": loss, "test_images": len(test_data), "fidelity": found.as_dict()}
        print(json.dumps(record, indent=2))
    else:
        print(f"accuracy {accuracy:.2f} %, cross-entropy {loss:.4f} on {len(test_data)} test images\n\n{found}")


def info(options: argparse.Namespace) -> None:
    """Prints versions and which backends are available."""
    from fastshap_kernels.info import report

    print(report(), end="\n\n")
    for name in VISION_PACKAGES:
        print(f"{name:<16}  {version(name)}")


class _Run(NamedTuple):
    """A finished or running training run, read from its folder."""

    model: SelfExplainingClassifier
    device: torch.device
    preprocessing: datasets.Preprocessing
    classes: tuple[str, ...]
    arguments: dict[str, Any]

    @classmethod
    def read(cls, folder: Path, device: torch.device | None) -> _Run:
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

    def dataset(self, split: str, data_dir: Path | None = None) -> datasets.ArrayImages | datasets.FolderImages:
        """The run's own data as they are, not augmented, or the same kind of data from another folder."""
        channels, size, _ = self.preprocessing.input_size
        found = datasets.load_dataset(
            self.arguments["dataset"],
            split,
            data_dir=data_dir or self.data_dir,
            augment=False,
            image_size=size,
            in_chans=channels,
            mean=self.preprocessing.mean,
            std=self.preprocessing.std,
        )
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


@contextmanager
def _epochs_logged() -> Iterator[None]:
    """Shows one line an epoch on stderr, above the progress bar where there is one."""
    logger, handler = logging.getLogger("fastshap_vision"), logging.StreamHandler()
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        with logging_redirect_tqdm([logger]):
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _checked(record: Any) -> tuple[datasets.Preprocessing, tuple[str, ...], dict[str, Any]]:
    """Preprocessing, classes and arguments of a run's record."""
    classes, arguments = record["classes"], record["arguments"]
    if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
        raise ValueError("its classes are no list of names")
    if arguments["dataset"] not in datasets.DATASETS or not isinstance(arguments["model"], str):
        raise ValueError("its dataset or model is unknown")
    if not isinstance(arguments["data_dir"], (str, type(None))):
        raise ValueError("its data folder is no path")
    return datasets.Preprocessing.from_dict(record["preprocessing"]), tuple(classes), arguments


def _check_output(output: Path) -> None:
    """Before anything is computed: the folder is there, or can be made."""
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"argument --output: {str(nearest)!r} is no folder that can be written to. Choose another.")


def _choose_model(options: argparse.Namespace) -> None:
    """The model that was named, which timm must know, or one that suits the data."""
    if options.model is None:
        options.model, arguments = DEFAULT_MODELS["folder" if options.pretrained else options.dataset]
        options.model_kwargs = arguments | options.model_kwargs
    of_flags = sorted({"num_classes", "img_size", "in_chans", "pretrained"} & options.model_kwargs.keys())
    if of_flags:
        raise ValueError(f"argument --model-kwargs: {of_flags[0]} has a flag of its own. Use it instead.")
    if not timm.is_model(options.model):
        close = difflib.get_close_matches(options.model, timm.list_models(), 3)
        hint = f"Did you mean {', '.join(close)}?" if close else "timm's documentation lists its models."
        raise ValueError(f"argument --model: timm has no model {options.model!r}. {hint}")


def _statistics(options: argparse.Namespace) -> dict[str, Any]:
    """Mean, standard deviation and size as the pretrained weights expect them, where nothing else is asked."""
    config = timm.get_pretrained_cfg(options.model)
    found: dict[str, Any] = {"image_size": options.img_size}
    if config is None:
        return found
    if options.pretrained:
        found |= {"mean": config.mean, "std": config.std}
    if options.img_size is None and (options.pretrained or options.dataset == "folder"):
        found["image_size"] = config.input_size[-1]
    return found


def _dataset(options: argparse.Namespace, split: str, **statistics: Any) -> Any:
    in_chans = options.in_chans or (3 if options.pretrained else None)
    return datasets.load_dataset(
        options.dataset, split, data_dir=options.data_dir, in_chans=in_chans, augment=options.aug, **statistics
    )


def _build(options: argparse.Namespace, data: Any) -> SelfExplainingClassifier:
    channels, size, _ = data.input_size
    try:
        return SelfExplainingClassifier(
            options.model,
            options.num_classes or len(data.classes),
            img_size=size,
            head=options.head,
            base=options.base,
            head_depth=options.head_depth,
            intermediates=options.intermediates,
            backbone_gradient=options.backbone_gradient,
            removal=options.removal,
            pretrained=options.pretrained,
            model_kwargs={"in_chans": channels} | options.model_kwargs,
            preprocessing=data.preprocessing,
        )
    except ValueError:
        raise
    except Exception as error:  # timm's models raise errors of any kind for arguments that don't suit them
        raise ValueError(
            f"timm cannot build {options.model!r} for images {tuple(data.input_size)} with {options.model_kwargs}: "
            f"{error}. Check --model-kwargs and --img-size."
        ) from error


def _write_run(options: argparse.Namespace, data: Any) -> None:
    """What explain and evaluate need to know, and what a reader wants to know."""
    hidden = ("command", "name", "parser")
    arguments = {name: value for name, value in vars(options).items() if name not in hidden}
    if options.data_dir is not None:
        arguments["data_dir"] = options.data_dir.resolve()
    record = {
        "arguments": arguments,
        "classes": data.classes,
        "preprocessing": data.preprocessing.as_dict(),
        "versions": {name: version(name) for name in VERSIONS},
    }
    path = options.output / RUN
    options.output.mkdir(parents=True, exist_ok=True)
    try:
        _checked(json.loads(path.read_text()))
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"argument --output: {str(path)!r} exists, and fastshap train did not write it. Choose another folder."
        ) from None
    path.write_text(json.dumps(record, indent=2, default=str) + "\n")


def _examples(data: Any, count: int) -> tuple[list[int], Tensor, Tensor]:
    """Images spread evenly over the data, which may be sorted by class: their rows, (B, C, H, W), labels (B,)."""
    rows = torch.linspace(0, len(data) - 1, min(count, len(data))).long().tolist()
    images, labels = zip(*(data[row] for row in rows), strict=True)
    return rows, torch.stack(images), torch.tensor(labels)


def _output_names(paths: Sequence[Path]) -> list[str]:
    """A name for each image's files: its own, numbered where two images share it. No two are alike."""
    stems = [path.stem for path in paths]
    taken = Counter(stem.casefold() for stem in stems)  # some file systems tell no upper case from lower
    names = []
    for stem in stems:
        name, number = stem, 0
        while taken[stem.casefold()] > 1 and taken[name.casefold()]:
            name, number = f"{stem}_{number}", number + 1
        taken[name.casefold()] += name != stem
        names.append(name)
    return names


def _check_overwritten(output: Path, names: Sequence[str], inputs: Sequence[Path]) -> None:
    """Before anything is written: an earlier explanation may be replaced, an input or another's file may not."""
    for path in (output / f"{name}{suffix}" for name in names for suffix in (".png", ".safetensors")):
        if path.exists() and (any(path.samefile(image) for image in inputs) or not _is_explanation(path)):
            raise ValueError(
                f"argument --output: {str(path)!r} exists, and would be overwritten. Choose another folder."
            )


def _is_explanation(path: Path) -> bool:
    """Whether an earlier `explain` wrote this file."""
    try:
        if path.suffix == ".safetensors":
            return bool(Explanation.load(path))
        with Image.open(path) as image:
            return image.info.get("Software") == MARK
    except (ValueError, OSError):
        return False


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where there is one and the text does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        without = action.default is None or action.default is False or action.default == {}
        return action.help if without or "default" in (action.help or "") else super()._get_help_string(action)


class _KeyValues(ParseKwargs):
    """timm's key=value pairs, with an error for a pair that is none."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        for value in values:
            if "=" not in value:
                parser.error(f"argument {option_string}: expected key=value, but got {value!r}")
        super().__call__(parser, namespace, values, option_string)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastshap", description="Vision models that explain themselves with Shapley values.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('fastshap-kernels')}")
    commands = parser.add_subparsers(
        dest="name", required=True, metavar="train | train-explainer | explain | evaluate | info"
    )
    _add_train(_command(commands, "train", train, "train a self-explaining model"))
    text = "train the explainer of a trained model, which stays as it is, on games that are played once"
    _add_train_explainer(_command(commands, "train-explainer", train_explainer, text))
    _add_explain(_command(commands, "explain", explain, "explain images with a trained model"))
    _add_evaluate(_command(commands, "evaluate", evaluate_run, "measure accuracy and fidelity of a trained model"))
    _command(commands, "info", info, "versions and backends")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=_Help)
    command.set_defaults(command=function, parser=command)
    return command


def _add_train(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--dataset", choices=datasets.DATASETS, default="digits", help="which data")
    group.add_argument("--data-dir", type=Path, help="folder of the archives (cifar10) or of train/ and val/ (folder)")
    group.add_argument(
        "--img-size",
        type=_whole(1, datasets.LARGEST_SIZE),
        help="image size in pixels (default: the data's or the model's)",
    )
    group.add_argument("--in-chans", type=int, choices=(1, 3), help="channels (default: the data's)")
    group.add_argument(
        "--aug",
        action=argparse.BooleanOptionalAction,
        help="random changes of the training images (default: not for digits)",
    )
    group.add_argument("-j", "--workers", type=_whole(0), default=0, help="processes that load data")
    group = parser.add_argument_group("model")
    group.add_argument("--model", help="a timm model (default: a vision transformer whose patches suit the data)")
    group.add_argument(
        "--model-kwargs",
        nargs="*",
        default={},
        action=_KeyValues,
        metavar="KEY=VALUE",
        help="further arguments of timm.create_model",
    )
    group.add_argument("--num-classes", type=_whole(1), help="outputs (default: the data's classes)")
    group.add_argument("--pretrained", action="store_true", help="start from timm's weights")
    group.add_argument(
        "--head", choices=HEADS, default="shares", help="shares: the classifier stays as it is; votes: as in the paper"
    )
    group.add_argument("--base", choices=BASES, help="what the shares head starts from (default: as the model can)")
    group.add_argument(
        "--head-depth", type=int, choices=HEAD_DEPTHS, default=1, help="blocks between the features and the shares head"
    )
    group.add_argument(
        "--intermediates", action="store_true", help="the shares read the features of every stage, not the last alone"
    )
    group.add_argument(
        "--backbone-gradient",
        type=_number(0, 1),
        help="how much of the regression's gradient reaches the encoder, 0 to 1 (default: 0 with shares, 1 with votes)",
    )
    group.add_argument(
        "--removal",
        choices=REMOVALS,
        help="how absent patches are removed: their tokens dropped, their pixels or their stem's output set to 0, "
        "and left out of the average; image: pixels at 0, and no more (default: drop where the model can, else pixel)",
    )
    group = parser.add_argument_group("objective")
    group.add_argument("--coalitions", type=_whole(1), default=8, help="coalitions an image and step")
    group.add_argument("--regression-weight", type=_number(0), default=1.0, help="lambda, of the Shapley regression")
    group.add_argument("--masked-task-weight", type=_number(0), default=0.0, help="mu, of the task on masked images")
    group.add_argument("--error", choices=ERRORS, default="uniform", help="unit of the regression")
    group.add_argument("--target", choices=TARGETS, default="detached", help="whether the regression moves v(S)")
    group.add_argument(
        "--target-precision", choices=PRECISIONS, default="auto", help="of a detached v(S), without the masked task"
    )
    for flag, weight, default in (("regression", "lambda", (0.0, 0.5)), ("masked-task", "mu", (0.0, 0.0))):
        group.add_argument(
            f"--{flag}-ramp",
            nargs=2,
            type=_number(0, 1),
            default=default,
            metavar=("START", "END"),
            help=f"where in the training (0 to 1) {weight} rises from 0 to full",
        )
    group = _add_training(parser)
    group.add_argument("--compile", action="store_true", help="compile the training step with torch.compile")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time, the same gradients")


def _add_train_explainer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="the run of the classifier")
    parser.add_argument("--data-dir", type=Path, help="other data with the same classes (default: the run's)")
    parser.add_argument("-j", "--workers", type=_whole(0), default=0, help="processes that load data")
    parser.add_argument(
        "--coalitions", type=_whole(2), default=recipe.COALITIONS, help="coalitions of each image, even"
    )
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, help="play mirror images too (default: not for digits)"
    )
    parser.add_argument("--head-depth", type=int, choices=HEAD_DEPTHS, help="blocks before the shares")
    parser.add_argument(
        "--intermediates",
        action=argparse.BooleanOptionalAction,
        help="they read the features of every stage, not the last alone",
    )
    _add_training(parser)
    parser.set_defaults(**recipe.MODEL | recipe.TRAINING)
    # What the model and the mirror images decide.
    parser.set_defaults(epochs=None, **dict.fromkeys(recipe.CONVOLUTIONAL))
    always, cells = recipe.TRAINING, recipe.CONVOLUTIONAL
    parser.epilog = (
        f"The defaults are the recipe of docs/fidelity.md: {always['epochs']} epochs, without mirror images "
        f"{2 * always['epochs']}; lr {always['lr']} and weight decay {always['weight_decay']}, of a convolutional "
        f"network {cells['lr']} and {cells['weight_decay']}."
    )


def _add_training(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("training")
    group.add_argument("--epochs", type=_whole(1), default=100, help="passes over the data")
    group.add_argument("-b", "--batch-size", type=_whole(1), default=128, help="images a step and process")
    group.add_argument("--opt", default="adamw", help="a timm optimiser")
    group.add_argument("--lr", type=_number(0, above=True), default=1e-3, help="learning rate")
    group.add_argument("--weight-decay", type=_number(0), default=0.05, help="of weights, not of biases and norms")
    group.add_argument("--sched", choices=SCHEDULES, default="cosine", help="a timm schedule")
    group.add_argument("--warmup-epochs", type=_number(0), default=0, help="epochs in which the learning rate rises")
    group.add_argument("--clip-grad", type=_number(0, above=True), help="largest norm of the gradient")
    group.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of weights, data order and coalitions")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", choices=("bfloat16", "float16"), default="bfloat16", help="of mixed precision")
    group.add_argument("--output", type=Path, required=True, help="the run's folder")
    group.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on with this run, or with PATH's")
    return group


def _add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, help="image files (default: test images of the run's data)")
    _add_checkpoint(parser)
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures and values")
    parser.add_argument("--data-dir", type=Path, help="other data with the same classes (default: the run's)")
    parser.add_argument("--target-class", help="name or number of the class to draw (default: the predicted one)")
    parser.add_argument("--num-images", type=_whole(1), default=8, help="test images, where no image is given")


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--data-dir", type=Path, help="other data with the same classes (default: the run's)")
    parser.add_argument("-b", "--batch-size", type=_whole(1), default=256, help="images at once")
    parser.add_argument("-j", "--workers", type=_whole(0), default=0, help="processes that load data")
    parser.add_argument("--num-images", type=_whole(1), default=20, help="test images to compare Shapley values on")
    parser.add_argument(
        "--reference",
        choices=("exact", "kernel_shap"),
        help=f"true values (default: exact up to {EXACT_PLAYERS} players)",
    )
    parser.add_argument("--coalitions", type=_whole(1), default=4096, help="per image, for kernel_shap")
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of kernel_shap")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--device", type=_device, help="where to compute (default: cuda where there is one)")


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, but got {text!r}")
        return int(text)

    return whole


def _number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    def number(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and low <= value <= high and not (above and value == low)):
            expected = f"a number {'above' if above else 'from'} {low}{'' if high == math.inf else f' to {high}'}"
            raise argparse.ArgumentTypeError(f"expected {expected}, but got {text!r}")
        return value

    return number


def _device(text: str) -> torch.device:
    try:
        found = torch.zeros(1, device=text)
        found.cpu()  # a "meta" tensor holds nothing that could be read
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r} ({error})") from error
