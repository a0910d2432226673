"""What several files say of the project is the same in all of them, and what SECURITY.md says holds."""

import ast
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CODE_OF_CONDUCT.md")
KINDS_OF_CHANGES = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
NATIVE_SUFFIXES = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
#: Functions that run code from what they read, and the modules whose whole purpose it is.
UNPICKLING = {"torch.load", "joblib.load", "pandas.read_pickle", "eval", "exec"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def found(pattern, text):
    """The one group of the one match."""
    (group,) = re.findall(pattern, text, re.MULTILINE)
    return group


def workflow(name):
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())["jobs"]


OLDEST_PYTHON = found(r'^requires-python = ">=([\d.]+)"$', PYPROJECT)
NEWEST_PYTHON = found(r"^PYTHON_NEWEST \?= python([\d.]+)$", MAKEFILE)


def test_the_oldest_python_is_one_and_the_same():
    assert found(r"^PYTHON_OLDEST \?= python([\d.]+)$", MAKEFILE) == OLDEST_PYTHON
    assert found(r'^python_version = "([\d.]+)"$', PYPROJECT) == OLDEST_PYTHON
    assert found(r'^target-version = "py(\d+)"$', PYPROJECT) == OLDEST_PYTHON.replace(".", "")


def test_github_tests_the_versions_of_the_matrix():
    jobs = workflow("ci.yml")
    assert jobs["test"]["strategy"]["matrix"]["include"] == [
        {"versions": "oldest", "python": OLDEST_PYTHON, "constraints": "tests/oldest.txt"},
        {"versions": "newest", "python": NEWEST_PYTHON, "constraints": ""},
    ]
    assert re.findall(r"^\ttests/matrix\.sh oldest \S+ (\S+)$", MAKEFILE, re.MULTILINE) == ["tests/oldest.txt"]
    versions = [step["with"]["python-version"] for step in jobs["lint"]["steps"] if "python-version" in str(step)]
    assert versions == [NEWEST_PYTHON]


def test_wheels_are_built_with_the_oldest_versions_and_tested_with_both():
    (settings,) = (step["env"] for step in workflow("wheels.yml")["wheel"]["steps"] if "env" in step)
    pythons = [f"cp{version.replace('.', '')}-manylinux_x86_64" for version in (OLDEST_PYTHON, NEWEST_PYTHON)]
    assert settings["CIBW_BUILD"].split() == pythons
    assert "--constraint {project}/tests/oldest.txt torch" in settings["CIBW_BEFORE_BUILD"]


def test_only_the_job_that_publishes_may_prove_who_it_is():
    for name in ("ci.yml", "wheels.yml"):
        whole = yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())
        assert whole["permissions"] == {"contents": "read"}
        permitted = {job: part["permissions"] for job, part in whole["jobs"].items() if "permissions" in part}
        assert permitted == ({"publish": {"id-token": "write"}} if name == "wheels.yml" else {})


def test_every_kernel_file_is_formatted_by_the_hook_and_checked_by_make_lint():
    files = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "fastshap_kernels", "python", "tests", "gate", "bench")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in NATIVE_SUFFIXES
    }
    assert {Path(file).suffix for file in files} == {".cpp", ".cu", ".h"}
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    (pattern,) = (hook["files"] for hook in hooks if hook["id"] == "clang-format")
    assert {file for file in files if re.search(pattern, file)} == files
    lists = "".join(re.findall(r"^(?:HEADERS|NATIVE) := (.*)$", MAKEFILE, re.MULTILINE))
    globs = [glob for wildcard in re.findall(r"\$\(wildcard ([^)]*)\)", lists) for glob in wildcard.split()]
    assert {str(path.relative_to(ROOT)) for glob in globs for path in ROOT.glob(glob)} == files


def test_the_tools_that_make_runs_are_in_the_dev_extra():
    extra = set(re.findall(r'"([\w-]+)', found(r"^dev = \[((?:\n  .*)*)\n\]", PYPROJECT)))
    tools = set(re.findall(r"\$\(BIN\)/([\w-]+)", MAKEFILE)) - {"python", "pip"}
    assert {"ruff", "mypy", "clang-format", "check-jsonschema"} <= tools <= extra
    assert "pytest-cov" in extra


def test_the_changelog_has_the_form_that_it_names():
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *released = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", heading) for heading in released)
    assert ("No version has been released yet" in text) == (not released)
    assert set(re.findall(r"^### (.*)$", text, re.MULTILINE)) <= KINDS_OF_CHANGES


def test_a_bug_report_holds_what_info_says():
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text())
    (field,) = (part for part in form["body"] if "python -m fastshap_kernels.info" in str(part))
    assert field["validations"] == {"required": True}


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_project_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", (ROOT / page).read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        assert (ROOT / (file or page)).is_file(), target
        headings = re.findall(r"^#+ (.*)$", (ROOT / (file or page)).read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")) for title in headings}


def test_the_packages_call_nothing_that_unpickles_or_runs_text():
    sources = [*(ROOT / "fastshap_kernels").rglob("*.py"), *(ROOT / "python").rglob("*.py")]
    assert len(sources) > 50
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not PICKLES & {name.name.split(".")[0] for name in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in PICKLES, path
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in UNPICKLING, path
                allowed = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert allowed.get("allow_pickle", "False") == "False", path
                assert ast.unparse(node.func) != "np.load" or "allow_pickle" in allowed, path
