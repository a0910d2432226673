"""The compile gate: what it reads of the compilers, and what it lets pass."""

import re
from pathlib import Path

import compile_gate
import cuda_kernels
import kernel_cases
import oldest_headers
import pytest
import torch
import triton_kernels
from resources import Resources

LOG = """
ptxas info    : Compiling entry function '_ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIffLi4EEEvPKf' for 'sm_90'
ptxas info    : Function properties for _ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIffLi4EEEvPKf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 528 bytes smem
ptxas info    : Compiling entry function '_ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIddLi1EEEvPKd' for 'sm_90'
ptxas info    : Function properties for _ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIddLi1EEEvPKd
    8 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 56 registers, used 0 barriers, 8 bytes cumulative stack size
"""


def test_the_compilers_report_is_read_by_kernel_the_most_of_any_instantiation(tmp_path, monkeypatch):
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "mask_patches.cu.log").write_text(LOG)
    monkeypatch.setattr(cuda_kernels, "BUILD", tmp_path)
    monkeypatch.setattr(cuda_kernels, "_missing_instructions", lambda file, wanted: [])
    found, problems = cuda_kernels.read("mask_patches")
    assert found == {"sm_90": {"mask_patches: mask_patches_kernel": Resources(56, 528, 8, 24)}}
    assert problems == []


def test_a_kernel_without_its_instruction_is_a_problem(monkeypatch):
    functions = {"6narrow": "LDG.E.64 R2", "4wide": "LDG.E.128 R4"}
    code = "".join(f"\n\tFunction : _ZN8fastshap{name}IfEEvPKf\n {line}\n" for name, line in functions.items())
    monkeypatch.setattr(cuda_kernels, "cuobjdump", lambda *arguments: code)
    wanted = {
        "narrow": kernel_cases.WIDE_ACCESS,
        "wide": kernel_cases.WIDE_ACCESS,
        "elsewhere": kernel_cases.WIDE_ACCESS,
    }
    problems = cuda_kernels._missing_instructions(Path("x.o"), wanted)
    assert len(problems) == 1
    assert problems[0].startswith("cuda sm_90 narrow: no instruction like")
    assert list(wanted) == ["elsewhere"]


@pytest.mark.parametrize("text", ["LDG.E.128 R4", "STG.E.128 [R2]", "LDG.E.128.CONSTANT R8", "STG.E.EF.128 R1"])
def test_wide_accesses(text):
    assert re.search(kernel_cases.WIDE_ACCESS, text)
    assert not re.search(kernel_cases.WIDE_ACCESS, text.replace("128", "64"))


@pytest.mark.parametrize("text", ["HMMA.16816.F32.BF16", "HGMMA.64x64x16.F32", "UTCHMMA gdesc", "WARPSYNC; HGMMA.x"])
def test_matrix_instructions(text):
    assert re.search(kernel_cases.MATRIX_UNITS, text)
    assert not re.search(kernel_cases.MATRIX_UNITS, text.replace("MMA", "FMA"))


def table(**kernels):
    return {"cuda": {"sm_90": kernels}}


@pytest.mark.parametrize(
    ("now", "before", "partial", "problems"),
    [
        (table(a=Resources(44, 100)), table(a=Resources(40, 100)), False, []),
        (table(a=Resources(45, 100)), table(a=Resources(40, 100)), False, ["cuda sm_90 a: registers 45, budget 40"]),
        (table(a=Resources(35, 100)), table(a=Resources(40, 100)), False, ["cuda sm_90 a: registers 35, budget 40"]),
        (table(a=Resources(40, 16)), table(a=Resources(40, 0)), False, ["cuda sm_90 a: shared 16, budget 0"]),
        (table(a=Resources()), table(), False, ["cuda sm_90 a: not in the budget"]),
        (table(), table(a=Resources()), False, ["cuda sm_90 a: in the budget, but there is no such kernel"]),
        (table(), table(a=Resources()), True, []),
    ],
)
def test_a_tenth_more_or_less_than_the_budget_is_a_problem(now, before, partial, problems):
    assert compile_gate.compare(now, before, partial) == problems


def test_spills_are_a_problem_whatever_the_budget_says(monkeypatch):
    monkeypatch.setattr(cuda_kernels, "build", lambda: None)
    monkeypatch.setattr(cuda_kernels, "missing_operators", list)
    found = {"sm_90": {"a": Resources(40, 0, 8, 16), "b": Resources(40)}}
    monkeypatch.setattr(cuda_kernels, "read", lambda only: (found, []))
    _, problems = compile_gate.measure(["cuda"], None)
    assert problems == ["cuda sm_90 a: 16 bytes of spills, 8 of local memory"]


def test_each_version_of_a_compiler_has_a_budget_of_its_own(capsys):
    rows = {"sm_90": {"a": [40, 100]}}
    budget = {"cuda": {"13.0": rows, "13.1": {"sm_90": {"a": [60, 100]}}}}
    found = table(a=Resources(60, 100))
    problem = ["cuda sm_90 a: registers 60, budget 40"]
    assert compile_gate.hold_to_budget(found, budget, {"cuda": "13.0"}, False) == problem
    assert compile_gate.hold_to_budget(found, budget, {"cuda": "13.1"}, False) == []
    assert capsys.readouterr().out == ""
    assert compile_gate.hold_to_budget(found, budget, {"cuda": "14.0"}, False) == []
    assert "budgets of 13.0, 13.1: only what is absolute is held" in capsys.readouterr().out


def test_recording_replaces_the_figures_of_one_version():
    budget = {"cuda": {"13.0": {"sm_90": {"a": [40, 100], "b": [8, 0]}}, "12.9": {"sm_90": {"a": [1, 1]}}}}
    compile_gate.record(table(a=Resources(60, 100)), budget, {"cuda": "13.0"}, True)
    assert budget["cuda"]["13.0"] == {"sm_90": {"a": [60, 100], "b": [8, 0]}}
    compile_gate.record(table(a=Resources(60, 100)), budget, {"cuda": "13.0"}, False)
    assert budget["cuda"] == {"13.0": {"sm_90": {"a": [60, 100]}}, "12.9": {"sm_90": {"a": [1, 1]}}}
    assert '    "a": [60, 100]' in compile_gate.as_text(budget).splitlines()


def test_a_source_that_needs_newer_headers_is_a_problem(tmp_path):
    headers = tmp_path / "torch" / "headeronly"
    headers.mkdir(parents=True)
    (headers / "codes.h").write_text("#pragma once\n#define OLD_CHECK(call) (call)\n")
    include = "#include <torch/headeronly/codes.h>\n"
    sources = {"right.cpp": "int f() { return OLD_CHECK(1); }", "wrong.cpp": "int f() { return NEW_CHECK(1); }"}
    for name, line in sources.items():
        (tmp_path / name).write_text(include + line)
    problems = oldest_headers.problems([tmp_path / name for name in sources], tmp_path)
    assert len(problems) == 1
    assert re.search(r"headers of torch 2\.\d+\.0: .*wrong.cpp.*NEW_CHECK", problems[0])


def test_every_source_is_compiled_against_the_oldest_headers():
    assert {path.name for path in oldest_headers.sources("segment_sum")} == {"segment_sum.cpp", "segment_sum.cu"}
    folders = {path.parent.name for path in oldest_headers.sources(None)}
    assert folders == {path.name for path in (Path(__file__).parents[1] / "csrc").iterdir()} - {"include"}


def test_every_file_of_triton_kernels_has_cases():
    from fastshap_kernels.triton import OPERATORS

    assert set(kernel_cases.TRITON) == set(OPERATORS)
    for make in kernel_cases.TRITON.values():
        assert list(make())


def test_every_triton_launch_says_whether_operations_may_be_fused():
    # Triton 3.9 warns where it is left open, and 3.10 decides otherwise.
    with triton_kernels.Recorder() as recorder:
        for make in kernel_cases.TRITON.values():
            for case in make():
                case.call(torch.ops.fastshap_triton)
    assert recorder.launches
    silent = {function.__name__ for function, _, named in recorder.launches if "enable_fp_fusion" not in named}
    assert silent == set()
