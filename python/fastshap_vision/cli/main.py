"""The command line's entry."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import torch

from ..training.monitor import TrainingError
from ..training.state import CheckpointError
from ..training.stopping import TrainingStopped
from .arguments import Help, Parser, add_evaluate, add_explain, add_record, add_serve, add_train, add_train_explainer
from .commands import evaluate_run, explain, info, record, train, train_explainer
from .config_file import with_config
from .flags import in_flags
from .serve import serve


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, 2 for a mistake in what was asked, 1 for a run that had to stop."""
    parser = _parser()
    commands: Any = next(action.choices for action in parser._actions if action.dest == "name")
    options = parser.parse_args(with_config(sys.argv[1:] if arguments is None else arguments, commands))
    try:
        options.command(options)
        return 0
    except (ValueError, CheckpointError, ModuleNotFoundError, OSError) as error:
        code, message = 2, str(error)
    except TrainingStopped as error:
        code, message = 128 + error.signal_number, str(error)
    except TrainingError as error:
        code, message = 1, str(error)
    except (torch.OutOfMemoryError, MemoryError) as error:
        code, message = 1, f"the memory is full ({error}). Lower batch_size, or take smaller images."
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    print(f"{parser.prog} {options.name}: error: {in_flags(message, options.parser)}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="fastshap", description="Vision models that explain themselves with Shapley values.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('fastshap-kernels')}")
    commands = parser.add_subparsers(
        dest="name", required=True, metavar="train | record | train-explainer | explain | evaluate | serve | info"
    )
    add_train(_command(commands, "train", train, "train a self-explaining model"))
    text = "evaluate coalitions for train-explainer, by one process or many, and go on after a stop"
    add_record(_command(commands, "record", record, text))
    text = "train the explainer of a trained model, which stays as it is, on coalitions that are evaluated once"
    add_train_explainer(_command(commands, "train-explainer", train_explainer, text))
    add_explain(_command(commands, "explain", explain, "explain images with a trained model"))
    add_evaluate(_command(commands, "evaluate", evaluate_run, "measure accuracy and fidelity of a trained model"))
    add_serve(_command(commands, "serve", serve, "answer images over HTTP with predictions and their explanations"))
    _command(commands, "info", info, "versions and backends")
    return parser


def _command(commands: Any, name: str, function: Any, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text, allow_abbrev=False, formatter_class=Help)
    command.set_defaults(command=function, parser=command)
    return command
