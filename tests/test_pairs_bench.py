"""bench.pairs: what is held against what, and whose results are written where."""

import json

import pytest

from bench import pairs
from bench.lib import machine, targets
from bench.lib.results import Results, read, write

HERE, OTHER, THIRD = "here", "another", "a-third"
INTEL = """processor\t: 0
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: 207
model name\t: Intel(R) Xeon(R) Platinum 8581C CPU @ 2.10GHz
flags\t\t: fpu sse4_2 avx2 avx512f

processor\t: 1
vendor_id\t: Other
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd sve bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n"


def row(ratio, op="coalition_sum", threads=2, **more):
    about = {"op": op, "shape": "small", "against": "bmm", "memory": "returned", "threads": threads}
    return (
        about | {"test": f"bench/ops/bench_{op}.py::test_it", "ours_ms": 1.0, "plain_ms": ratio, "ratio": ratio} | more
    )


def benchmarks(ratios):
    """As pytest-benchmark writes them: two rows a pair."""
    found = []
    for op, ratio in ratios.items():
        about = {name: value for name, value in row(ratio, op).items() if name not in ("ours_ms", "plain_ms", "ratio")}
        for side, seconds in (("fused", 0.001), ("plain", 0.001 * ratio)):
            found.append({"extra_info": about | {"side": side}, "stats": {"min": seconds}})
    return found


def test_both_sides_make_a_row():
    (found,) = pairs.rows_of(benchmarks({"coalition_sum": 4.0}))
    assert found["ratio"] == pytest.approx(4.0)
    assert (found["ours_ms"], found["plain_ms"]) == (pytest.approx(1.0), pytest.approx(4.0))
    assert "side" not in found


def test_a_ratio_is_held_against_this_processor_first():
    committed = {HERE: [row(3.0)], OTHER: [row(1.0)]}
    assert pairs.baseline(row(9.0), committed, HERE) == (3.0, "this processor")


def test_an_unknown_processor_is_shown_the_lowest_of_all_and_does_not_fail():
    committed = {OTHER: [row(3.0)], THIRD: [row(2.0), row(1.0, op="pack_tokens")]}
    assert pairs.baseline(row(9.0), committed, HERE) == (2.0, THIRD)
    assert not pairs.falls_short(row(0.01), committed, HERE)
    assert f"2.00x on {THIRD}" in pairs.describe(row(9.0), committed, HERE)
    assert pairs.baseline(row(9.0, threads=8), committed, HERE) == (2.0, THIRD)


def test_the_floor_is_the_lowest_of_the_committed_runs():
    committed = {HERE: [row(3.0) | {"spread": [2.0, 4.0], "runs": 10}]}
    assert pairs.baseline(row(9.0), committed, HERE) == (2.0, pairs.HERE)


def test_a_measured_processor_fails_below_its_own_ratio():
    committed = {HERE: [row(2.0)]}
    assert pairs.falls_short(row(2.0 * pairs.TOLERANCE - 0.01), committed, HERE)
    assert not pairs.falls_short(row(2.0 * pairs.TOLERANCE + 0.01), committed, HERE)


def test_rows_of_as_many_threads_come_before_others():
    committed = {OTHER: [row(3.0)], THIRD: [row(2.0, threads=64)]}
    assert pairs.baseline(row(9.0), committed, HERE) == (3.0, OTHER)


def test_an_unknown_pair_is_shown_and_does_not_fail():
    assert not pairs.falls_short(row(0.01), {HERE: [row(3.0, op="pack_tokens")]}, HERE)
    assert "nothing to hold it against" in pairs.describe(row(0.01), {}, HERE)


def measuring(monkeypatch, *runs):
    """Runs in place of measured ones; the tests that each was asked for."""
    asked, waiting = [], list(runs)

    def measure(tests, environment):
        asked.append(tests)
        return pairs.rows_of(benchmarks(waiting.pop(0)))

    monkeypatch.setattr(pairs, "measure", measure)
    return asked


def test_what_falls_short_is_measured_again_and_the_best_counts(monkeypatch):
    committed = {HERE: [row(10.0), row(10.0, op="pack_tokens")]}
    asked = measuring(monkeypatch, {"coalition_sum": 1.0, "pack_tokens": 8.0}, {"coalition_sum": 9.0})
    found = {one["op"]: one["ratio"] for one in pairs.hold(["bench"], {}, 1, committed, HERE)}
    assert found == {"coalition_sum": pytest.approx(9.0), "pack_tokens": pytest.approx(8.0)}
    assert asked == [["bench"], ["bench/ops/bench_coalition_sum.py::test_it"]]


def test_three_attempts_are_enough(monkeypatch):
    committed = {HERE: [row(10.0)]}
    asked = measuring(monkeypatch, *({"coalition_sum": ratio} for ratio in (1.0, 3.0, 2.0)))
    (found,) = pairs.hold(["bench"], {}, 1, committed, HERE)
    assert found["ratio"] == pytest.approx(3.0)
    assert len(asked) == pairs.ATTEMPTS
    assert pairs.falls_short(found, committed, HERE)


def test_of_several_runs_the_median_is_kept(monkeypatch):
    measuring(monkeypatch, *({"coalition_sum": ratio} for ratio in (5.0, 1.0, 3.0)))
    (found,) = pairs.hold(["bench"], {}, 3, {}, HERE)
    assert (found["ratio"], found["spread"], found["runs"]) == (
        pytest.approx(3.0),
        [pytest.approx(1.0), pytest.approx(5.0)],
        3,
    )


def test_results_of_one_processor_do_not_overwrite_another_s(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs, "PAIRS", tmp_path)
    first, second = pairs.commit([row(3.0)], HERE), pairs.commit([row(2.0)], OTHER)
    pairs.commit([row(4.0, op="pack_tokens"), row(5.0, threads=8)], HERE)
    assert sorted(one["ratio"] for one in read(first)["rows"]) == [3.0, 4.0, 5.0]
    assert [one["ratio"] for one in read(second)["rows"]] == [2.0]
    assert set(read(first)["processor"]) == {"vendor", "model", "instruction_sets"}


def test_a_processor_is_told_by_vendor_model_and_instruction_sets():
    intel, arm = machine.parse(INTEL), machine.parse(ARM)
    assert intel["vendor"] == "Intel"
    assert intel["model"] == "Intel Xeon Platinum 8581C (family 6, model 207)"
    assert intel["instruction_sets"] == ["sse4_2", "avx2", "avx512f"]
    assert arm["vendor"] == "ARM"
    assert arm["model"].endswith("(part 0xd4f)")
    assert arm["instruction_sets"] == ["asimd", "sve", "bf16"]
    assert machine.slug(intel["model"]) == "intel-xeon-platinum-8581c-family-6-model-207"


def test_every_committed_file_can_be_held_against():
    for path in pairs.PAIRS.glob("*.json"):
        content = read(path)
        assert set(content["processor"]) == {"vendor", "model", "instruction_sets"}
        assert len({pairs.key_of(one) for one in content["rows"]}) == len(content["rows"])
        assert content["bars"] == targets.judge("pairs", pairs.figures(content["rows"]))


def test_a_results_file_has_a_line_a_row(tmp_path):
    results = Results(tmp_path / "new" / "a.json", ("name",))
    results.content["about"] = {"é": 1}
    results.replace([{"name": "a", "x": 1}, {"name": "b", "x": 2}])
    results.replace([{"name": "a", "x": 3}])
    results.write()
    assert json.loads(results.path.read_text()) == results.content
    assert '{"name": "a", "x": 3}' in results.path.read_text().splitlines()
    for content in ([], [{"a": 1}], {"rows": []}, {"a": {"rows": [1]}}):
        write(tmp_path / "b.json", content)
        assert read(tmp_path / "b.json") == content
    assert read(tmp_path / "none.json", 7) == 7


def test_a_figure_without_a_target_is_refused():
    with pytest.raises(KeyError, match="no target of 'pairs'"):
        targets.judge("pairs", {"nothing": 1.0})
    (met, missed, unknown, *_) = targets.judge("pairs", {"coalition_sum": 1.0, "exact_shapley": 0.9})
    assert (met["met"], missed["met"], unknown["met"]) == (True, False, None)
    assert targets.lines([missed]) == ["MISS exact_shapley: 0.9 (at least 1)"]
