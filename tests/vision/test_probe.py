"""What is the identity or 0 at initialisation, and no longer after training, is found when a model is converted."""

from contextlib import suppress

import pytest
import timm
import torch
from torch import nn
from vision_transformers import images, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games.probe import perturbed


def trained(backbone, size, steps=3):
    """The model after a few large steps: norms, scales and statistics are no longer what they were."""
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.5)
    backbone.train()
    x = images(4, size)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(backbone(x), torch.arange(4)).backward()
        nn.utils.clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()
    return backbone.eval()


def test_heads_that_are_the_identity_at_initialisation():
    """A batch norm before the classifier: Σφ missed the logits by 0.05 of 0.13, and the trained model was refused."""
    torch.manual_seed(0)
    backbone = timm.create_model("efficientvit_m0", num_classes=5, img_size=128)
    model = fv.convert(backbone)
    trained(backbone, 128)
    again = fv.convert(backbone).eval()
    with_shares(model)
    again.load_state_dict(model.state_dict())
    x = images(2, 128)
    everybody = fk.pack_bits(torch.ones(2, 1, model.players, dtype=torch.bool))
    with torch.no_grad():
        logits = backbone(x)
        for either in (model, again):
            explanation = either.explain(x, "all")
            scale = 1e-4 * (1 + logits.abs().max())
            assert torch.equal(explanation.logits, logits)
            assert (explanation.values.sum(1) - (logits - explanation.null)).abs().max() <= scale
            assert (either.coalition_values(x, everybody)[:, 0] - logits).abs().max() <= scale
    with pytest.raises(fv.UnsupportedModelError, match=r"`head` can't be 'votes'.*head='shares'"):
        fv.convert(backbone, head="votes")


class ZeroBranch(nn.Module):
    """A linear layer and a branch that training turns on."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.branch = layer, nn.Linear(layer.in_features, layer.out_features)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x):
        return self.layer(x) + self.branch(x.square())


@pytest.mark.parametrize(
    ("name", "classifier", "options"),
    [
        ("test_resnet", "fc", {}),
        ("vit_tiny_patch16_224", "head", {"img_size": 64, "depth": 1, "global_pool": "avg", "fc_norm": False}),
    ],
)
def test_classifiers_that_are_linear_at_initialisation_only(name, classifier, options):
    backbone = timm.create_model(name, num_classes=5, **options)
    setattr(backbone, classifier, ZeroBranch(getattr(backbone, classifier)))
    with pytest.raises(fv.UnsupportedModelError, match="no linear classifier"):
        fv.convert(backbone, img_size=64)


def test_a_zero_classifier_hides_no_pooling():
    """All logits are 0 whatever the pooling."""
    backbone = timm.create_model("test_resnet", num_classes=5, global_pool="max")
    nn.init.zeros_(backbone.fc.weight)
    nn.init.zeros_(backbone.fc.bias)
    with pytest.raises(fv.UnsupportedModelError, match="not by global averaging"):
        fv.convert(backbone, img_size=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_perturbed_model_comes_back_to_the_bit(dtype):
    backbone = timm.create_model("test_efficientnet", num_classes=5).to(dtype)
    nn.init.zeros_(backbone.classifier.weight)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    state = torch.get_rng_state()
    with suppress(KeyError), perturbed(backbone):
        assert backbone.classifier.weight.any()
        assert not torch.equal(backbone.bn1.weight, before["bn1.weight"])
        assert not torch.equal(backbone.bn1.running_var, before["bn1.running_var"])
        assert (backbone.bn1.running_var > 0).all()
        raise KeyError
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(torch.get_rng_state(), state)
