"""removal="pixel": the model's output on the masked image, of every kind of model."""

import pytest
import torch
from vision_transformers import images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv

VIT = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}
KINDS = {
    "CNN that averages": ("test_byobnet", {}),
    "CNN with a norm behind the average": ("test_convnext", {}),
    "ViT that averages": ("vit_tiny_patch16_224", VIT | {"class_token": False, "global_pool": "avg", "fc_norm": False}),
    "ViT with a class token": ("vit_tiny_patch16_224", VIT),
}


def create(kind, **options):
    name, arguments = KINDS[kind]
    return with_shares(fv.convert(network(name, **arguments), img_size=64, removal="pixel", **options)).double()


def draw(model):
    """Random coalitions, the empty one and the full one."""
    ends = fk.pack_bits(torch.tensor([[0], [1]], dtype=torch.bool).expand(3, 2, model.players))
    return torch.cat([fk.sample_coalitions(3, 4, model.players, seed=0), ends], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_plays_the_game_of_grey_pixels(kind):
    model, x = create(kind), images(size=64).double()
    bits = draw(model)
    expected = fv.MaskedImageGame(model, model.grid, "mean").coalition_values(x, bits)
    for values in (model.coalition_values(x, bits), model.joint(x, bits).values):
        assert (values - expected).abs().max() <= 1e-9 * expected.abs().max()
    assert torch.allclose(model.null_value(), expected[0, -2])
    found, wanted = (
        torch.autograd.grad(v.square().sum(), list(model.backbone.parameters())) for v in (values, expected)
    )
    assert all(torch.allclose(mine, theirs, atol=1e-9) for mine, theirs in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_explanations_add_up(kind):
    explanation = create(kind).explain(images(size=64).double(), target="all")
    assert explanation.efficiency_gap() < 1e-9
    assert explanation.null.abs().max() > 0


def test_trains_and_is_kept_by_checkpoints(tmp_path):
    torch.manual_seed(0)
    size = {"model_name": "test_byobnet", "num_classes": 7, "img_size": 64}
    model = fv.SelfExplainingClassifier(**size, removal="pixel", head_depth=1)
    objective = fv.JointObjective(coalitions=2, regression_ramp=(0.0, 0.0))
    terms = objective(model, images(size=64), torch.arange(3))
    terms.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.null_value()  # a batch without variance: its statistics are not counted
    counted = [value for name, value in model.backbone.named_buffers() if name.endswith("num_batches_tracked")]
    assert {int(count) for count in counted} == {1}
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path)
    assert again.removal == "pixel"
    bits = draw(again)
    assert torch.equal(
        again.eval().coalition_values(images(size=64), bits), model.eval().coalition_values(images(size=64), bits)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_votes_are_another_game(kind):
    with pytest.raises(ValueError, match="can't be 'votes' with removal='pixel'"):
        create(kind, head="votes")
    with pytest.raises(ValueError, match="Use base='even'"):
        create(kind, base="votes")
