"""A fresh Python process, for what happens at import."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fastshap_kernels

PACKAGE = Path(fastshap_kernels.__file__).parent


def run(code, *folders, **environment):
    """Runs `code` with the package from the first of `folders`; returns the finished process, its output as text."""
    folders = [str(folder) for folder in folders or [PACKAGE.parent]]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSHAP_")}
    variables = inherited | {"PYTHONPATH": os.pathsep.join(folders)} | environment
    # Python looks for packages where it was started before it looks at PYTHONPATH.
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folders[0], env=variables, capture_output=True, text=True, check=False
    )


def output(code, *folders, **environment):
    """What `code` prints; fails with its traceback where it raises."""
    process = run(code, *folders, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout


def copy_without_library(folder):
    """A pure-Python copy of the package in `folder`."""
    shutil.copytree(PACKAGE, folder / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder
