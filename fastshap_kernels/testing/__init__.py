"""Cases of every op, and what must hold of them: for whoever brings an op to another backend.

    from fastshap_kernels import testing

    def my_coalition_sum(features, bits):  # the op's tensors, and its options where it has any
        ...

    for seed in range(20):
        case = testing.make("coalition_sum", seed, torch.bfloat16, "cuda", **testing.sizes("coalition_sum", seed))
        testing.check_accuracy(case, my_coalition_sum)  # output and gradients against float64
        testing.check_repeatable(case, my_coalition_sum)

`OPS` names the ops, `Case` says what a case holds, `assert_accurate` how close is close enough.
"""

from .accuracy import assert_accurate, assert_all_accurate, spread
from .cases import OPS, SIZES, Case, Draw, backends, make, sizes
from .checks import (
    assert_same,
    check_accuracy,
    check_repeatable,
    cotangents,
    expected,
    outputs,
    plain_pytorch,
)

__all__ = [
    "OPS",
    "SIZES",
    "Case",
    "Draw",
    "assert_accurate",
    "assert_all_accurate",
    "assert_same",
    "backends",
    "check_accuracy",
    "check_repeatable",
    "cotangents",
    "expected",
    "make",
    "outputs",
    "plain_pytorch",
    "sizes",
    "spread",
]
