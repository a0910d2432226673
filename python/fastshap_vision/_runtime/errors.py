"""Errors that another process must hear of: of a worker that loads data, or of a run's other processes."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch.utils.data import Dataset, get_worker_info

#: What every process can make again.
_PLAIN = (str, bytes, int, float, type(None))


def sendable(error: Exception) -> Exception:
    """The error itself, or where no other process could make it again, one that says the same.

    An error whose class is local, or whose constructor takes other arguments than it keeps, ends the process that sends
    or receives it, or leaves the other waiting for ever.
    """
    kind, found = type(error), sys.modules.get(type(error).__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    is_plain = all(isinstance(part, _PLAIN) for part in (*error.args, *vars(error).values()))
    try:
        if found is kind and is_plain and str(copy.copy(error)) == str(error):
            return error
    except Exception:  # whatever its class's own methods raise
        pass
    words = RuntimeError(f"{kind.__name__}: {error}")
    words.__cause__ = error
    return words


class SendableErrors(Dataset):
    """A dataset whose errors reach the process that reads it by workers; items are as the dataset gives them.

    Args:
        data: with a length, and items by index.
    """

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, rows: list[Any]) -> list[Any]:
        """A batch at once, as torch's DataLoader takes it."""
        try:
            if hasattr(self.data, "__getitems__"):
                return list(self.data.__getitems__(rows))
            return [self.data[row] for row in rows]
        except Exception as error:
            if get_worker_info() is None or sendable(error) is error:
                raise
            raise sendable(error) from error
