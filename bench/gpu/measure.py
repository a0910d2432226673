"""Measures every op on a GPU beside its rivals: python -m bench.gpu; results in bench/results/<device>/.

The file is written after every row. `--resume` goes on with a file that exists; `--only OP` measures one op anew. A
kernel that breaks the CUDA context is recorded with its error, and the measuring goes on in a process of its own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch

from bench.gpu.figures import KEY, judge
from bench.gpu.floors import floors
from bench.lib import machine
from bench.lib.machine import ROOT
from bench.lib.memory import peak_on_gpu
from bench.lib.results import RESULTS, Results
from bench.lib.rows import Provider, Row
from bench.lib.run import clean_up, measure_all
from bench.lib.timer import Call, Timer, synchronize
from fastshap_kernels import testing

METHOD = (
    "ms between CUDA events around one call: median, 20th and 80th percentile. Before it the device reads 256 MB, so "
    "that no input is in its L2 cache, and spins until the host has queued the call, whose own time is host_ms. The "
    "providers of a row go by turns in one process. forward keeps what backward needs. peak_mb: beyond the inputs, "
    "with what the call returns, returned_mb. Bytes: each input read once and each output written once. floor_ms: the "
    "larger of bytes at the speed of a copy of 1 GiB, and FLOPs at that of a product of 8192 x 8192 matrices in the "
    "row's dtype; of_ceiling: floor_ms / ms_p50. max_error: largest difference from float64 over the largest value."
)


def all_rows(tiny: bool = False) -> list[Row]:
    """Every row of every op, what the targets are about first."""
    modules = [import_module(f"bench.ops.{path.stem}") for path in sorted((ROOT / "bench" / "ops").glob("bench_*.py"))]
    found = [row for module in modules if hasattr(module, "gpu_rows") for row in module.gpu_rows(tiny)]
    found = [replace(row, compiled=row.compiled and not tiny) for row in found]
    return sorted(found, key=lambda row: not (row.compiled or row.op in ("sample_coalitions", "packed_attention")))


def default_path(folder: Path, device: torch.device, kind: str = "") -> Path:
    """<device>/<kind><date>-<commit>.json."""
    name = f"{kind}{machine.now('%Y-%m-%d')}-{machine.commit()}.json"
    return folder / machine.slug(machine.device_name(device)) / name


def describe(row: Row) -> str:
    return f"{row.op}, {row.shape}, {row.dtype}"


def largest_error(outputs: list[Tensor], exact: list[Tensor], mode: str) -> float:
    """Relative to the largest exact value; of bits, whether any differ."""
    if not exact[0].is_floating_point():
        return float(not torch.equal(outputs[0], exact[0]))
    pairs = list(zip(outputs, exact, strict=False))[mode == "backward" :]
    return max(float((x.double() - y).abs().max() / y.abs().max().clamp_min(1e-300)) for x, y in pairs)


class Measuring:
    """One run over the rows."""

    def __init__(self, timer: Timer, results: Results) -> None:
        self.timer, self.results = timer, results
        self.ceilings: dict[str, float] = results.content["ceilings"]

    def row(self, row: Row) -> None:
        """Measures what the results don't have yet of a row."""
        case = row.case(self.timer.device)
        makers = row.providers(case)
        built: dict[str, Provider] = {}
        exact: list[Tensor] = []
        for mode in row.modes:
            about = {"op": row.op, "mode": mode, "dtype": str(row.dtype).removeprefix("torch."), "shape": row.shape}
            missing = [name for name in makers if not self.results.has(about | {"backend": name})]
            if not missing:
                continue
            exact = exact or testing.expected(case)
            fields: dict[str, dict[str, Any]] = {name: {} for name in missing}
            calls: dict[str, Call] = {}
            for name in missing:
                if self._broke_the_context(row.op, name):
                    fields[name]["error"] = "not tried again: this op and backend broke the CUDA context"
                    continue
                try:
                    built[name] = built.get(name) or makers[name]()
                    call, outputs = built[name].calls(mode)
                    if built[name].align is not None:
                        fields[name]["max_error"] = largest_error(built[name].align(outputs()), exact, mode)
                    fields[name] |= self._warm_up(call)
                    calls[name] = call
                except Exception as error:
                    self._fail(about | {"backend": name}, fields[name], error)
            for name, times in self.timer.measure(calls).items():
                fields[name] = times.fields() | {"host_ms": statistics.median(times.host)} | fields[name]
            for name, found in fields.items():
                against = self._against_ceiling(row, case, mode, found["ms_p50"]) if "ms_p50" in found else {}
                self.results.rows.append(about | {"backend": name} | found | against)
            self.results.write()

    def _warm_up(self, call: Call) -> dict[str, float]:
        """Compiles, if there is anything to; on a GPU, the MB at the peak beyond the inputs, and those returned."""
        for _ in range(3):
            call()
        synchronize(self.timer.device)
        if not self.timer.cuda:
            return {"peak_mb": 0.0, "returned_mb": 0.0}
        returned, peak, _ = peak_on_gpu(call, self.timer.device)
        tensors = returned if isinstance(returned, list) else [returned]
        return {"peak_mb": peak / 1e6, "returned_mb": sum(x.nbytes for x in tensors) / 1e6}

    def _against_ceiling(self, row: Row, case: testing.Case, mode: str, milliseconds: float) -> dict[str, float]:
        moved, flops = floors(row, case).get(mode, (0.0, 0.0))
        matmul = self.ceilings.get(f"{str(row.dtype).removeprefix('torch.')}_tflop_s")
        floor = max(moved / 1e6 / self.ceilings["copy_gb_s"], flops / 1e9 / matmul if matmul else 0.0)
        found = {"gb_s": moved / 1e6 / milliseconds} if moved else {}
        if flops:
            found["tflop_s"] = flops / 1e9 / milliseconds
        return found | ({"floor_ms": floor, "of_ceiling": floor / milliseconds} if floor else {})

    def _broke_the_context(self, op: str, backend: str) -> bool:
        found = (row for row in self.results.rows if row.get("broke_context"))
        return any(row["op"] == op and row["backend"] == backend for row in found)

    def _fail(self, about: dict[str, Any], fields: dict[str, Any], error: Exception) -> None:
        """Keeps the error; where the CUDA context is lost with it, goes on in a process of its own."""
        fields["error"] = machine.describe(error)
        print(f"{about}: {fields['error']}", flush=True)
        try:
            torch.zeros(1, device=self.timer.device)
            synchronize(self.timer.device)
        except Exception:
            self.results.rows.append(about | fields | {"broke_context": True})
            self.results.write()
            arguments = [*sys.argv[1:], *([] if "--resume" in sys.argv else ["--resume"])]
            os.execv(sys.executable, [sys.executable, "-m", "bench.gpu", *arguments])


def warm_up(chosen: list[Row], device: torch.device) -> None:
    """Fills the caches of Triton and torch.compile."""
    for row in chosen:
        for name, make in row.providers(row.case(device)).items():
            try:
                make().calls(row.modes[-1])[0]()
            except Exception as error:
                print(f"{describe(row)}, {name}: {machine.describe(error)}", flush=True)
        clean_up(device)


def prepare(results: Results, timer: Timer, only: list[str], resume: bool, tiny: bool) -> None:
    """The header; with the ceilings, measured once a file."""
    if not resume:
        for op in only or testing.OPS:
            results.drop(op)
    results.content |= machine.header(timer.device) | {"method": METHOD}
    if not (resume and "ceilings" in results.content):
        results.content["ceilings"] = timer.ceilings(64, 2**16) if tiny else timer.ceilings(8192, 2**29)
    results.write()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder, or a .json file")
    parser.add_argument("--only", action="append", default=[], choices=list(testing.OPS), metavar="OP")
    parser.add_argument("--resume", action="store_true", help="keep the rows that the file has")
    parser.add_argument("--warm-up", action="store_true", help="compile everything, measure nothing")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no row after this time.time()")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try this program itself")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    # A graph that is kept to time its backward pass alone must keep its buffers.
    functorch.donated_buffer = False
    chosen = [row for row in all_rows(options.tiny) if not options.only or row.op in options.only]
    if options.warm_up:
        warm_up(chosen, device)
        return
    path = options.output if options.output.suffix == ".json" else default_path(options.output, device)
    timer = Timer(device, 0.01, 5) if options.tiny else Timer(device, 0.25)
    results = Results(path, KEY, judge)
    prepare(results, timer, options.only, options.resume, options.tiny)
    measuring = Measuring(timer, results)
    left_out = measure_all(results, chosen, measuring.row, describe, device, options.until)
    print(results.summary("ms_p50", "of_ceiling", "peak_mb", "max_error"), left_out, path, sep="\n")
    ours_failed = [r for r in results.rows if "error" in r and r["backend"] in ("triton", "cuda", "cpu")]
    sys.exit(bool(results.content["left_out"] or ours_failed))
