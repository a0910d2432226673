import logging
from functools import partial

import pytest
import timm
import torch
from tqdm import tqdm
from vision_transformers import converted, create, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision import _log
from fastshap_vision._runtime import progress
from fastshap_vision.streaming import chunks as cutting
from fastshap_vision.streaming import memory, stream
from fastshap_vision.streaming.chunks import Limits
from fastshap_vision.streaming.memory import LiveBytes

KINDS = ("class token", "average pooling", "SigLIP", "resnet18")
CPU = torch.device("cpu")


def model_and_images(kind, batch=3):
    model = converted(kind)
    return model, images(batch, model.game.input_size[1])


def unpaired(model, batch=3, coalitions=11, seed=0):
    """Coalitions of every size, nobody and everybody among them."""
    present = torch.rand(batch, coalitions, model.players, generator=torch.Generator().manual_seed(seed))
    present = present < torch.linspace(0, 1.01, coalitions).view(1, -1, 1)
    return fk.pack_bits(present[:, torch.randperm(coalitions, generator=torch.Generator().manual_seed(1))])


def rows_of(model, bits):
    """Rows that a call with these bits computes."""
    prefix = getattr(model.game, "prefix", None)
    if prefix is None:
        return bits.shape[0] * bits.shape[1] * model.players
    return int(fk.unpack_bits(bits, model.players).sum()) + bits.shape[0] * bits.shape[1] * prefix


@pytest.fixture
def calls(monkeypatch):
    """The (images, coalitions) of every call of a game."""
    seen = []

    def watch(model):
        inner = model.game.values

        def values(images, coalitions):
            seen.append((images, coalitions))
            return inner(images, coalitions)

        monkeypatch.setattr(model.game, "values", values)
        return seen

    return watch


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_chunks_give_the_values_of_one_pass_in_the_order_asked(kind, paired, calls):
    model, x = model_and_images(kind)
    bits = fk.sample_coalitions(3, 10, model.players, seed=0) if paired else unpaired(model)
    whole = model.game.values(x, fv.Coalitions(bits, model.players))
    seen = calls(model)
    pair = model.players + 2 * getattr(model.game, "prefix", 0)
    for max_rows in (1, pair, 3 * pair, 20 * pair, 10**9):
        seen.clear()
        values = model.coalition_values(x, fv.Coalitions(bits, model.players, paired), max_rows=max_rows)
        assert torch.allclose(values, whole, atol=1e-5)
        asked = sum(some.bits.shape[0] * some.bits.shape[1] for _, some in seen)
        assert asked == bits.shape[0] * bits.shape[1]
        alone = 2 if paired and kind != "resnet18" else 1
        for image, some in seen:
            assert rows_of(model, some.bits) <= max_rows or (len(image) == 1 and some.count == alone)
        most = max(rows_of(model, some.bits) for _, some in seen)
        if kind != "resnet18" and max_rows == 3 * pair:
            assert most > max_rows / 2


@pytest.mark.parametrize("kind", ["class token", "resnet18"])
@pytest.mark.parametrize("batch", [1, 5])
@torch.no_grad()
def test_auto_keeps_to_the_memory_that_is_free(kind, batch, calls, monkeypatch):
    """Live bytes of every chunk, counted as it runs, stay below half of what is said to be free."""
    model, x = model_and_images(kind, batch)
    bits = unpaired(model, batch, 40)
    free = 30 * memory.row_bytes(model.game, x, False) * model.players
    monkeypatch.setattr(cutting, "free_bytes", lambda device: free)
    whole = model.game.values(x, fv.Coalitions(bits, model.players))
    seen = calls(model)
    values = model.coalition_values(x, bits)
    assert torch.allclose(values, whole, atol=1e-5)
    assert 1 < len(seen) < batch * 20
    most = 0
    for call in list(seen):
        with LiveBytes() as live:
            model.game.values(*call)
        most = max(most, live.peak)
    assert free / 10 < most < free / 2


@pytest.mark.parametrize("keeps_graph", [False, True])
@pytest.mark.parametrize("kind", ["class token", "average pooling, norm behind", "resnet18", "convnext_atto"])
def test_the_need_of_a_row_is_an_upper_bound(kind, keeps_graph):
    model = fv.convert(create(kind), img_size=32 if "pool" in kind or "token" in kind else 64).train()
    x = images(2, model.game.input_size[1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    estimate = memory.row_bytes(model.game, x, keeps_graph)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for coalitions in (2, 6, 24):
        bits = fk.sample_coalitions(2, coalitions, model.players, seed=1)
        with LiveBytes() as live, torch.set_grad_enabled(keeps_graph):
            values = model.game.values(x.requires_grad_(keeps_graph), fv.Coalitions(bits, model.players, paired=True))
            if keeps_graph:
                torch.autograd.grad(values.sum(), x)
        packed = rows_of(model, bits)
        assert 0.2 * estimate * packed < live.peak <= estimate * packed


def test_live_bytes_count_what_is_made_and_freed():
    kept = torch.zeros(1000)
    with LiveBytes() as live:
        first = kept + 1
        view = first.view(10, 100)
        assert live.live == 4000
        second = view * 2
        assert live.live == live.peak == 8000
        del first, view
        assert live.live == 4000
        del second
        assert kept.view(10, 100).sum() == 0
        assert live.live == 0
    assert live.peak == 8000


@pytest.mark.parametrize("kind", ["class token", "resnet18"])
def test_gradients_through_chunks(kind):
    model, x = model_and_images(kind)
    bits = unpaired(model)
    direction = torch.randn(3, 11, 7, generator=torch.Generator().manual_seed(3))
    parameters = [p for p in model.backbone.parameters() if p.requires_grad]

    def gradients(max_rows):
        values = model.coalition_values(x, bits, max_rows=max_rows)
        return torch.autograd.grad((values * direction).sum(), parameters, allow_unused=True)

    for ours, whole in zip(gradients(60), gradients(10**9), strict=True):
        assert (ours is None) is (whole is None)
        if whole is not None:
            assert (ours - whole).norm() <= 1e-5 * whole.norm() + 1e-12


def test_memory_of_a_gradient_does_not_grow_with_the_coalitions():
    model, x = model_and_images("class token", 1)

    def peak(coalitions):
        bits = fk.sample_coalitions(1, coalitions, model.players, seed=0)
        with LiveBytes() as live:
            model.coalition_values(x, bits, max_rows=200).sum().backward()
        return live.peak

    assert peak(200) < 1.2 * peak(40)


@pytest.mark.parametrize("kind", ["drop path", "batch norm"])
def test_computing_a_chunk_twice_counts_once(kind, monkeypatch):
    """Dropped paths are the same again, and running statistics move once: as without checkpoints."""
    name, options = ("resnet18", {}) if kind == "batch norm" else ("vit_tiny_patch16_224", {"drop_path_rate": 0.5})
    if kind == "drop path":
        options |= {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    x = images(2, 64 if kind == "batch norm" else 32)

    def trained():
        torch.manual_seed(0)
        model = fv.convert(timm.create_model(name, num_classes=7, **options), img_size=x.shape[2]).train()
        model.coalition_values(x, unpaired(model, 2), max_rows=70).square().sum().backward()
        return model

    ours = trained()
    monkeypatch.setattr(stream, "_checkpointed", lambda values, backbone: values)
    plain = trained()
    for (name, a), b in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    found, wanted = (torch.cat([p.grad.flatten() for p in model.backbone.parameters()]) for model in (ours, plain))
    assert (found - wanted).norm() <= 1e-4 * wanted.norm()
    if kind == "batch norm":
        assert ours.backbone.bn1.num_batches_tracked > 0
        assert ours.backbone.bn1.momentum == 0.1


@pytest.mark.parametrize("units", [16, 17, 31, 45])
@torch.no_grad()
def test_dealt_chunks_are_nearly_equal_and_fit_a_static_size(units):
    """What a CUDA graph runs on: one number of coalitions, and of rows that is enough and hardly more."""
    model, x = model_and_images("class token", 2)
    bits = unpaired(model, 2, units)
    chunks = cutting.cut(model.game, fv.Coalitions(bits, model.players), Limits(70, 0.0), CPU)
    assert chunks.rows is None
    sizes = fk.unpack_bits(bits, model.players).sum(2) + model.game.prefix
    chunks = chunks._replace(rows=cutting._largest_load(sizes.sort(1)[0], chunks.parts))
    assert chunks.rows <= 70
    longest = -(-units // chunks.parts)
    loads = []
    for part, chosen in stream._parts(2, units, chunks, CPU):
        filled = stream._fill(bits[part][:, chosen], longest, 1)
        assert filled.shape[1] == longest
        loads.append(rows_of(model, filled))
        static = model.game.values(x[part], fv.Coalitions(filled, model.players, rows=chunks.rows))
        alone = model.game.values(x[part], fv.Coalitions(filled, model.players))
        assert torch.allclose(static, alone, atol=1e-5)
    assert max(loads) == chunks.rows
    assert chunks.rows - min(loads) <= 2 * model.players


def test_small_coalitions_count_as_half_of_a_pair():
    """Their values take memory too: nobody's coalition is not free."""
    model, _ = model_and_images("average pooling", 1)
    nobody = torch.zeros(1, 100, 1, dtype=torch.int32)
    assert cutting.cut(model.game, fv.Coalitions(nobody, model.players), Limits(80, 0.0), CPU).parts == 1
    assert cutting.cut(model.game, fv.Coalitions(nobody, model.players), Limits(80, 8.0), CPU).parts == 10


@torch.no_grad()
def test_progress_bar(capsys, monkeypatch):
    model, x = model_and_images("class token")
    bits = unpaired(model)
    monkeypatch.setattr(progress, "tqdm", partial(tqdm, mininterval=0, miniters=1))
    for max_rows in (60, "auto"):
        model.coalition_values(x, bits, max_rows=max_rows)
        assert capsys.readouterr().err == ""
        model.coalition_values(x, bits, max_rows=max_rows, progress=True)
        shown = capsys.readouterr().err
        assert "coalitions" in shown
        assert "33.0/33.0" in shown


def test_what_is_said_is_said_once(caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            _log.say_once("a message of this test")
    assert [record.message for record in caplog.records] == ["a message of this test"]


def test_bad_arguments():
    model, x = model_and_images("class token")
    bits = unpaired(model)
    for max_rows in (0, -5, "all"):
        with pytest.raises(ValueError, match="`max_rows`"):
            model.coalition_values(x, bits, max_rows=max_rows)
    with pytest.raises(ValueError, match="M even"):
        model.coalition_values(x, fv.Coalitions(bits, model.players, paired=True))


def test_the_limit_of_a_container(tmp_path):
    assert memory._container_bytes(tmp_path / "none") == float("inf")
    for name, text in (("memory.max", "1000\n"), ("memory.current", "800\n"), ("memory.stat", "inactive_file 300\n")):
        (tmp_path / name).write_text(text)
    assert memory._container_bytes(tmp_path) == 500
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_bytes(tmp_path) == float("inf")
    assert 0 < memory.free_bytes(CPU) < 2**50


def test_weights_that_autocast_converts_do_not_count(generator):
    model = fv.SelfExplainingClassifier(
        "vit_tiny_patch16_224", 5, img_size=32, model_kwargs={"embed_dim": 256, "depth": 2, "num_heads": 2}
    ).eval()
    images = torch.randn(1, 3, 32, 32, generator=generator)
    rows = 4 + 2  # of a pair
    weights = sum(weight.numel() for weight in model.backbone.parameters())
    plain = memory.row_bytes(model.game, images, False)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = memory.row_bytes(model.game, images, False)
    assert lowered <= plain
    assert rows * lowered < 0.1 * 2 * weights
