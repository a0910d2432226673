"""bench.step on the processor: the ways agree, the FLOPs are right, a run that was cut off goes on."""

import json
import subprocess
import sys
import textwrap
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

import fastshap_kernels as fk
from bench import tables
from bench.lib.machine import ROOT
from bench.lib.timer import Times
from bench.step import figures, flops, plot, sets, ways
from bench.step import measure as program
from fastshap_vision.games.base import Features

CPU = torch.device("cpu")
VIT, *_ = sets.tiny("cpu")


def run(monkeypatch, path, *options):
    words = ["step.py", "--set", "tiny", "--compile-backend", "eager", "--output", str(path), *map(str, options)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(program.fv, "keep_freed_memory", lambda: True)  # not for all tests of this process
    with pytest.raises(SystemExit) as stopped:
        program.main()
    return stopped.value.code


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "here.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        code = run(monkeypatch, path)
    return path, code, json.loads(path.read_text())


def test_every_way_of_every_step_has_a_row(measured):
    _, code, content = measured
    assert code == 0
    assert content["left_out"] == []
    found = {tuple(row[name] for name in figures.KEY) for row in content["rows"]}
    for step in sets.tiny("cpu"):
        for way in step.ways:
            assert (*figures.setting_of(step).values(), way) in found
    for row in content["rows"]:
        assert 0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"], row
        if row["way"] == "plain":
            assert "coalitions_s" not in row
            continue
        assert row["coalitions_s"] == pytest.approx(row["images_s"] * row["coalitions"])
        assert row["tflop_s"] == pytest.approx(row["gflop"] / row["ms_p50"])
        assert row["of_ceiling"] > 0
    for name in ("device", "torch", "commit", "date", "method", "ceilings", "bars", "kind", "threads"):
        assert name in content


def test_ways_that_play_the_same_game_agree(measured):
    rows = [row for row in measured[2]["rows"] if row["dtype"] == "float32"]
    compared = {(row["model"], row["mode"], row["way"]) for row in rows if "difference" in row}
    assert {("tiny ViT", mode, "dense-mask") for mode in ("value", "detached", "live")} <= compared
    assert ("tiny ViT", "detached", "dense-compiled") in compared
    assert {("tiny ResNet", mode, "dense-pixel") for mode in ("value", "detached")} <= compared
    assert ("tiny ViT", "detached", "dense-pixel") not in compared  # pixels removed are another game
    for row in rows:
        assert row.get("difference", 0) <= program.MOST_DIFFERENT[row["mode"]], row
        assert row.get("gradient_difference", 0) <= 1e-4, row
    assert any("gradient_difference" in row for row in rows)


def test_another_game_is_not_timed(tmp_path, monkeypatch):
    """A dense way that went wrong: it computes the mean of the losses' terms, say, and not their sum."""
    loss = ways.dense_loss
    monkeypatch.setattr(ways, "dense_loss", lambda *arguments: loss(*arguments) * 1.001)
    monkeypatch.setattr(program, "steps_of", lambda *_: [replace(VIT, ways=("dense-mask", "packed"))])
    assert run(monkeypatch, tmp_path / "here.json") == 1
    dense, packed = json.loads((tmp_path / "here.json").read_text())["rows"]
    assert "not the same game" in dense["error"]
    assert "ms_p50" not in dense
    assert "ms_p50" in packed


def test_of_several_visits_the_quickest_counts(tmp_path, monkeypatch):
    milliseconds = iter([20.0, 10.0, 30.0])

    def measure(self, calls):
        now = next(milliseconds)
        return {way: Times([now if way == "packed" else 2 * now] * 3) for way in calls}

    step = replace(VIT, ways=("dense-mask", "packed"), memory=False)
    results = program.Results(tmp_path / "here.json", figures.KEY, lambda rows: [])
    program.prepare(results, CPU, True, True)
    measuring = program.Measuring(results, CPU, "eager")
    monkeypatch.setattr(program.Timer, "measure", measure)
    for _ in range(3):
        measuring.step(step)
    assert {row["way"]: row["ms_p50"] for row in results.content["rows"]} == {"dense-mask": 20.0, "packed": 10.0}


def test_what_was_measured_is_kept(measured, tmp_path, monkeypatch):
    _, _, content = measured
    path = tmp_path / "here.json"
    cut = content["rows"][:-1]  # the last step lacks a way
    path.write_text(json.dumps(content | {"rows": cut}))
    assert run(monkeypatch, path) == 0
    again = json.loads(path.read_text())["rows"]
    assert len(again) == len(content["rows"])
    last = figures.setting_of(sets.tiny("cpu")[-1])
    kept = [row for row in content["rows"] if any(row[name] != value for name, value in last.items())]
    assert kept == again[: len(kept)]
    assert len(kept) == len(content["rows"]) - 2


def test_what_is_left_out_for_want_of_time_is_said(tmp_path, monkeypatch):
    path = tmp_path / "here.json"
    assert run(monkeypatch, path, "--until", 0) == 1
    content = json.loads(path.read_text())
    assert content["rows"] == []
    assert len(content["left_out"]) == len(sets.tiny("cpu"))


# -- FLOPs ---------------------------------------------------------------------------------------------------------


def counted(call):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("model", ["tiny ViT", "tiny ResNet"])
def test_flops_with_all_patches_present_are_those_of_the_dense_model(model):
    step = replace(VIT, model=model, image_size=64, coalitions=1, mode="value")
    setting = ways.make_setting(step, CPU)
    everyone = fk.pack_bits(torch.ones(step.batch, 1, setting.model.players, dtype=torch.bool))
    with torch.no_grad():
        dense = counted(lambda: setting.model.backbone(setting.images))
    assert flops.step_flops(setting.model, everyone, "value") == dense


@pytest.mark.parametrize("model", ["tiny ViT", "tiny ResNet"])
def test_flops_of_a_joint_step_are_those_of_both_passes(model):
    setting = ways.make_setting(replace(VIT, model=model, image_size=64), CPU)
    net, bits = setting.model, setting.bits
    everyone = fk.pack_bits(torch.ones(*bits.shape[:2], net.players, dtype=torch.bool))

    def dense():  # an image is embedded once, but all its sequences have the same tokens here
        images = setting.images.repeat_interleave(1 + bits.shape[1], 0)
        cross_entropy(net.backbone(images), torch.zeros(len(images), dtype=torch.long)).backward()

    def explanation():  # a product with pooled features, once a coalition
        features = torch.ones(2, net.players, net.game.feature_width)
        net.head.shares(net.head.explainer(Features(features)).sum(1).repeat_interleave(bits.shape[1], 0))

    once_too_often = 0.0
    if setting.is_transformer:  # forward, and backward to the weight
        once_too_often = 2 * bits.shape[0] * bits.shape[1] * flops.embedding_flops(net.backbone)
    expected = counted(dense) + 3 * counted(explanation) - once_too_often
    assert flops.step_flops(net, everyone, "detached") == pytest.approx(expected, rel=1e-6)


def test_flops_fall_with_the_tokens():
    setting = ways.make_setting(replace(VIT, mode="value"), CPU)
    vit, nobody = setting.model.backbone, torch.zeros_like(setting.bits)
    prefix_only = flops.step_flops(setting.model, nobody, "value")
    heads = 4 * 2 * setting.model.game.feature_width * setting.model.num_classes
    assert prefix_only == 2 * flops.embedding_flops(vit) + 4 * flops.encoder_flops(vit, 1) + heads


# -- memory, bars, growth, table -------------------------------------------------------------------------------------


def test_peak_memory_is_what_a_step_held_at_once():
    """In a process of its own: one in which `fit` ran keeps what is freed."""
    code = """
        import torch
        from bench.lib import memory

        def call():
            torch.ones(2**24)  # 67 MB, freed
            both = torch.ones(2**24), torch.ones(2**24)
            return both[0][0]

        print(memory.peak_on_cpu(call, lambda: None))
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert float(done.stdout) == pytest.approx(2 * 2**26 / 1e6, abs=20)


def test_memory_is_measured_in_a_process_of_its_own(measured):
    with_memory = [row for row in measured[2]["rows"] if "peak_mb" in row]
    assert [(row["way"], row["dtype"]) for row in with_memory] == [("packed", "autocast")]
    assert with_memory[0]["state_mb"] > 0
    assert -1 < with_memory[0]["peak_mb"] < 100


def rows_of(steps, milliseconds, **fields):
    """Made-up rows: milliseconds(step, way)."""
    return [
        figures.setting_of(step)
        | {"way": way, "players": (step.image_size // 16) ** 2, "tokens": (step.image_size // 16) ** 2}
        | {"ms_p50": milliseconds(step, way), "coalitions_s": 1.0, "peak_mb": 100.0 if way == "packed" else 200.0}
        | fields
        for step in steps
        for way in step.ways
    ]


def test_bars_take_the_fastest_of_each_side():
    def milliseconds(step, way):
        slow = {"dense-pixel": 3.0, "dense-mask": 5.0, "packed": 1.0, "plain": 0.5}[way]
        return slow * (2 if step.dtype == "autocast" else 1)

    found = {bar["what"]: bar for bar in figures.judge(rows_of(sets.bars("cpu"), milliseconds), "cpu")}
    assert found["ViT-S/16 at 224, v(S), M 8, bfloat16: times as fast as dense-mask"]["measured"] == 5
    joint = "ViT-S/16 at 224, joint step, M 4, float32: "
    assert found[joint + "times as fast as the faster dense way"]["measured"] == 3
    assert found[joint + "peak memory over the lower dense one's"] == {
        "what": joint + "peak memory over the lower dense one's",
        "promise": "at most 0.6",
        "bar": 0.6,
        "measured": 0.5,
        "met": True,
    }
    assert found["ViT-S/16 at 224, joint step, M 2: time over that of a plain training step"]["measured"] == 2
    assert found["growth with K from 10 to 21841: largest ratio to a straight line"]["met"] is None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bars_find_their_rows_in_the_sets(device):
    steps = sets.full(device)
    rows = rows_of(steps, lambda *_: 1.0, difference=0.0, gradient_difference=0.0)
    assert all(bar["measured"] is not None for bar in figures.judge(rows, device))


@pytest.mark.parametrize(("power", "met"), [(1.0, True), (2.0, False)])
def test_growth_is_held_against_a_straight_line(power, met):
    def milliseconds(step, _):
        size = step.batch * (step.coalitions + 1) * (1 + step.classes / 1e3) * (step.image_size / 224) ** 2
        return 3.0 + size**power

    rows = rows_of(sets.steps_of("growth", "cpu"), milliseconds)
    found = [bar["met"] for bar in figures.judge(rows, "cpu") if "growth" in bar["what"]]
    assert found == [met] * 4


def test_growth_is_plotted(tmp_path):
    rows = rows_of(sets.steps_of("growth", "cpu"), lambda step, way: step.coalitions * (1 + (way != "packed")))
    plot.plot({"rows": rows, "kind": "cpu", "device": "here"}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_the_readme_has_a_table_of_the_bars(measured):
    text = tables.step_table(measured[2], None)
    assert "| v(S) of packed and dense: largest difference, float32 | at most 1e-05 |" in text
    assert "| not measured |" in text
    assert tables.step_table(None, None).startswith("Not measured yet")
