"""Numbers of NumPy's, and what no argument takes, given to every function of fastshap_vision that the fuzz calls."""

import random

import malformed
import numpy as np
import pytest
import vision_calls

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

CALLS = {name: call for name, call in vision_calls.CALLS.items() if call.arguments()}
ARGUMENTS = [(name, argument) for name, call in CALLS.items() for argument in call.arguments()]
COUNTS = [(name, argument) for name, argument in ARGUMENTS if type(CALLS[name].arguments()[argument]) is int]


@pytest.mark.parametrize(("name", "argument"), COUNTS)
def test_a_whole_number_of_numpys_is_one(name, argument):
    call = CALLS[name]
    arguments = call.make(random.Random(0))
    value = arguments[argument]
    for kind in (np.int8, np.int64, np.uint64) if value < 128 else (np.int64, np.uint64):
        assert malformed.try_call(call, arguments | {argument: kind(value)}) == ("served", "")


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize(
    "value", [object(), 1j, b"x", -(10**400), np.arange(3) > 0], ids=["object", "complex", "bytes", "huge", "array"]
)
def test_what_nothing_takes_is_refused_by_name(name, argument, value):
    call = CALLS[name]
    ended, said = malformed.try_call(call, call.make(random.Random(0)) | {argument: value})
    assert ended in ("refused", "served") if isinstance(value, np.ndarray) else ended == "refused", said
