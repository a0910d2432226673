"""The folders of fastshap_vision lie in layers: a module imports from its own folder and from lower ones only."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "python" / "fastshap_vision"
#: From the top; folders of one layer know nothing of each other.
LAYERS = (
    ("cli",),
    ("training",),
    ("baselines", "data", "image_text", "metrics", "offline", "service"),
    ("objectives", "estimators"),
    ("models",),
    ("streaming",),
    ("games",),
    ("explanations", "images"),
    ("_runtime",),
    ("_checks", "_files", "_log", "_modes"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent != PACKAGE or path.stem in RANK
}


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, wherever in it the statement stands."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = module.split(".")[: -node.level]
        base = ".".join([*folder, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{base}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else base)
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_no_arrow_runs_back(module):
    folder = module.split(".")[0]
    for target in imports(module):
        other = target.split(".")[0]
        assert other == folder or RANK[other] > RANK[folder], f"{module} imports {target}"


def test_there_is_no_circle():
    arrows = {module: imports(module) for module in MODULES}
    while arrows:
        free = [module for module, targets in arrows.items() if not targets & arrows.keys()]
        assert free, f"these import each other: {', '.join(sorted(arrows))}"
        for module in free:
            del arrows[module]


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_long(module):
    assert len(MODULES[module].read_text().splitlines()) < 400


def test_the_files_that_contributing_names_are_there():
    text = (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text()
    rows = [row for row in text.splitlines() if row.startswith("|") and "`" in row]
    files = {
        path.name
        for folder in ("python", "fastshap_kernels", "bench", "tests", "gate")
        for path in (PACKAGE.parents[1] / folder).rglob("*.py")
    }
    named = {name.split("/")[-1] for row in rows for name in re.findall(r"`([\w/]+\.py)`", row)}
    assert named - files - {"setup.py"} == set()
