"""What the differential cases compare, and what they say where it fails."""

import importlib

import pytest

from fastshap_kernels.testing import accuracy


@pytest.fixture
def differential(monkeypatch):
    for name in ("TIMES", "MARGIN"):  # whose import widens them
        monkeypatch.setattr(accuracy, name, getattr(accuracy, name))
    return importlib.import_module("differential")


def test_every_fault_says_what_was_wrong(differential, monkeypatch):
    def check(op, arguments, backend):
        raise AssertionError

    monkeypatch.setattr(differential, "check", check)
    name, ended, said = differential.run_one(0, 0, "cpu")
    assert (name, ended, said) == (differential.OPS[0], "over tolerance", "failed: raise AssertionError")


def test_rows_of_a_single_column_are_left_to_the_ops_own_tests(differential):
    made = (differential.make(0, number, "triton") for number in range(300))
    widths = {arguments["rows"].shape[1] for op, arguments in made if op == "layer_norm_segment_sum"}
    assert widths
    assert 1 not in widths
