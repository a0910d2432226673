"""What importing costs, what `info` says, and life without the compiled library."""

import inspect
import re
from pathlib import Path

import interpreter
import pytest

import fastshap_kernels as fk
from fastshap_kernels import _backend
from fastshap_kernels.info import report

MOST_SECONDS = 0.3
#: Modules that take long to import, and one that compiles.
HEAVY = {"numpy.f2py", "sympy", "timm", "torch._dynamo", "torch._inductor", "torch.utils.cpp_extension", "triton"}

WATCHED_IMPORT = f"""
import sys, time
import torch
known = set(sys.modules)
started = []
sys.addaudithook(lambda event, arguments: started.append(event))
begin = time.process_time()
import fastshap_kernels
seconds = time.process_time() - begin
from fastshap_kernels.info import report
report()
events = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork")
print(seconds, *({HEAVY} & (set(sys.modules) - known)), *[event for event in started if event in events])
"""

USE_WITHOUT_LIBRARY = """
import torch
import fastshap_kernels as fk
from fastshap_kernels.info import report
print(fk.__file__)
values = torch.arange(8.0).unsqueeze(1).requires_grad_()
phi = fk.exact_shapley(values)
phi.square().sum().backward()
print(phi.flatten().tolist(), values.grad.abs().sum() > 0)
bits = fk.sample_coalitions(2, 4, 9, seed=0)
print(fk.mask_patches(torch.ones(2, 1, 3, 3), bits, (3, 3)).sum() == fk.unpack_bits(bits, 9).sum())
try:
    fk.exact_shapley(values, backend="cpu")
except RuntimeError as error:
    print(error)
try:
    with fk.use_backend("cpu"):
        fk.sample_coalitions(2, 4, 9, seed=0)
except RuntimeError as error:
    print(error)
print(report())
"""


def test_importing_is_quick_light_and_starts_no_process():
    seconds = []
    for _ in range(3):
        first, *others = interpreter.output(WATCHED_IMPORT).split()
        assert others == []
        seconds.append(float(first))
    # The least of them, of processor time: a busy machine can only add.
    assert min(seconds) < MOST_SECONDS


def test_without_the_library_every_op_works_and_says_why_it_is_slow(tmp_path):
    folder = interpreter.copy_without_library(tmp_path)
    file, phi, masked, argument, block, *info = interpreter.output(USE_WITHOUT_LIBRARY, folder).splitlines()
    assert file.startswith(str(tmp_path))
    assert phi == "[1.0, 2.0, 4.0] tensor(True)"
    assert masked == "tensor(True)"
    why = "_C_cpu.so was not built."
    for op, message in (("exact_shapley", argument), ("sample_coalitions", block)):
        assert message.startswith(f"{op}: the backend 'cpu' can't serve this call: {why}")
        assert "rebuild with: pip install --no-build-isolation" in message
    assert any(re.match(rf"cpu +not available: {why}", line) for line in info)


def test_a_library_that_cannot_be_loaded_is_as_good_as_none(tmp_path):
    folder = interpreter.copy_without_library(tmp_path)
    (folder / "fastshap_kernels" / "_C_cpu.so").write_text("not a library")
    info = interpreter.output("from fastshap_kernels.info import report\nprint(report())", folder)
    assert re.search(r"^cpu +not available: _C_cpu.so can't be loaded by torch .*Rebuild with", info, re.MULTILINE)


def test_info_as_a_command():
    code = "import runpy, sys; sys.argv = ['info']; runpy.run_module('fastshap_kernels.info', run_name='__main__')"
    process = interpreter.run(code)
    assert process.stderr == ""
    assert process.stdout.splitlines()[0].split() == ["fastshap_kernels", fk.__version__]


def test_info_names_versions_backends_and_every_op():
    lines = report().splitlines()
    for start in ("fastshap_kernels", "python", "torch", "timm", "processor", "FASTSHAP_BACKEND"):
        assert any(re.match(rf"{start}  +\S", line) for line in lines)
    assert any(re.match(r"cpu built by +compiler .*, torch .* headers", line) for line in lines)
    for backend in ("reference", "cpu"):
        assert any(re.match(rf"{backend} +available$", line) for line in lines)
    for backend in ("triton", "cuda"):
        assert any(re.match(rf"{backend} +(not )?available", line) for line in lines)
    ops = lines[next(i for i, line in enumerate(lines) if line.startswith("op ")) :]
    assert ops[0].split() == ["op", *_backend.BACKENDS]
    table = {name: backends for name, *backends in map(str.split, ops[1:])}
    assert set(table) == {name for name in fk.__all__ if not inspect.isclass(getattr(fk, name))} - {"use_backend"}
    assert table["mask_patches"] == table["exact_shapley"] == ["yes"] * 4
    assert table["packed_attention"] == ["yes", "yes", "yes", "-"]
    assert table["kernel_shap"] == ["yes", "-", "-", "-"]


def test_info_is_aligned_plain_text():
    assert report().isascii()
    for table in report().split("\n\n"):
        rows = table.splitlines()
        second = re.match(r"\S+( \S+)*  +", rows[0]).end()
        assert all(row[second - 2 : second] == "  " and row[second] != " " for row in rows)
        assert all(row == row.rstrip() for row in rows)


def test_the_oldest_versions_tested_are_the_lower_bounds():
    root = Path(__file__).parents[1]
    dependencies = re.search(
        r"^dependencies = \[(.*?)\]", (root / "pyproject.toml").read_text(), re.DOTALL | re.MULTILINE
    )
    bounds = dict(re.findall(r'"(\w+)>=([\d.]+)', dependencies[1]))
    assert len(bounds) == dependencies[1].count('",')
    pinned = dict(re.findall(r"^(\w+)==([\d.]+)$", (root / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    assert {name: version[: len(bounds[name])] for name, version in pinned.items()} == bounds


@pytest.mark.parametrize("name", fk.__all__)
def test_public_names_are_documented(name):
    assert getattr(fk, name).__doc__
