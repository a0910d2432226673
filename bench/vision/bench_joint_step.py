"""One training step, forward and backward: packed coalitions against dense masked ones, with the same loss.

`python -m bench.step` measures the step in every way.
"""

import pytest
import torch

from bench.step.sets import Step
from bench.step.ways import make_call, make_setting

SMALL = Step("ViT-Ti/16", 2, 4, "detached", image_size=112, classes=100)


@pytest.mark.parametrize("step", [Step("ViT-S/16", 4, 4, "detached"), pytest.param(SMALL, marks=pytest.mark.short)])
def test_joint_step(pair, step):
    setting = make_setting(step, torch.device("cpu"))
    packed, dense = (make_call(way, setting) for way in ("packed", "dense-mask"))
    torch.testing.assert_close(packed(), dense(), rtol=1e-4, atol=0)
    shape = f"{step.model} at {step.image_size}, B {step.batch}, M {step.coalitions}, float32"
    op = "small joint training step" if step is SMALL else "joint training step"
    pair(op, shape, "dense masked coalitions, same loss", packed, dense, rounds=7, warmup=0)
