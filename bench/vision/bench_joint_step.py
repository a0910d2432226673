"""One training step, forward and backward: packed coalitions against dense masked ones, with the same loss.

`python -m bench.step` measures the step in every way.
"""

import torch

from bench.step.sets import Step
from bench.step.ways import make_call, make_setting


def test_joint_step(pair):
    setting = make_setting(Step("ViT-S/16", 4, 4, "detached"), torch.device("cpu"))
    packed, dense = (make_call(way, setting) for way in ("packed", "dense-mask"))
    torch.testing.assert_close(packed(), dense(), rtol=1e-4, atol=0)
    shape, against = "ViT-S/16 at 224, B 4, M 4, float32", "dense masked coalitions, same loss"
    pair("joint training step", shape, against, packed, dense, rounds=7, warmup=0)
