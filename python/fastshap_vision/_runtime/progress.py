"""Progress bars, on terminals and in notebooks."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from tqdm import tqdm


def progress_bar(shows: bool | None, **options: Any) -> tqdm:
    """A tqdm bar; in a notebook as a widget, where it can show widgets.

    Args:
        shows: True always, False never; None on a terminal and in a notebook, whose output is no terminal.
        options: of tqdm.
    """
    notebook = _in_notebook()
    disable = None if shows is None and not notebook else shows is False
    if notebook and importlib.util.find_spec("ipywidgets") is not None:
        from tqdm.notebook import tqdm as in_notebook

        return in_notebook(disable=disable, **options)
    return tqdm(disable=disable, **options)


def _in_notebook() -> bool:
    """As tqdm.autonotebook finds out, which decides at its import and warns where there are no widgets."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return "IPKernelApp" in getattr(shell, "config", ())
