"""A training step compiles whole and once, whatever coalitions and weights the next steps have."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from vision_transformers import TINY, images, labelled, network, with_shares

import fastshap_vision as fv
from fastshap_vision.training.fit import fit

LABELS = torch.tensor([0, 3, 6])


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def tiny(head_depth=1, **options):
    vit = network("vit_tiny_patch16_224", **TINY | options)
    return with_shares(fv.convert(vit, head_depth=head_depth)).train()


def compiled(objective):
    counter = CompileCounterWithBackend("aot_eager")
    objective.compile(fullgraph=True, dynamic=False, backend=counter)
    return counter


def steps(model, objective, number):
    """Loss and gradient of each of so many steps of a training that long."""
    for step in range(number):
        model.zero_grad()
        loss = objective(model, images(), LABELS, progress=step / number).loss
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        yield loss.detach(), gradient


def test_fifty_steps_compile_once():
    """Coalitions and both weights change in every step."""
    model, options = tiny(), {"masked_task_weight": 0.5, "masked_task_ramp": (0.0, 1.0), "regression_ramp": (0.0, 0.9)}
    objective = fv.JointObjective(4, 2.0, **options)
    counter = compiled(objective)
    ours = list(steps(model, objective, 50))
    # The first step has neither a regression nor a masked task: a program of its own.
    assert counter.frame_count == 2
    assert len({float(loss) for loss, _ in ours}) == 50
    uncompiled = steps(model, fv.JointObjective(4, 2.0, **options), 50)
    for (loss, gradient), (plain_loss, plain) in zip(ours[:5], uncompiled, strict=False):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
        assert (gradient - plain).norm() <= 1e-4 * plain.norm()


def test_values_that_nothing_flows_back_through_compile_too():
    model, options = tiny(head_depth=0, depth=1), {"masked_task_weight": 0.0, "regression_ramp": (0.0, 0.0)}
    objective = fv.JointObjective(2, **options)
    counter = compiled(objective)
    expected = list(steps(model, fv.JointObjective(2, **options), 3))
    for (loss, gradient), (plain_loss, plain) in zip(steps(model, objective, 3), expected, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
        assert (gradient - plain).norm() <= 1e-4 * plain.norm()
    assert counter.frame_count == 1


def test_checkpointed_joint_passes_compile_too():
    model, options = tiny(head_depth=0, depth=1), {"target": "live", "regression_ramp": (0.0, 0.0)}
    objective = fv.JointObjective(2, **options)
    compiled(objective)
    expected = list(steps(model, fv.JointObjective(2, **options), 1))
    model.set_grad_checkpointing(True)
    for (loss, gradient), (plain_loss, plain) in zip(steps(model, objective, 1), expected, strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
        assert (gradient - plain).norm() <= 1e-4 * plain.norm()


def test_unpaired_coalitions_compile_once_for_each_of_few_sizes():
    model, options = tiny(head_depth=0), {"paired": False, "regression_ramp": (0.0, 0.0)}
    objective, uncompiled = fv.JointObjective(3, **options), fv.JointObjective(3, **options)
    counter = compiled(objective)
    ours = list(steps(model, objective, 8))
    replayed = fv.JointObjective(3, **options)
    compiled(replayed)
    sizes = {replayed.draw(model, images()).rows for _ in range(8)}
    assert counter.frame_count == len(sizes) == 2
    for (loss, gradient), (plain_loss, plain) in zip(ours, steps(model, uncompiled, 8), strict=True):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=1e-6)
        assert (gradient - plain).norm() <= 1e-4 * plain.norm()


def test_a_task_without_coalitions_compiles_too():
    model, objective = tiny(), fv.TaskObjective()
    counter = compiled(objective)
    plain = [loss for loss, _ in steps(model, fv.TaskObjective(), 2)]
    assert [loss for loss, _ in steps(model, objective, 2)] == plain
    assert counter.frame_count == 1


def test_training_compiles_its_step(monkeypatch):
    """Two epochs of two steps come to what they come to uncompiled, from one program."""
    counter = CompileCounterWithBackend("aot_eager")
    plain_compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: plain_compile(function, backend=counter, **options)
    )
    data = labelled(images(8))

    def weights(compiles):
        model = tiny(head_depth=0)
        objective = fv.JointObjective(2, masked_task_weight=0.5)
        # Adam's first steps are as long for a gradient that is only rounding.
        options = {"opt": "sgd", "lr": 0.05, "epochs": 2, "batch_size": 4, "progress": False}
        fit(model, data, objective=objective, compile=compiles, **options)
        assert objective._compiled is objective._without_coalitions._compiled is None  # as it was given
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    plain, compiled_weights = weights(False), weights(True)
    assert counter.frame_count == 1
    torch.testing.assert_close(compiled_weights, plain, rtol=1e-3, atol=1e-5)
