"""A training step of a vision transformer on a CUDA device: it never waits, and it is captured and compiled once."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("timm")

import timm
from dispatch import no_waiting
from torch._dynamo.utils import counters
from vision_transformers import SMALL, create, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_kernels import testing

pytestmark = pytest.mark.gpu

BATCH = 4
KINDS = ("class token", "average pooling", "average pooling, norm behind", "SigLIP", "DINOv2 with SwiGLU", "DINOv3")
EACH = pytest.mark.parametrize("kind", KINDS)
PAIRED = pytest.mark.parametrize("paired", [True, False], ids=["paired", "unpaired"])


@pytest.fixture(autouse=True)
def _plain_pytorch():
    """Not every operator of PyTorch has a deterministic version, which `_poisoned_memory` asks for."""
    with testing.plain_pytorch():
        yield


def convert(kind):
    if kind == "DINOv3":
        torch.manual_seed(1)
        vit = timm.create_model("vit_small_patch16_dinov3", num_classes=7, **SMALL)
    else:
        vit = create(kind)
    model = fv.convert(vit).cuda().train()
    torch.nn.init.normal_(model.head.shares.weight, std=0.1)
    return model


def batch(seed=0):
    x = images(BATCH).roll(seed, 0).cuda()
    return x, torch.arange(seed, seed + BATCH, device="cuda") % 7


def objective_for(paired, **options):
    arguments = {"paired": paired, "masked_task_weight": 0.5, "masked_task_ramp": (0.0, 1.0)} | options
    return fv.JointObjective(4, 2.0, **arguments)


def step(objective, model, x, labels, progress=0.4):
    """One step in bfloat16, forward and backward: the loss."""
    model.zero_grad(set_to_none=False)
    with torch.autocast("cuda", torch.bfloat16):
        terms = objective(model, x, labels, progress=progress)
    terms.loss.backward()
    return terms.loss.detach()


def gradient(model) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointed"])
@pytest.mark.parametrize("target", ["detached", "live"])
@PAIRED
@EACH
def test_a_step_never_waits(kind, paired, target, checkpointing):
    model, objective = convert(kind), objective_for(paired, target=target)
    model.set_grad_checkpointing(checkpointing)
    x, labels = batch()
    for _ in range(3):
        step(objective, model, x, labels)
    with no_waiting():
        for number in range(3):
            step(objective, model, x, labels, 0.5 + number / 10)
    assert torch.isfinite(gradient(model)).all()


@PAIRED
@EACH
def test_values_without_a_gradient_never_wait(kind, paired):
    """The step of a detached target without the masked task."""
    model, objective = convert(kind), objective_for(paired, masked_task_weight=0.0)
    x, labels = batch()
    step(objective, model, x, labels)
    with no_waiting():
        step(objective, model, x, labels)


@PAIRED
@EACH
def test_the_device_agrees_with_the_cpu(kind, paired):
    """The same coalitions, and in float32 the same loss and gradient."""
    found = []
    for device in ("cpu", "cuda"):
        model, (x, labels) = convert(kind).to(device), batch()
        loss = objective_for(paired)(model, x.to(device), labels.to(device)).loss
        loss.backward()
        found.append((loss.detach().cpu(), gradient(model).cpu()))
    (loss, expected), (on_device, ours) = found
    torch.testing.assert_close(on_device, loss, rtol=1e-3, atol=1e-4)
    assert (ours - expected).norm() <= 1e-2 * expected.norm()


def warmed_up(function):
    """Runs it thrice in a stream of its own, as capturing asks for."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)


@EACH
@torch.no_grad()
def test_a_graph_of_values_takes_new_images_and_coalitions(kind):
    model, (x, _) = convert(kind).eval(), batch()
    bits = [fk.sample_coalitions(BATCH, 6, model.players, seed=seed, device="cuda") for seed in (0, 1)]
    held = bits[0].clone()
    warmed_up(lambda: model.game.values(x, fv.Coalitions(held, model.players, paired=True)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = model.game.values(x, fv.Coalitions(held, model.players, paired=True))
    other, _ = batch(1)
    expected = model.game.values(other, fv.Coalitions(bits[1], model.players, paired=True))
    x.copy_(other)
    held.copy_(bits[1])
    graph.replay()
    torch.testing.assert_close(captured, expected)


@PAIRED
@EACH
def test_a_graph_of_a_whole_step_takes_new_coalitions_and_weights(kind, paired):
    model, objective, (x, labels) = convert(kind), objective_for(paired), batch()
    rows = None if paired else BATCH * 4 * (model.players + model.game.prefix)
    seeds = (0, 1)
    bits = [fk.sample_coalitions(BATCH, 4, model.players, seed=s, paired=paired, device="cuda") for s in seeds]
    held, weights = bits[0].clone(), torch.tensor([2.0, 0.5], device="cuda")

    def run():
        model.zero_grad(set_to_none=False)
        coalitions = fv.Coalitions(held, model.players, paired, rows)
        terms = objective.terms(model, x, labels, coalitions, weights[0], weights[1])
        terms.loss.backward()
        return terms.loss.detach()

    warmed_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    held.copy_(bits[1])
    weights.copy_(torch.tensor([1.0, 2.0]))
    graph.replay()
    ours = captured.clone(), gradient(model)
    expected = run(), gradient(model)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "paired"), [("class token", True), ("average pooling", True), ("class token", False)])
def test_inductor_makes_one_program_of_fifty_steps(kind, paired):
    """One for each size, where coalitions are no pairs, and no step waits once they are made."""
    torch._dynamo.reset()
    model, objective, plain = convert(kind), objective_for(paired), objective_for(paired)
    objective.compile(fullgraph=True, dynamic=False)
    x, labels = batch()
    sizes, losses = set(), []
    draw = objective.draw

    def drawn(*arguments):
        found = draw(*arguments)
        sizes.add(found.rows)
        return found

    objective.draw = drawn
    counters.clear()
    for number in range(50):
        losses.append(step(objective, model, x, labels, 0.2 + number / 100))
    assert counters["stats"]["unique_graphs"] == len(sizes) <= (1 if paired else 6)
    assert len(torch.stack(losses).unique()) == 50
    torch.testing.assert_close(losses[0], step(plain, model, x, labels, 0.2), rtol=2e-2, atol=1e-2)
