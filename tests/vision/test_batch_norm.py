"""Batch norm in a run: what counts its statistics, and whose modules the model ends with."""

import pytest
import timm
import torch
from test_training import NoisyNet, train
from timm.layers import convert_sync_batchnorm
from torch import nn
from torch.utils.data import TensorDataset

from fastshap_vision import TaskObjective, fit
from fastshap_vision.training.batch_norm import batch_norms, own_batch_norms


def network():
    torch.manual_seed(0)
    return timm.create_model("resnet10t", num_classes=3, in_chans=1, channels=(8, 8, 16, 16))


def images():
    return torch.randn(8, 1, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("momentum", [0.1, None])  # None: the mean of all batches
def test_gradient_checkpointing_counts_a_batch_once(momentum):
    """Each block's forward pass runs twice, the statistics of the second are those of the first."""
    found = []
    for checkpointing in (False, True):
        model = network()
        for module in batch_norms(model):
            module.momentum = momentum
        data = TensorDataset(images(), torch.arange(8) % 3)
        options = {"epochs": 2, "batch_size": 4, "progress": False, "grad_checkpointing": checkpointing}
        fit(model, data, objective=TaskObjective(), **options)
        found.append(model.state_dict())
        assert all(module.momentum == momentum for module in batch_norms(model))
    assert found[0]["bn1.num_batches_tracked"] == 4
    for name, expected in found[0].items():
        assert torch.equal(found[1][name], expected), name


def test_synchronised_batch_norms_are_gone_after_the_run():
    """They share parameters and statistics with the model's own, which take their places again, in their mode."""
    model, expected = network().train(), network().train()
    own = batch_norms(model)
    with own_batch_norms(model):
        convert_sync_batchnorm(model)
        assert all(isinstance(module, nn.SyncBatchNorm) for module in batch_norms(model))
        model(images())
        model.eval()
    expected(images())
    assert all(one is other for one, other in zip(batch_norms(model), own, strict=True))
    assert not any(module.training for module in own)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU it runs")
def test_processors_have_no_synchronised_batch_norm():
    model = NoisyNet()
    with pytest.raises(ValueError, match=r"`sync_bn` needs GPUs, as torch\.nn\.SyncBatchNorm does, .*Leave it out"):
        train(model=model, sync_bn=True)
    assert type(model.layers[2]) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="`sync_bn` must be"):
        train(sync_bn="yes")


def test_what_an_objective_does_not_train_is_frozen_for_the_while():
    class OfHead(TaskObjective):
        frozen = None

        def trained(self, model):
            return model.head.parameters()

        def __call__(self, model, images, labels, *, progress=1.0):
            self.frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
            return super().__call__(model, images, labels)

    model, objective = NoisyNet(), OfHead()
    model.head.bias.requires_grad_(False)  # the user's own choice
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model=model, objective=objective, epochs=1)
    changed = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert changed == ["head.weight"]
    assert objective.frozen == [name for name in before if name != "head.weight"]
    assert [name for name, parameter in model.named_parameters() if not parameter.requires_grad] == ["head.bias"]
