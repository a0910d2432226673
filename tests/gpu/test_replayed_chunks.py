"""Many coalitions on a CUDA device: chunks that never wait for it, replayed from a graph."""

import logging

import pytest
import torch

pytest.importorskip("timm")

from tqdm import tqdm
from vision_transformers import converted, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_kernels import testing
from fastshap_vision.streaming import memory, stream
from fastshap_vision.streaming.chunks import Limits, cut
from fastshap_vision.streaming.memory import LiveBytes
from fastshap_vision.streaming.stream import evaluate

pytestmark = pytest.mark.gpu

EACH = pytest.mark.parametrize("kind", ["class token", "average pooling", "SigLIP", "resnet18"])
PAIRED = pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])


@pytest.fixture(autouse=True)
def _plain_pytorch():
    """Not every operator of PyTorch has a deterministic version, which `_poisoned_memory` asks for."""
    with testing.plain_pytorch():
        yield


@pytest.fixture
def graphs(monkeypatch):
    """Every graph that is captured, however few the chunks; the test sees whether one was."""
    made = []

    class Noted(stream._Graph):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(stream, "_Graph", Noted)
    monkeypatch.setattr(stream, "_GRAPH_CHUNKS", 2)
    monkeypatch.setattr(stream, "_GRAPH_UNITS", 2)
    return made


def model_images_bits(kind, paired, batch=2, coalitions=62):
    model = converted(kind).cuda()
    bits = fk.sample_coalitions(batch, coalitions, model.players, seed=0, paired=paired, device="cuda")
    if not paired:
        bits[:, 0], bits[:, 1] = 0, (1 << model.players) - 1
    return model, images(batch, model.game.input_size[1]).cuda(), bits


def assert_close(values, expected):
    """Convolutions round to 10 bits, and by other algorithms for other batches."""
    assert values.shape == expected.shape
    assert (values - expected).norm() <= 5e-3 * expected.norm()


@PAIRED
@EACH
@torch.no_grad()
def test_replayed_chunks_give_the_values_of_one_pass(kind, paired, graphs):
    model, x, bits = model_images_bits(kind, paired)
    whole = model.game.values(x, fv.Coalitions(bits, model.players, paired))
    for max_rows in (100, 333, 10**9):
        values = model.coalition_values(x, fv.Coalitions(bits, model.players, paired), max_rows=max_rows)
        assert_close(values, whole)
    assert len(graphs) == 2
    assert_close(model.coalition_values(x, fv.Coalitions(bits.cpu(), model.players, paired), max_rows=100), whole)


@PAIRED
@EACH
@torch.no_grad()
def test_chunks_never_wait(kind, paired, monkeypatch, graphs):
    """Neither replayed nor one by one."""
    model, x, bits = model_images_bits(kind, paired)
    chunks = cut(model.game, bits, Limits(150, 0.0), paired, x.device)
    expected = evaluate(model.game, x, bits, chunks, paired, False, tqdm(disable=True))

    def strict(capture):
        def run(*arguments):
            ready = capture(*arguments)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            return ready

        return run

    for capture in (stream._captured, lambda values, *_: values):
        monkeypatch.setattr(stream, "_captured", strict(capture))
        try:
            values = evaluate(model.game, x, bits, chunks, paired, False, tqdm(disable=True))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(values, expected)


@torch.no_grad()
def test_a_model_that_can_not_be_captured_runs_all_the_same(monkeypatch, caplog, graphs):
    model, x, bits = model_images_bits("class token", False)
    expected = model.game.values(x, fv.Coalitions(bits, model.players))
    inner = model.game.values

    def waits(*arguments):
        values = inner(*arguments)
        values.sum().item()
        return values

    monkeypatch.setattr(model.game, "values", waits)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            values = model.coalition_values(x, bits, max_rows=150)
            assert_close(values, expected)
    assert sum("CUDA graph" in record.message for record in caplog.records) == 1
    assert not graphs


@PAIRED
def test_gradients_through_chunks(paired):
    model, x, bits = model_images_bits("class token", paired)
    found = []
    for max_rows in (150, 10**9):
        model.zero_grad()
        coalitions = fv.Coalitions(bits, model.players, paired)
        model.coalition_values(x, coalitions, max_rows=max_rows).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.backbone.parameters() if p.grad is not None]))
    assert (found[0] - found[1]).norm() <= 1e-3 * found[1].norm()


@pytest.mark.parametrize("keeps_graph", [False, True])
@EACH
def test_the_need_of_a_row_is_an_upper_bound(kind, keeps_graph):
    """Of the tensors alive; what the allocator reports is above it by less than the share left free."""
    model, x, bits = model_images_bits(kind, True)
    estimate = memory.row_bytes(model.game, x, keeps_graph)
    rows = bits.shape[0] * bits.shape[1] // 2 * memory.pair_rows(model.game)
    with LiveBytes() as live, torch.set_grad_enabled(keeps_graph):
        values = model.game.values(x.requires_grad_(keeps_graph), fv.Coalitions(bits, model.players, paired=True))
        if keeps_graph:
            torch.autograd.grad(values.sum(), x)
    assert live.peak <= estimate * rows
    assert memory.free_bytes(x.device) > 0


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@torch.no_grad()
def test_lower_precision(precision, graphs):
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no 8-bit products on this device")
    model, x, bits = model_images_bits("class token", True)
    exact = model.coalition_values(x, bits)
    coalitions = fv.Coalitions(bits, model.players, paired=True)
    values = model.coalition_values(x, coalitions, precision=precision, max_rows=150)
    assert graphs
    error = (values.float() - exact).square().mean().sqrt() / exact.std()
    assert 1e-4 < error < {"bf16": 0.03, "fp8": 0.2}[precision]
