"""v(∅) is kept in evaluation, and computed again wherever something that it depends on changes."""

import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor
from vision_transformers import create, images

import fastshap_vision as fv


@pytest.fixture
def counted(monkeypatch):
    model, calls = fv.convert(create("class token")).eval(), []
    null = model.game.null

    def counting():
        calls.append(1)
        return null()

    monkeypatch.setattr(model.game, "null", counting)
    return model, calls


def test_it_is_kept(counted):
    model, calls = counted
    x = images()
    first, second = model.explain(x), model.explain(x)
    assert len(calls) == 1
    assert torch.equal(first.null, second.null)
    first.null.zero_()  # what was given is the caller's
    assert torch.equal(model.explain(x).null, second.null)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.backbone.blocks[0].mlp.fc1.weight.detach().mul_(2),
        lambda model: model.backbone.blocks[0].mlp.fc1.weight.data.mul_(2),
        lambda model: model.backbone.blocks[0].mlp.fc1.weight.data[1:].zero_(),
        lambda model: model.backbone.blocks[0].mlp.fc2.weight.data[:, 1::2].zero_(),
        lambda model: model.backbone.blocks[0].mlp.fc1.bias.data[5:6].add_(4),
        lambda model: setattr(model.backbone.head.weight, "data", 2 * model.backbone.head.weight.data),
        lambda model: model.load_state_dict({name: 1.1 * tensor for name, tensor in model.state_dict().items()}),
        lambda model: model.double(),
        lambda model: setattr(model.backbone.blocks[0].mlp, "act", torch.nn.SiLU()),
    ],
    ids=[
        "in place",
        "through .data",
        "through .data but for a row",
        "columns through .data",
        "a bias through .data",
        "other data",
        "loaded",
        "other dtype",
        "module",
    ],
)
def test_changed_weights_are_noticed(counted, change):
    model, calls = counted
    with torch.no_grad():
        before = model.null_value()
        change(model)
        after = model.null_value()
    assert len(calls) == 2
    assert not torch.equal(before.double(), after.double()) or before.dtype != after.dtype
    expected = model.game.null()
    assert torch.equal(after, expected)


class Adapted(torch.nn.Linear):
    """A layer with a switch that is no tensor."""

    factor = 1.0

    def forward(self, x):
        return self.factor * super().forward(x)


def test_it_is_not_kept_for_modules_of_other_kinds(counted):
    model, _ = counted
    head = model.backbone.head
    model.backbone.head = Adapted(head.in_features, head.out_features).eval()
    model.backbone.head.load_state_dict(head.state_dict())
    with torch.no_grad():
        before = model.null_value()
        model.backbone.head.factor = 2.0
        torch.testing.assert_close(model.null_value(), 2 * before)


def test_weights_of_other_kinds_are_left_alone(counted):
    model, calls = counted
    layer = model.backbone.blocks[0].mlp.fc1
    layer.weight = torch.nn.Parameter(TwoTensor(layer.weight.detach().clone(), layer.weight.detach().clone()))
    model.explain(images())
    model.explain(images())
    assert len(calls) == 2


def test_it_is_not_kept_where_it_may_change_unseen(counted):
    model, calls = counted
    model.null_value()  # with gradients
    model.null_value()
    assert len(calls) == 2
    with torch.no_grad():
        hook = model.backbone.head.register_forward_hook(lambda module, inputs, output: output + 1)
        plain = model.null_value() - 1
        hook.remove()
        assert torch.allclose(model.null_value(), plain, atol=1e-6)
        model.train()
        model.null_value()
        model.null_value()
    assert len(calls) == 6
