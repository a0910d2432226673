"""The one table of targets: what is promised of each measurement, and how it stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """A figure by its name, and the bar that it must reach, or stay under."""

    what: str
    bar: float
    at_most: bool = False

    @property
    def promise(self) -> str:
        return f"{'at most' if self.at_most else 'at least'} {self.bar:g}"

    def met(self, figure: float | None) -> bool | None:
        return None if figure is None else bool(figure <= self.bar if self.at_most else figure >= self.bar)


STREAMING = ("mask_patches", "pack_tokens", "segment_sum", "layer_norm_segment_sum", "coalition_sum")
#: How far above the best post-hoc method: the paper's figure.
LEAD = 1.127


def _step(batches: str) -> tuple[Target, ...]:
    """What is promised of steps on any device."""
    line = "largest ratio to a straight line"
    return (
        Target("growth from P 49 to 196: time over linear in total tokens", 1.15, True),
        Target(f"growth with B from {batches}: {line}", 1.15, True),
        Target(f"growth with M from 2 to 256: {line}", 1.15, True),
        Target(f"growth with K from 10 to 21841: {line}", 1.15, True),
        Target("v(S) of packed and dense: largest difference, float32", 1e-5, True),
        Target("loss of packed and dense: relative difference, float32", 1e-4, True),
        Target("gradients of packed and dense: largest relative difference of a parameter's, float32", 1e-4, True),
    )


_VALUE, _JOINT = "ViT-S/16 at 224, v(S), M 8, ", "ViT-S/16 at 224, joint step, M 4, float32: "
_GPU_VALUE, _GPU_JOINT = "ViT-B/16 at 224, v(S), M 32, bfloat16: ", "ViT-B/16 at 224, joint step, B 64, M 8, bfloat16: "

TARGETS: dict[str, tuple[Target, ...]] = {
    # Times as fast as the plain version, by op, or by op and what it is set against.
    "pairs": (
        Target("coalition_sum", 1.0),
        Target("exact_shapley", 1.0),
        Target("joint training step", 2.0),
        Target("kernel_shap", 1.0),
        Target("linear_shapley_loss", 3.0),
        Target("linear_shapley_loss, peak memory", 10.0),
        Target("mask_patches", 3.0),
        Target("mask_patches, a copy of the same bytes", 0.5),
        Target("sample_coalitions, paired", 10.0),
        Target("sample_coalitions, unpaired", 10.0),
        Target("shapley_regression_loss", 1.5),
    ),
    "gpu": (
        Target("sample_coalitions, forward: ms", 0.2, True),
        Target("sample_coalitions, forward: times as fast as argsort", 50.0),
        *(
            Target(f"packed_attention, {mode}: times as fast as {rival}", bar)
            for mode in ("forward", "backward")
            for rival, bar in (("varlen_attn", 1.2), ("masked SDPA", 2.2))
        ),
        Target("linear_shapley_loss, both: times as fast as eager", 5.0),
        Target("linear_shapley_loss, both: times less memory than eager", 10.0),
        Target("linear_shapley_loss, both: times less memory than eager, beyond the gradients returned", 10.0),
        Target("shapley_regression_loss, M 32, both: times as fast as eager or reference", 2.0),
        Target("shapley_regression_loss, M 32, both: times as fast as eager or reference, compiled", 1.3),
        *(
            Target(f"{op}, {mode}: share of copy bandwidth", 0.8)
            for op in STREAMING
            for mode in ("forward", "backward")
        ),
    ),
    "step, cpu": (
        Target(f"{_VALUE}float32: times as fast as dense-pixel", 2.4),
        Target(f"{_VALUE}float32: times as fast as dense-mask", 2.4),
        Target(f"{_VALUE}bfloat16: times as fast as dense-pixel", 2.2),
        Target(f"{_VALUE}bfloat16: times as fast as dense-mask", 2.2),
        Target(f"{_JOINT}times as fast as the faster dense way", 2.0),
        Target(f"{_JOINT}peak memory over the lower dense one's", 0.6, True),
        Target("ViT-S/16 at 224, joint step, M 2: time over that of a plain training step", 2.2, True),
        *_step("4 to 32"),
    ),
    "step, cuda": (
        Target(f"{_GPU_VALUE}coalitions/s", 12000),
        Target(f"{_GPU_VALUE}times as fast as dense-mask", 3.0),
        Target(f"{_GPU_VALUE}times as fast as dense-compiled", 2.0),
        Target(f"{_GPU_JOINT}times as fast as dense-compiled", 2.0),
        Target(f"{_GPU_JOINT}peak memory over the lower dense one's", 0.6, True),
        Target("ResNet-50 at 224, v(S), M 32, bfloat16: times as fast as dense-pixel", 1.5),
        Target("ViT-B/16 at 224, joint step, M 2: time over that of a plain training step", 2.2, True),
        *_step("8 to 64"),
    ),
    "fidelity": tuple(
        Target(f"{network}: {what}", bar)
        for network, r2 in (("ViT", 0.90), ("CNN", 0.85))
        for what, bar in (
            ("accuracy minus plain, points", -0.3),
            ("R², all classes", r2),
            ("correlation, predicted class", 0.95),
            ("as accurate as KernelSHAP with evaluations", 2048),
            ("times as fast as KernelSHAP, 2048", 500),
            *(
                (f"{figure}, {removal}: over the best {rivals} method's", LEAD)
                for removal in ("own removal", "grey pixels")
                for figure in ("insertion − deletion", "AOPC")
                for rivals in ("post-hoc", "gradient or attention")
            ),
            ("R² minus FastSHAP's, each of the game that it learned", 0.0),
            ("insertion − deletion minus FastSHAP's, in the classifier's game", 0.0),
        )
    ),
}


def judge(kind: str, figures: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """Every target of a kind beside its figure; None where it was not measured.

    Raises:
        KeyError: for a figure that no target is about.
    """
    unknown = set(figures) - {target.what for target in TARGETS[kind]}
    if unknown:
        raise KeyError(f"no target of {kind!r} is about {sorted(unknown)}")
    rows = []
    for target in TARGETS[kind]:
        measured = figures.get(target.what)
        row = {"what": target.what, "promise": target.promise, "bar": target.bar, "measured": measured}
        rows.append(row | {"met": target.met(measured)})
    return rows


def lines(bars: list[dict[str, Any]]) -> list[str]:
    """What became of each target, as text."""
    words = {True: "met ", False: "MISS", None: "?   "}
    return [f"{words[bar['met']]} {bar['what']}: {shown(bar['measured'])} ({bar['promise']})" for bar in bars]


def shown(figure: float | None) -> str:
    return "not measured" if figure is None else f"{figure:.4g}"
