"""The docstring of everything that users call has an example, and the examples run."""

import ast
import copy
import doctest
import functools
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import matplotlib
import pytest
import torch

import fastshap_kernels as fk
import fastshap_vision as fv

matplotlib.use("agg")
from matplotlib import pyplot

PACKAGES = (fk, fv)
METHODS = {
    fv.Attribution: ("attribute",),
    fv.Explanation: ("as_shap", "heatmap", "plot", "save", "values_for"),
    fv.MaskedImageGame: ("coalition_values",),
    fv.Preprocessing: ("of_model",),
    fv.ImageTextClassifier: ("coalition_values", "explain", "explain_embedding", "shapley_values"),
    fv.PairExplanation: ("plot",),
    fv.RecordedCoalitions: ("save",),
    fv.SelfExplainingClassifier: (
        "coalition_values",
        "explain",
        "from_pretrained",
        "joint",
        "save_pretrained",
        "shapley_values",
    ),
    fv.baselines.FastSHAPExplainer: ("explain",),
}


class Docstring(NamedTuple):
    """One that has an example, and where it stands."""

    text: str
    package: ModuleType
    path: Path
    line: int


def docstrings() -> dict[str, Docstring]:
    """Of both packages, by name. From the source: doctest's own finder passes over functions that are decorated."""
    found = {}
    for package in PACKAGES:
        folder = Path(package.__file__).parent
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            below = [(".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text()))]
            while below:
                name, node = below.pop()
                text = ast.get_docstring(node)
                if text and ">>>" in text:
                    found[name] = Docstring(text, package, path, node.body[0].lineno - 1)
                inner = (ast.ClassDef, ast.FunctionDef)
                below += [(f"{name}.{child.name}", child) for child in node.body if isinstance(child, inner)]
    return found


DOCSTRINGS = docstrings()


def public(module: ModuleType) -> dict[str, object]:
    """What a module and the modules in its `__all__` offer, by name, with the methods above."""
    functions = [name for name, value in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")]
    own = [name for name in functions if getattr(module, name).__module__ == module.__name__]
    found = {}
    for name in getattr(module, "__all__", own):
        value = getattr(module, name)
        if inspect.ismodule(value):
            found |= public(value)
            continue
        found[f"{module.__name__}.{name}"] = value
        methods = METHODS.get(value, ()) if inspect.isclass(value) else ()
        found |= {f"{module.__name__}.{name}.{method}": getattr(value, method) for method in methods}
    return found


PUBLIC = public(fk) | public(fv)


def run(name: str, names: dict[str, object]) -> dict[str, object]:
    """Runs an example that uses `names`; returns them with those that it defines."""
    text, _, path, line = DOCSTRINGS[name]
    test = doctest.DocTestParser().get_doctest(text, names, name, str(path), line)
    report = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        runner.run(test, out=report.append, clear_globs=False)
    assert not report, "".join(report)
    return {key: value for key, value in test.globs.items() if not key.startswith("__")}


@functools.cache
def names_of(package: ModuleType) -> dict[str, object]:
    """What the example of the package itself defines: the names that its other examples use."""
    return run(package.__name__, {})


@pytest.fixture
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Files and figures are gone after the test; where shap is not installed, something stands in for it."""
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("shap") is None:
        module = ModuleType("shap")
        module.Explanation = lambda values, **rest: SimpleNamespace(values=values, **rest)
        monkeypatch.setitem(sys.modules, "shap", module)
    yield
    pyplot.close("all")


@pytest.mark.parametrize("name", DOCSTRINGS)
@pytest.mark.usefixtures("_in_a_folder_of_its_own")
def test_an_example_runs(name):
    if "import open_clip" in DOCSTRINGS[name].text:
        pytest.importorskip("open_clip")
    names = names_of(DOCSTRINGS[name].package)
    run(name, {key: value if inspect.ismodule(value) else copy.deepcopy(value) for key, value in names.items()})


@pytest.mark.parametrize("name", PUBLIC)
def test_what_users_call_has_an_example(name):
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert "\nExample:\n    >>> " in text, f"{name} has no example in its docstring"
    assert text.index("\nExample:\n") == text.rindex("\nExample:\n")
