"""The arguments of every command."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from timm.utils import ParseKwargs

from .._runtime.precision import PRECISIONS
from ..data import datasets
from ..data.record import DTYPES, SHARD, STORES
from ..games.factory import REMOVALS
from ..images.preprocessing import LARGEST_CROP
from ..models.arguments import BASES, HEAD_DEPTHS, HEADS
from ..objectives.joint import ERRORS, TARGETS
from ..training import recipe
from ..training.settings import SCHEDULES

#: The model, and arguments of timm.create_model, where no model is named: patches must be smaller than a small image.
DEFAULT_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "digits": ("vit_tiny_patch16_224", {"patch_size": 2, "embed_dim": 64, "depth": 3, "num_heads": 4}),
    "folder": ("vit_small_patch16_224", {}),
}

#: accelerate's names of timm's, and its own.
AMP_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "bf16": "bf16", "fp16": "fp16"}

# Up to this many players all coalitions of an image are evaluated in seconds; beyond, KernelSHAP estimates.
EXACT_PLAYERS = 16


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())} (see {self.prog} --help)\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
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


def add_train(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    _add_data(group, "digits")
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
    group.add_argument("--aa", metavar="POLICY", help="timm's automatic augmentation, such as rand-m9-mstd0.5-inc1")
    group.add_argument("--reprob", type=_number(0, 1), help="probability that a part of a training image is erased")
    group.add_argument(
        "--crop-pct", type=_number(0, LARGEST_CROP, above=True), help="share of test images kept (default: the model's)"
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
        "--initial-checkpoint", type=Path, metavar="FILE", help="start from a file of a timm model's weights"
    )
    group.add_argument("--drop-path", type=_number(0, 1), metavar="RATE", help="of blocks that are skipped in training")
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
        help="how absent patches are removed: token, out of the sequence; cell or stem, their pixels or what the stem "
        "makes of them are 0, and they are left out of the average; pixel: their pixels are 0, and no more (default: "
        "token where the model can, else cell)",
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
    group.add_argument(
        "--keep-best", choices=("eval_accuracy", "eval_loss"), help="keep the model of the best epoch in best/ too"
    )
    group.add_argument("--layer-decay", type=_number(0, above=True), help="factor of the rate from layer to layer")
    group.add_argument("--smoothing", type=_number(0, 1), default=0.0, help="of labels")
    group.add_argument("--mixup", type=_number(0), default=0.0, help="alpha; 0 for none")
    group.add_argument("--cutmix", type=_number(0), default=0.0, help="alpha; 0 for none")
    group.add_argument("--sync-bn", action="store_true", help="batch norm's statistics are of all processes (GPUs)")
    group.add_argument("--compile", action="store_true", help="compile the training step with torch.compile")
    group.add_argument("--grad-checkpointing", action="store_true", help="less memory, more time, the same gradients")


def _add_data(group: Any, dataset: str | None) -> None:
    of_run = "" if dataset else " (default: the run's)"
    group.add_argument(
        "--dataset",
        type=_dataset,
        metavar="NAME",
        default=dataset,
        help=f"digits, folder, tar, or timm's name of a dataset: torch/cifar10, hfds/…{of_run}",
    )
    group.add_argument("--data-dir", type=Path, help=f"the folder that holds the data{of_run}")
    group.add_argument("--train-split", metavar="NAME", help="(default: train)")
    group.add_argument("--val-split", metavar="NAME", help="(default: test, or what timm calls it)")
    group.add_argument("--class-map", type=Path, metavar="FILE", help="text file with one label a line, in their order")
    group.add_argument("--input-key", metavar="COLUMN", help="of the images (hfds; default: image)")
    group.add_argument("--target-key", metavar="COLUMN", help="of the labels (hfds; default: label)")
    group.add_argument(
        "--resize", choices=datasets.RESIZES, help="torch is faster, a few pixels differ (default: pillow)"
    )
    group.add_argument("--dataset-download", dest="download", action="store_true", help="fetch the data (torch)")


def _add_explained(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="a run, or what save_pretrained wrote")
    which.add_argument("--model", help="a timm model, with --pretrained")
    group.add_argument("--pretrained", action="store_true", help="explain timm's weights")
    group = parser.add_argument_group("data")
    _add_data(group, None)
    group.add_argument("-j", "--workers", type=_whole(0), default=0, help="processes that load data")
    parser.add_argument(
        "--coalitions", type=_whole(2), default=recipe.COALITIONS, help="coalitions of each image, even"
    )
    parser.add_argument(
        "--mirror", action=argparse.BooleanOptionalAction, help="record mirror images too (default: not for digits)"
    )


def add_record(parser: argparse.ArgumentParser) -> None:
    _add_explained(parser)
    parser.add_argument("-b", "--batch-size", type=_whole(1), default=64, help="images at once")
    parser.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of the coalitions and what is held out")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto", help="of v(S)")
    parser.add_argument("--shard", type=_whole(1), default=SHARD, help="images in a file")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float16", help="of what is kept")
    parser.add_argument(
        "--store",
        choices=STORES,
        default="values",
        help="features: what the classifier reads, less where there are more classes than features",
    )
    parser.add_argument("--top-classes", type=_whole(1), help="keep each image's likeliest ones (default: all)")
    parser.add_argument("--output", type=Path, required=True, help="the folder, later that of train-explainer")


def add_train_explainer(parser: argparse.ArgumentParser) -> None:
    _add_explained(parser)
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
    group.add_argument("--min-lr", type=_number(0), default=0.0, help="lowest learning rate of the schedule")
    group.add_argument("--warmup-lr", type=_number(0), default=1e-5, help="learning rate at the start of the warm-up")
    group.add_argument("--opt-betas", type=_number(0), nargs=2, metavar="BETA", help="(default: the optimiser's)")
    group.add_argument("--clip-grad", type=_number(0, above=True), help="largest norm of the gradient")
    group.add_argument("--grad-accum-steps", type=_whole(1), help="batches an update (default: accelerate's)")
    group.add_argument("--model-ema", action="store_true", help="keep and evaluate a moving average of the weights")
    group.add_argument("--model-ema-decay", type=_number(0, 1), default=0.9998, help="of --model-ema")
    group.add_argument("--channels-last", action="store_true", help="weights and images channels last in memory")
    group.add_argument("--fsdp", action="store_true", help="weights in parts on the processes, by FSDP2")
    group.add_argument("--seed", type=_whole(0, 2**32 - 1), default=0, help="of weights, data order and coalitions")
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", choices=tuple(AMP_DTYPES), default="bfloat16", help="of mixed precision")
    group.add_argument("--checkpoint-hist", type=_whole(1), default=2, help="checkpoints that are kept")
    group.add_argument("--checkpoint-steps", type=_whole(1), help="updates between checkpoints within an epoch")
    group.add_argument(
        "--log-with", nargs="+", metavar="TRACKER", help="tensorboard, wandb, trackio or others that accelerate knows"
    )
    group.add_argument("--log-interval", type=_whole(1), default=100, help="batches between two looks at the loss")
    group.add_argument("--config", type=Path, metavar="FILE", help="YAML file of flags; the command line's win")
    group.add_argument("--output", type=Path, required=True, help="the run's folder")
    group.add_argument("--resume", nargs="?", const="auto", metavar="PATH", help="go on with this run, or with PATH's")
    return group


def add_explain(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="*", type=Path, help="image files (default: test images of the run's data)")
    _add_checkpoint(parser)
    parser.add_argument(
        "--images",
        nargs="+",
        type=Path,
        dest="source",
        metavar="PATH",
        help="explain many images: of folders, with all folders in them, or of tar shards",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures and values; see below")
    parser.add_argument("--data-dir", type=Path, help="other data with the same classes (default: the run's)")
    parser.add_argument("--target-class", help="name or number of the class to draw (default: the predicted one)")
    parser.add_argument("--num-images", type=_whole(1), default=8, help="test images, where no image is given")
    parser.add_argument(
        "--evaluations", type=_whole(0), default=0, help="coalitions of each image, even, to refine its explanation by"
    )
    group = parser.add_argument_group("many images", "Started again after a stop, it goes on.")
    group.add_argument("--top-k", type=_top_k, default=5, help="likeliest classes of each image, or all")
    group.add_argument("-b", "--batch-size", type=_whole(1), default=256, help="images at once")
    group.add_argument("-j", "--workers", type=_whole(0), default=0, help="processes that read images")
    parser.epilog = (
        "With --images, --output is a Parquet file with a row for each image: its name, its likeliest classes, their "
        "probabilities, Shapley values and expected error; with --top-k all, a folder of safetensors files."
    )


def add_evaluate(parser: argparse.ArgumentParser) -> None:
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


def add_serve(parser: argparse.ArgumentParser) -> None:
    _add_checkpoint(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for everybody's requests")
    parser.add_argument("--port", type=_whole(1, 65535), default=8000, help="to listen on")
    parser.add_argument("-b", "--batch-size", type=_whole(1), default=16, help="images at once")
    group = parser.add_argument_group("limits", "Of a request, and of all of them at once.")
    group.add_argument("--max-bytes", type=_whole(1), default=10_000_000, help="of a request's body")
    group.add_argument("--max-pixels", type=_whole(1), default=25_000_000, help="of an image")
    group.add_argument("--max-seconds", type=_number(0, above=True), default=30.0, help="until a request is answered")
    group.add_argument("--max-requests", type=_whole(1), default=64, help="at once; those beyond get status 503")


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="FOLDER", help="a run's folder")
    parser.add_argument("--device", type=_device, help="where to compute (default: cuda where there is one)")


def _whole(low: int, high: int = 2**31 - 1) -> Callable[[str], int]:
    def whole(text: str) -> int:
        if not text.isdecimal() or len(text) > 10 or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, but got {text!r}")
        return int(text)

    return whole


def _top_k(text: str) -> int | str:
    return text if text == "all" else _whole(1)(text)


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


def _dataset(text: str) -> str:
    try:
        datasets.check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            str(error).split("must be ")[-1].replace("one of", "expected one of")
        ) from error
    return text


def _device(text: str) -> torch.device:
    try:
        found = torch.zeros(1, device=text)
        found.cpu()  # a "meta" tensor holds nothing that could be read
        return found.device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"cannot compute on {text!r} ({error})") from error
