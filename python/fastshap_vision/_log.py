"""What the log says once, however often it happens."""

from __future__ import annotations

import logging

_log = logging.getLogger("fastshap_vision")
_said: set[str] = set()


def say_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _said:
        _said.add(message)
        _log.log(level, message)
