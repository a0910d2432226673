"""bench.lib.timer on the processor: whose turn it is, how often, and what is counted."""

import time

import pytest
import torch

from bench.lib.timer import CPU, Timer, Times, milliseconds_of, percentile, seconds, timed


def test_calls_go_to_and_fro_by_turns():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    found = Timer(CPU, 0.0, least=4).measure(calls)
    assert "".join(order) == "abc" + "abc" + "cba" + "abc" + "cba"  # once first, to know how long they take
    assert {name: len(times.turns) for name, times in found.items()} == dict.fromkeys("abc", 4)


def test_short_calls_are_repeated_within_a_turn_of_wall_time():
    counts = {"short": 0, "long": 0}

    def call(name, length):
        counts[name] += 1
        time.sleep(length)

    calls = {"short": lambda: call("short", 0.005), "long": lambda: call("long", 0.1)}
    found = Timer(CPU, 0.0, least=2, by="wall").measure(calls)
    assert counts["long"] == 3
    assert 2 <= counts["short"] - 1 <= 20  # less often where the processor is busy
    assert 5 <= found["short"].median < found["long"].median >= 100


def test_length_and_most_bound_the_turns():
    for length, turns in ((0.0, 3), (60.0, 7)):
        assert len(Timer(CPU, length, least=3, most=7).measure({"a": lambda: None})["a"].turns) == turns


def test_the_median_is_reported_with_the_percentiles_beside_it():
    fields = Times([1.0, 2.0, 3.0, 4.0, 100.0]).fields()
    assert fields == {"ms_p20": 2.0, "ms_p50": 3.0, "ms_p80": 100.0, "turns": 5}
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_calls_that_are_not_counted_come_first():
    turns = []

    def call(turn):
        turns.append(turn)
        time.sleep(0.05 if turn < 2 else 0.001)

    assert milliseconds_of(call, turns=3, untimed=2) < 40
    assert turns == [0, 1, 2, 3, 4]


def test_what_a_call_returns_comes_with_its_seconds():
    found, taken = timed(lambda: time.sleep(0.01) or "done")
    assert found == "done"
    assert taken >= 0.01
    assert seconds(lambda: time.sleep(0.01), repeats=2) == pytest.approx(taken, rel=5)


def test_ceilings_are_of_the_fastest_product():
    asked = []

    def product(a, b):
        asked.append(a.shape)
        return a[:1, :1]  # far less work

    timer = Timer(torch.device("cpu"), 0.0, least=3)
    plain, found = timer.ceilings(256, 2**12), timer.ceilings(256, 2**12, product)
    assert set(plain) == set(found) == {"copy_gb_s", "float32_tflop_s", "bfloat16_tflop_s"}
    assert asked
    assert found["float32_tflop_s"] > plain["float32_tflop_s"]
