"""The library's errors in the words of the command line: flags in the place of Python's arguments."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence

#: Arguments whose flag has another name, and what the command line makes by itself.
_OTHER_NAMES = {
    "image_size": "img_size",
    "model_name": "model",
    "mixed_precision": "amp_dtype",
    "classes": "top_classes",
    "train_data": "the training data",
    "eval_data": "the test data",
}
#: Remedies that are more than an argument's name.
_REMEDIES = {
    "resume='auto' takes": "--resume takes",
    "Pass resume='auto'": "Pass --resume",
    "Go on with resume='auto'": "Go on with --resume",
    "go on with resume='auto'": "go on with --resume",
    "Lower lr or": "Lower --lr or",
    "or resume=None to start anew": "or leave --resume out to start anew",
    "or another output folder": "or another --output folder",
    ", or None for the best it can": ", or leave --removal out for the best it can",
    "call fv.record_coalitions(model, data) again": "record them again",
    "Call fv.record_coalitions(model, data) again": "Choose another --output, so that they are recorded again",
    "See timm.list_models()": "timm's documentation lists its models",
}
_WORDS = re.compile(
    r"`?\b(?P<name>[a-z]\w*)=(?P<value>'[^']*'|\w+(?:\.\w+)?)`?"  # removal='cell'
    r"|(?<!\w)'[^']*'(?!\w)"  # quoted: a name or a path, which stays
    r"|(?:\bargument )?`(?P<ticked>\w+)`"
    r"|(?<![\w./-])(?P<bare>[a-z]+(?:_[a-z]+)+)(?![\w/(]|\.\w)"  # batch_size
)
_FUNCTION = re.compile(r"^(?:[A-Za-z_]+\.)*[A-Za-z_]+: (?=\S)")
_IN_WORKER = re.compile(r"^Caught \w+ in DataLoader worker .*?\n(?:.*\n)*\w+: ")


def in_flags(message: str, command: argparse.ArgumentParser) -> str:
    """One line, with `name` and name=value as the command's flags; what is no flag of its stays as it is."""
    message = " ".join(_FUNCTION.sub("", _IN_WORKER.sub("", message)).split())
    for said, meant in _REMEDIES.items():
        message = message.replace(said, meant)
    flags = {action.dest: action.option_strings for action in command._actions if action.option_strings}
    return _WORDS.sub(lambda found: _translated(found, flags), message)


def _translated(found: re.Match[str], flags: Mapping[str, Sequence[str]]) -> str:
    name, value = found["name"] or found["ticked"] or found["bare"], found["value"]
    if name is None:
        return found[0]
    name = _OTHER_NAMES.get(name, name)
    if " " in name:
        return name
    if name not in flags:
        takes_more = value is not None and "model_kwargs" in flags
        return f"--model-kwargs {name}={value.strip(chr(39))}" if takes_more else found[0]
    flag = next(option for option in flags[name] if option.startswith("--"))
    if value is None:
        return f"argument {flag}" if found[0].startswith("argument ") else flag
    if value in ("True", "False"):
        without = f"--no-{flag[2:]}"
        return flag if value == "True" else without if without in flags[name] else f"no {flag}"
    return f"{flag} {value.strip(chr(39))}"
