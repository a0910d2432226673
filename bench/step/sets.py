"""Which training steps python -m bench.step measures: sets of configurations, the most important first."""

from __future__ import annotations

from dataclasses import dataclass, replace

#: Ways to the same step; what each does is in ways.py.
OURS = ("packed", "packed-compiled")
PLAIN = ("plain", "plain-compiled")
EAGER = ("dense-pixel", "dense-mask", "packed")
COMPILED = ("dense-compiled", "dense-pixel-compiled", "packed-compiled")
#: A convolutional network has no attention to mask; what is compiled is dense-pixel.
CONVOLUTIONAL = ("dense-pixel", "dense-compiled", "packed")


@dataclass(frozen=True)
class Step:
    """One step: forward and backward, without the optimiser's update.

    mode: "value", v(S) of every coalition without gradient, in evaluation mode; "detached", the joint step with
    detached targets and the masked task; "live", the same with gradients through the targets.
    dtype: "float32"; "bfloat16", a model in bfloat16; "autocast", a float32 model under autocast to bfloat16.
    """

    model: str
    batch: int
    coalitions: int
    mode: str
    dtype: str = "float32"
    image_size: int = 224
    classes: int = 1000
    ways: tuple[str, ...] = EAGER
    #: Whether the peak of a step's memory is measured on the processor too, in a process of its own; on a GPU it is
    #: always.
    memory: bool = False
    #: Seconds of measuring, all ways together, and the fewest turns of each way.
    seconds: float = 10.0
    rounds: int = 5


def bars(device: str) -> list[Step]:
    """What the project's promises are about."""
    if device == "cpu":
        value = Step("ViT-S/16", 4, 8, "value", rounds=7)
        return [
            Step("ViT-S/16", 4, 4, "detached", memory=True),
            value,
            replace(value, dtype="bfloat16"),
            replace(value, dtype="autocast"),
            Step("ViT-S/16", 4, 2, "detached", ways=("plain", "packed")),
        ]
    value = Step("ViT-B/16", 32, 32, "value", "bfloat16", seconds=4)
    return [
        replace(value, dtype="autocast", ways=(*EAGER, *COMPILED)),
        value,
        Step("ViT-B/16", 64, 8, "detached", "autocast", ways=(*EAGER, *COMPILED), seconds=8),
        Step("ResNet-50", 32, 32, "value", "autocast", ways=("dense-pixel", "packed"), seconds=4),
        Step("ResNet-50", 32, 32, "value", "bfloat16", ways=CONVOLUTIONAL, seconds=4),
        Step("ViT-B/16", 64, 2, "detached", "autocast", ways=(*PLAIN, *OURS), seconds=6),
        # Whether the ways agree can be seen in float32 only.
        *(Step("ViT-B/16", 4, 4, mode, ways=("dense-mask", "packed"), seconds=1) for mode in ("value", "detached")),
    ]


def growth(device: str) -> dict[str, list[Step]]:
    """Joint steps in which one size grows: players, coalitions, classes, images.

    No step is in two series: what is compared is measured one after the other.
    """
    ways = ("dense-mask", "packed")
    if device == "cpu":
        few = Step("ViT-Ti/16", 2, 2, "detached", ways=ways, seconds=3, rounds=3)
        small = replace(few, image_size=112)
        sizes, images = (112, 160, 224, 320, 512), (4, 8, 16, 32)
        return {
            "P": [replace(few, image_size=size) for size in sizes],
            "M": [replace(small, coalitions=m, batch=1) for m in (2, 8, 32, 128, 256)],
            "K": [replace(small, classes=k) for k in (10, 100, 2000, 21841)],
            "B": [replace(small, batch=b) for b in images],
        }
    few = Step("ViT-S/16", 16, 8, "detached", "autocast", ways=ways, seconds=2)
    return {
        "P": [replace(few, image_size=size) for size in (112, 160, 224, 320, 448, 512)],
        "M": [replace(few, coalitions=m, batch=4) for m in (2, 8, 32, 128, 256)],
        "K": [replace(few, classes=k) for k in (10, 100, 2000, 21841)],
        "B": [replace(few, batch=b) for b in (8, 24, 32, 64)],
    }


def full(device: str) -> list[Step]:
    """Every model, M and mode, the bars first."""
    cpu = device == "cpu"
    precision = "float32" if cpu else "autocast"
    images = {2: 4, 8: 2, 32: 1} if cpu else {2: 64, 8: 32, 32: 8}
    steps = bars(device) + [step for series in growth(device).values() for step in series]
    for mode in ("detached", "value", "live"):
        for m, batch in images.items():
            for model in ("ViT-S/16", "ViT-B/16", "ViT-Ti/16", "ResNet-50"):
                compiled = "dense-compiled" if cpu else "packed-compiled"
                ways = CONVOLUTIONAL if model == "ResNet-50" else (*EAGER, compiled)
                plain = () if mode == "value" else ("plain",)
                seconds = 10 if cpu else 2
                steps.append(
                    Step(model, batch, m, mode, precision, ways=(*ways, *plain), memory=True, seconds=seconds, rounds=3)
                )
    return list(dict.fromkeys(steps))


def tiny(_device: str) -> list[Step]:
    """Both families in every mode, in seconds: for the tests of this program."""
    vit = Step("tiny ViT", 2, 2, "detached", image_size=16, classes=5, seconds=0.05, rounds=2)
    cnn = replace(vit, model="tiny ResNet", image_size=64, ways=("dense-pixel", "packed"))
    return [
        replace(vit, ways=("dense-pixel", "dense-mask", "dense-compiled", "packed", "plain")),
        replace(vit, mode="value"),
        replace(vit, mode="live", ways=("dense-mask", "packed-compiled", "packed")),
        replace(vit, mode="value", dtype="bfloat16"),
        replace(vit, dtype="autocast", ways=("packed",), memory=True),
        cnn,
        replace(cnn, mode="value"),
    ]


def steps_of(name: str, device: str) -> list[Step]:
    """The steps of a set."""
    if name == "growth":
        return [step for series in growth(device).values() for step in series]
    return {"bars": bars, "full": full, "tiny": tiny}[name](device)
