"""The compile gate: what it reads of the compilers, and what it lets pass."""

import re
import subprocess
from pathlib import Path

import compile_gate
import cuda_kernels
import kernel_cases
import oldest_headers
import pytest
import resources
import torch
import triton_kernels
from resources import Resources

USAGE = """
Fatbin elf code:
================
arch = sm_90
code version = [1,8]

Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIffLi4EEEvPKf:
  REG:40 STACK:0 SHARED:1552 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIddLi1EEEvPKd:
  REG:56 STACK:8 SHARED:0 LOCAL:16 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_80

Resource usage:
 Common:
  GLOBAL:0
 Function _ZN8fastshap12_GLOBAL__N_119mask_patches_kernelIffLi4EEEvPKf:
  REG:41 STACK:0 SHARED:528 LOCAL:0 CONSTANT[0]:624 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SPILLING = """
template <int count>
__global__ void kernel(const float* x, float* y) {
  __shared__ float all[132];
  float kept[count];
#pragma unroll
  for (int i = 0; i < count; ++i) all[i % 132] = kept[i] = x[threadIdx.x * count + i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < count; ++i) y[threadIdx.x * count + i] = kept[i] * kept[(i + 7) % count] + all[131 - i % 132];
}
template __global__ void kernel<8>(const float*, float*);
template __global__ void kernel<96>(const float*, float*);
"""


def test_the_usage_is_read_by_kernel_the_most_of_any_instantiation(monkeypatch):
    monkeypatch.setattr(resources, "cuobjdump", lambda *arguments: USAGE)
    monkeypatch.setattr(cuda_kernels, "_missing_instructions", lambda file, wanted: [])
    found, problems = cuda_kernels.read("mask_patches")
    # From sm_90 on the system keeps 1024 bytes of the shared memory that cuobjdump counts.
    assert found == {
        "sm_90": {"mask_patches: mask_patches_kernel": Resources(56, 528, 24)},
        "sm_80": {"mask_patches: mask_patches_kernel": Resources(41, 528, 0)},
    }
    assert problems == []


def test_the_usage_is_that_of_the_compilers_report_and_tells_spills(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90)]
    command = ["nvcc", "-O3", "-maxrregcount=32", "-Xptxas=-v", *architectures, "-c", source, "-o", tmp_path / "x.o"]
    report = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stderr
    pattern = (
        r"entry function '(\w+)' for '(sm_\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, \d+ bytes spill "
        r"loads.*?Used (\d+) registers.*? (\d+) bytes smem"
    )
    told = {
        (architecture, symbol): (Resources(int(registers), int(shared), int(stack)), int(spills))
        for symbol, architecture, stack, spills, registers, shared in re.findall(pattern, report, re.DOTALL)
    }
    assert len(told) == 4
    assert {key for key, (_, spills) in told.items() if spills} == {key for key in told if "Li96E" in key[1]}
    read = {(architecture, symbol): found for architecture, symbol, found in resources.usage(tmp_path / "x.o")}
    assert read == {key: found for key, (found, _) in told.items()}
    assert all((read[key].local > 0) == (spills > 0) for key, (_, spills) in told.items())


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
    found = {"sm_90": {"a": Resources(40, 0, 24), "b": Resources(40)}}
    monkeypatch.setattr(cuda_kernels, "read", lambda only: (found, []))
    _, problems = compile_gate.measure(["cuda"], None)
    assert problems == ["cuda sm_90 a: 24 bytes of local memory, where registers spill"]


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
