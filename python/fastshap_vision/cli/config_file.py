"""A YAML file of flags, as timm's scripts take it: the command line's own come after it, and so win."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def with_config(arguments: Sequence[str], commands: dict[str, argparse.ArgumentParser]) -> list[str]:
    """The arguments with those of the file that --config names in front, as flags, so that they are checked alike."""
    found = list(arguments)
    command = commands.get(found[0]) if found else None
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    reader.add_argument("--config", type=Path, nargs="?")
    path = reader.parse_known_args(found[1:])[0].config
    if command is None or path is None or not any(action.dest == "config" for action in command._actions):
        return found
    return [found[0], *_flags(path, command), *found[1:]]


def _flags(path: Path, command: argparse.ArgumentParser) -> list[str]:
    try:
        read = yaml.safe_load(path.read_text("utf-8")) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        command.error(f"argument --config: {str(path)!r} can't be read: {error}")
    if not isinstance(read, dict):
        command.error(
            f"argument --config: {str(path)!r} must hold flags and their values, one a line, such as lr: 0.001"
        )
    actions = {name: action for action in command._actions for name in _names(action)}
    flags = []
    for name, value in read.items():
        key = str(name).replace("-", "_")
        action = actions.get(key)
        if action is None:
            close = difflib.get_close_matches(str(name), actions, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            command.error(f"argument --config: {str(path)!r} names {name!r}, which is no flag of this command.{hint}")
        is_opposite = isinstance(value, bool) and key not in _positive_names(action)
        flags += _as_flag(action, not value if is_opposite else value)
    return flags


def _names(action: argparse.Action) -> list[str]:
    """The flag without its dashes, and the name that timm saves it by."""
    if not action.option_strings or action.dest in ("help", "config"):
        return []
    return [action.dest, *(flag[2:].replace("-", "_") for flag in action.option_strings if flag.startswith("--"))]


def _positive_names(action: argparse.Action) -> list[str]:
    """Those that say what the flag says: of --aug and --no-aug, the first."""
    without = {f"no_{name}" for name in _names(action)}
    return [name for name in _names(action) if name not in without]


def _as_flag(action: argparse.Action, value: Any) -> list[str]:
    flag = next(flag for flag in action.option_strings if flag.startswith("--"))
    without = f"--no-{flag[2:]}"
    if value is None or (value is False and action.nargs == 0 and without not in action.option_strings):
        return []
    if value is False and without in action.option_strings:
        return [without]
    if value is True:
        return [flag]
    if isinstance(value, dict):
        return [flag, *(f"{key}={part}" for key, part in value.items())]
    parts = value if isinstance(value, list) else [value]
    return [f"{flag}={parts[0]}"] if len(parts) == 1 else [flag, *map(str, parts)]
