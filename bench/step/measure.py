"""The same training step in several ways: python -m bench.step --device cpu|cuda --set bars|growth|full.

Writes bench/results/steps/<processor>.json, or bench/results/<device>/step-<date>-<commit>.json for a GPU, after
every step, and a plot of how time grows. Steps that the file has, all ways of them, are kept: a run that was cut off
goes on. `--anew` measures the set again. What the ways are: ways.py; the sets: sets.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

import fastshap_kernels as fk
import fastshap_vision as fv
from bench.gpu.measure import default_path
from bench.lib import machine
from bench.lib.machine import ROOT
from bench.lib.memory import peak_on_gpu
from bench.lib.results import RESULTS, STEPS, Results
from bench.lib.run import measure_all
from bench.lib.timer import Timer
from bench.step.figures import KEY, judge, series, setting_of
from bench.step.flops import step_flops
from bench.step.memory import peak_in_process
from bench.step.plot import plot
from bench.step.sets import Step, steps_of
from bench.step.ways import MASKED_TASK_WEIGHT, REGRESSION_WEIGHT, Setting, make_call, make_setting
from fastshap_vision._runtime.onednn_linear import cpu_linears

METHOD = (
    "Forward and backward, without the optimizer's update; value: coalition values alone, no gradient, evaluation "
    f"mode. Loss: task + {REGRESSION_WEIGHT:g} regression + {MASKED_TASK_WEIGHT:g} masked task. The ways of a step go "
    "by turns in one process, each turn from an idle device to an idle device, the host's part included: median, 20th "
    "and 80th percentile of ms. times_packed: ms_p50 over packed's. bfloat16: a model in bfloat16; autocast: a float32 "
    "one under autocast to bfloat16. peak_mb: what a step allocates at its peak beyond state_mb, its gradients "
    "included; on the processor the growth of resident memory in a fresh process, and state_mb the parameters, buffers "
    "and images. Processor times are taken with memory that is freed kept by the process, for all ways alike; peaks "
    "without. tflop_s: FLOPs of present tokens, all blocks, backward twice the forward; of_ceiling: over the rate of "
    "products of square matrices in the dtype. difference: from packed, before timing; of values the largest, of "
    "losses relative: in float32 a way is not timed where it is above 1e-5 and 1e-4. gradient_difference: on two "
    "images, in float32, the largest over the parameters of |dense - packed| / |dense|, those left out whose gradient "
    "is less than 1e-5 of all. Steps measured in several visits, minutes apart: all rows of the visit in which packed "
    "was quickest, since a shared machine's other guests only add time."
)

#: Where float32 ways that evaluate the same game must agree.
MOST_DIFFERENT = {"value": 1e-5, "detached": 1e-4, "live": 1e-4}


class Measuring:
    """One run over the steps."""

    def __init__(self, results: Results, device: torch.device, backend: str) -> None:
        self.results, self.device, self.backend = results, device, backend
        self.failed: list[str] = []
        self.quickest: dict[Step, float] = {}

    def step(self, step: Step) -> None:
        """Measures all ways of a step and writes their rows."""
        setting = make_setting(step, self.device)
        about = setting_of(step) | _sizes(setting)
        gflop = step_flops(setting.model, setting.bits, step.mode) / 1e9
        fields: dict[str, dict[str, Any]] = {way: {} for way in step.ways}
        calls: dict[str, Callable[[], Tensor]] = {}
        outcomes: dict[str, Tensor] = {}
        gradients = self._gradient_difference(setting) if step.dtype == "float32" and step.mode != "value" else {}
        for way in step.ways:
            try:
                call = make_call(way, setting, self.backend)
                outcomes[way], memory = self._first_call(call, setting)
                fields[way] |= memory
                calls[way] = call
            except Exception as error:
                self._fail(step, way, fields[way], error)
        for way in list(calls):
            fields[way] |= _difference(way, outcomes, setting)
            most = MOST_DIFFERENT[step.mode] if step.dtype == "float32" else float("inf")
            if fields[way].get("difference", 0.0) > most:
                self._fail(step, way, fields[way], ArithmeticError(f"not the same game as packed: {fields[way]}"))
                del calls[way]
        if step.memory and self.device.type == "cpu":
            for way in calls:
                megabytes = peak_in_process(step, way, self.backend)
                fields[way] |= {"peak_mb": megabytes, "state_mb": _state_mb(setting)}
        times_of = Timer(self.device, step.seconds, step.rounds, by="wall").measure(calls)
        for way, times in times_of.items():
            fields[way] |= times.fields() | {"images_s": step.batch / times.median * 1e3}
            if "packed" in times_of:
                fields[way]["times_packed"] = times.median / times_of["packed"].median
            if not way.startswith("plain"):  # which evaluates no coalitions
                fields[way] |= self._rates(step, gflop, fields[way]["ms_p50"])
        if gradients and "packed" in fields:
            fields["packed"] |= gradients
        ours = fields.get("packed", {}).get("ms_p50", float("inf"))
        if ours > self.quickest.get(step, float("inf")):
            return
        self.quickest[step] = ours
        self.results.replace([about | {"way": way} | found for way, found in fields.items()])
        self.results.write()

    def _first_call(self, call: Callable[[], Tensor], setting: Setting) -> tuple[Tensor, dict[str, float]]:
        """Compiles, if there is anything to: the outcome; on a GPU, the memory that a step takes."""
        if self.device.type != "cuda":
            return call(), {}

        def twice() -> Tensor:  # what the first call captures stays, and its pools count too
            call()
            setting.model.zero_grad(set_to_none=True)
            return call()

        setting.model.zero_grad(set_to_none=True)
        outcome, peak, before = peak_on_gpu(twice, self.device)
        return outcome, {"peak_mb": peak / 1e6, "state_mb": before / 1e6}

    def _gradient_difference(self, setting: Setting) -> dict[str, float]:
        """How far the gradients of packed and of the same loss in a dense way are apart."""
        few, found = setting.first(2), {}
        for way in ("packed", "dense-mask" if setting.is_transformer else "dense-pixel"):
            make_call(way, few)()
            found[way] = [x.grad for x in few.model.parameters() if x.grad is not None]
        packed, dense = found.values()
        # What is 0 but for rounding, such as that of a bias that the shares' zero sum cancels, tells nothing.
        least = 1e-5 * torch.stack([x.norm() for x in dense]).norm()
        pairs = [(x, y) for x, y in zip(packed, dense, strict=True) if y.norm() > least]
        worst = max(float((x - y).norm() / y.norm()) for x, y in pairs)
        few.model.zero_grad(set_to_none=True)
        return {"gradient_difference": worst}

    def _rates(self, step: Step, gflop: float, milliseconds: float) -> dict[str, float]:
        dtype = "float32" if step.dtype == "float32" else "bfloat16"
        rate = gflop / milliseconds
        return {
            "coalitions_s": step.batch * step.coalitions / milliseconds * 1e3,
            "gflop": gflop,
            "tflop_s": rate,
            "of_ceiling": rate / self.results.content["ceilings"][f"{dtype}_tflop_s"],
        }

    def _fail(self, step: Step, way: str, fields: dict[str, Any], error: Exception) -> None:
        fields["error"] = machine.describe(error)
        self.failed.append(f"{describe(step)}, {way}: {fields['error']}")
        print(self.failed[-1], flush=True)


def same_game(way: str, setting: Setting) -> bool:
    """Whether a way's values and loss are packed's: pixels removed are no tokens dropped."""
    return not way.startswith("plain") and not (setting.is_transformer and way.startswith("dense-pixel"))


def _difference(way: str, outcomes: dict[str, Tensor], setting: Setting) -> dict[str, float]:
    if way == "packed" or "packed" not in outcomes or not same_game(way, setting):
        return {}
    ours, theirs = outcomes["packed"].double(), outcomes[way].double()
    worst = float((ours - theirs).abs().max())
    return {"difference": worst if setting.step.mode == "value" else worst / float(theirs.abs())}


def _sizes(setting: Setting) -> dict[str, int]:
    """P, and the tokens (or images) that all sequences hold together."""
    model, step = setting.model, setting.step
    present = int(fk.unpack_bits(setting.bits, model.players).sum())
    images = 0 if step.mode == "value" else step.batch
    if not setting.is_transformer:
        return {"players": model.players, "tokens": images + step.batch * step.coalitions}
    prefix = model.backbone.num_prefix_tokens
    coalitions = present + step.batch * step.coalitions * prefix
    return {"players": model.players, "tokens": coalitions + images * (model.players + prefix)}


def _state_mb(setting: Setting) -> float:
    tensors = [*setting.model.parameters(), *setting.model.buffers(), setting.images]
    return sum(x.nbytes for x in tensors) / 1e6


def describe(step: Step) -> str:
    size = f"at {step.image_size}, B {step.batch}, M {step.coalitions}, K {step.classes}"
    return f"{step.model} {size}, {step.mode}, {step.dtype}"


def in_onednn(a: Tensor, b: Tensor) -> Tensor:
    """The other library that PyTorch carries."""
    with cpu_linears(a):
        return linear(a, b)


def prepare(results: Results, device: torch.device, tiny: bool, anew: bool) -> None:
    """The header; with the ceilings, where the file has none or all is measured anew."""
    about = machine.header(device) | {"kind": device.type, "method": METHOD}
    if device.type == "cpu":
        about["device"] = f"{about['threads']} cores of {about['device']}"
    results.content |= about
    if anew or "ceilings" not in results.content:
        side = 64 if tiny else 2048 if device.type == "cpu" else 8192
        timer = Timer(device, 2.0, 5, by="wall")
        results.content["ceilings"] = timer.ceilings(side, 64 * side**2, *([in_onednn] if device.type == "cpu" else []))


def output_path(chosen: Path, device: torch.device) -> Path:
    if chosen.suffix == ".json":
        return chosen
    if device.type == "cpu":
        return chosen / STEPS.name / f"{machine.processor_slug()}.json"
    return default_path(chosen, device, "step-")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--set", default="bars", choices=["bars", "growth", "full", "tiny"])
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder, or a .json file")
    parser.add_argument(
        "--plot", type=Path, help="the figure of growth; default docs/step_growth.png or a GPU's results"
    )
    parser.add_argument("--anew", action="store_true", help="measure the set again, also what the file has")
    parser.add_argument("--visits", type=int, default=1, help="times that the set is measured; each step's best counts")
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no step after this time.time()")
    parser.add_argument("--seconds", type=float, help="of measuring a step, in the place of the set's")
    parser.add_argument("--compile-backend", default="inductor")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    path = output_path(options.output, device)
    results = Results(path, KEY, lambda rows: judge(rows, device.type))
    prepare(results, device, options.set == "tiny", options.anew)
    measuring = Measuring(results, device, options.compile_backend)
    fv.keep_freed_memory()
    steps = [step for step in steps_of(options.set, device.type) if options.anew or not is_measured(step, results)]
    if options.seconds is not None:
        steps = [replace(step, seconds=options.seconds, rounds=2) for step in steps]
    left_out = measure_all(results, steps * options.visits, measuring.step, describe, device, options.until)
    print(results.summary("ms_p50", "times_packed", "coalitions_s", "of_ceiling", "peak_mb"), left_out, path, sep="\n")
    if series(results.rows, device.type):
        default = ROOT / "docs" / "step_growth.png" if device.type == "cpu" else path.with_suffix(".png")
        plot(results.content, options.plot or default)
    sys.exit(bool(results.content["left_out"] or measuring.failed))


def is_measured(step: Step, results: Results) -> bool:
    """Whether the file has all ways of a step, and none failed: they are compared within one run only."""
    about = setting_of(step)
    found = {
        row["way"]
        for row in results.rows
        if "error" not in row and all(row[name] == value for name, value in about.items())
    }
    return found >= set(step.ways)
