"""How the package is built: what a wheel holds, what is compiled again, and builds that can't compile."""

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fastshap_kernels as fk
import fastshap_vision as fv

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "fastshap_kernels", ROOT / "python" / "fastshap_vision")
BUILD_WHEEL = "from setuptools import build_meta; build_meta.build_wheel('dist')"


def run(folder, *arguments, **environment):
    """Runs Python in `folder`, without a terminal that a build could write to; returns the finished process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("FASTSHAP_")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=inherited | environment, capture_output=True, text=True, start_new_session=True
    )


def contents(folder):
    """The tags of the wheel in `folder`, and the names of its files."""
    (wheel,) = (folder / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return wheel.stem.split("-", 2)[2], {name for name in archive.namelist() if ".dist-info/" not in name}


def sources():
    """What both packages consist of, as a wheel names it."""
    files = {path.relative_to(package.parent) for package in PACKAGES for path in package.rglob("*") if path.is_file()}
    return {str(path) for path in files if path.suffix not in (".pyc", ".so")}


@pytest.fixture
def checkout(tmp_path):
    """A folder of links to this checkout: what a build writes lies elsewhere."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "fastshap_kernels", "python"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("tests", "bench", "gate", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


@pytest.fixture
def no_torch(tmp_path_factory):
    """A variable of the environment with which importing torch fails."""
    folder = tmp_path_factory.mktemp("no_torch")
    (folder / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    return {"PYTHONPATH": str(folder)}


def test_a_wheel_holds_both_packages_and_nothing_else(checkout):
    process = run(checkout, "-c", BUILD_WHEEL, FASTSHAP_SKIP_CPP="1")
    assert process.returncode == 0, process.stderr
    assert contents(checkout) == ("py3-none-any", sources())
    assert {"fastshap_kernels/py.typed", "fastshap_vision/py.typed"} <= sources()


def test_a_wheel_with_libraries_is_for_a_platform_and_any_python(checkout):
    code = """
import setuptools
from distutils.core import run_setup
command = run_setup("setup.py", stop_after="init").get_command_obj("bdist_wheel")
command.ensure_finalized()
print("-".join(command.get_tag()))
"""
    process = run(checkout, "-c", code)
    platform = re.sub(r"\W", "_", sysconfig.get_platform())
    assert process.stdout.split() == [f"py3-none-{platform}"], process.stderr


def test_metadata_needs_no_torch_and_has_the_packages_version(checkout, no_torch):
    code = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('.')"
    process = run(checkout, "-c", code, **no_torch)
    assert process.returncode == 0, process.stderr
    (metadata,) = checkout.glob("*.dist-info/METADATA")
    version = re.search(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE)[1]
    assert version == fk.__version__ == fv.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_without_torch_the_build_says_loudly_what_is_missing_and_what_to_do(checkout, no_torch):
    process = run(checkout, "-c", BUILD_WHEEL, **no_torch)
    assert process.returncode == 0, process.stderr
    for library in ("_C_cpu", "_C_cuda"):
        assert f"fastshap_kernels.{library} WAS NOT BUILT: No module named 'torch'" in process.stderr
    assert "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps" in process.stderr
    assert contents(checkout) == ("py3-none-any", sources())


def test_the_message_reaches_a_terminal_that_pip_keeps_it_from(checkout, no_torch):
    # pip reads both streams of a build and shows neither.
    command = ["sh", "-c", 'exec "$0" -c "$1" >hidden 2>&1', sys.executable, BUILD_WHEEL]
    process = run(checkout, "-c", f"import pty; pty.spawn({command!r})", **no_torch)
    assert "fastshap_kernels._C_cpu WAS NOT BUILT" in process.stdout
    assert "fastshap_kernels._C_cpu WAS NOT BUILT" in (checkout / "hidden").read_text()


def test_a_forced_build_fails_without_torch(checkout, no_torch):
    process = run(checkout, "-c", BUILD_WHEEL, FASTSHAP_FORCE_BUILD="1", **no_torch)
    assert process.returncode != 0
    assert "No module named 'torch'" in process.stderr.splitlines()[-1]


def test_a_changed_header_or_flag_rebuilds_what_depends_on_it(tmp_path):
    (tmp_path / "setup.py").symlink_to(ROOT / "setup.py")
    suffixes = {"cpu": "cpp", "cuda": "cu"} if torch.version.cuda else {"cpu": "cpp"}
    (tmp_path / "csrc" / "include").mkdir(parents=True)
    for folder, suffix in suffixes.items():
        (tmp_path / "csrc" / folder).mkdir()
        for name in ("one", "other"):
            (tmp_path / "csrc" / "include" / f"{name}.h").write_text("#pragma once\n")
            source = f'#include "{name}.h"\nint {name}() {{ return 0; }}\n'
            (tmp_path / "csrc" / folder / f"{name}.{suffix}").write_text(source)
    # One process, since importing torch takes most of the time.
    code = """
import os
from pathlib import Path
import setuptools
from distutils.core import run_setup
def build():
    print("==", flush=True)
    run_setup("setup.py", ["--quiet", "build_ext", "--build-temp=temp", "--build-lib=lib"])
build()
build()
Path("csrc", "include", "one.h").write_text("#pragma once\\n// changed\\n")
build()
os.environ["CXXFLAGS"] = "-DANOTHER"
build()
os.environ["TORCH_CUDA_ARCH_LIST"] = "9.0"
build()
"""
    process = run(tmp_path, "-c", code, FASTSHAP_FORCE_BUILD="1", TORCH_CUDA_ARCH_LIST="8.0")
    assert process.returncode == 0, process.stdout + process.stderr
    built = [sorted(re.findall(r"/csrc/(\S+) -o", part)) for part in process.stdout.split("==\n")[1:]]

    everything, one = (
        [f"{folder}/{name}.{suffix}" for folder, suffix in suffixes.items() for name in names]
        for names in (("one", "other"), ("one",))
    )
    cpu, cuda = everything[:2], everything[2:]
    assert built == [everything, [], one, cpu, cuda]
    assert {path.name for path in (tmp_path / "lib" / "fastshap_kernels").iterdir()} == {f"_C_{x}.so" for x in suffixes}


@pytest.mark.slow
def test_a_wheel_runs_the_readmes_op_in_an_empty_environment(checkout):
    forced = {"FASTSHAP_FORCE_BUILD": "1", "FASTSHAP_SKIP_CUDA": "1"}
    wheel = ["-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir=dist", "."]
    process = run(checkout, *wheel, **forced)
    assert process.returncode == 0, process.stderr
    tag, names = contents(checkout)
    assert tag == f"py3-none-{re.sub(r'[^a-z0-9]', '_', sysconfig.get_platform())}"
    assert names == sources() | {"fastshap_kernels/_C_cpu.so"}

    environment = checkout / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    (file,) = (checkout / "dist").glob("*.whl")
    process = run(environment, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", file)
    assert process.returncode == 0, process.stderr
    # torch and what it needs are those of the tests' own environment; its .pth files, and so this checkout, are not.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    op = re.search(r"```python\n(import torch\n.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    code = f"{op}\nfrom fastshap_kernels import _native\nprint(fk.__file__, _native.cpu_problem, features.grad.shape)"
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("FASTSHAP_", "PYTHONPATH"))}
    process = subprocess.run([python, "-c", code], cwd=environment, env=variables, capture_output=True, text=True)
    assert process.stdout.strip() == f"{site}/fastshap_kernels/__init__.py None torch.Size([8, 196, 384])", (
        process.stderr
    )
