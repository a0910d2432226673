"""What users hang on a model's modules, before or after its conversion, is part of the game too."""

import logging
from functools import cache

import pytest
import torch
from timm.layers import ClassifierHead
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode
from vision_transformers import TINY, images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision import _log

MODELS = {
    "vit": ("vit_tiny_patch16_224", TINY),
    "vit, votes": ("vit_tiny_patch16_224", TINY | {"global_pool": "avg", "fc_norm": False, "class_token": False}),
    "dinov3": ("vit_small_patch16_dinov3", TINY | {"init_values": 0.5}),
    "eva02": ("eva02_tiny_patch14_224", TINY),
    "pooled": ("vit_base_patch16_siglip_224", TINY),
    "distilled": ("deit_tiny_distilled_patch16_224", TINY),
    "cnn": ("test_resnet", {}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2)},
    ),
}


SIZES = {"cnn": 64}


class LowRank(nn.Linear):
    """The layer's own weight, and an adapter beside it."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.down = nn.Parameter(0.3 * torch.randn(2, base.in_features))
        self.up = nn.Parameter(0.3 * torch.randn(base.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.down.T @ self.up.T


class Wrapper(nn.Module):
    """The layer and an adapter, in a module that is no `Linear`."""

    def __init__(self, base):
        super().__init__()
        self.base_layer, self.dropout = base, nn.Dropout(0.1)
        self.adapter = nn.Linear(base.in_features, base.out_features)
        nn.init.normal_(self.adapter.weight, std=0.3)
        nn.init.normal_(self.adapter.bias)

    def forward(self, x):
        return self.base_layer(x) + self.adapter(self.dropout(x))


class Doubled(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def hooked(layer):
    layer.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    return layer


def replaced_forward(layer):
    forward = layer.forward
    layer.forward = lambda *inputs, **more: 0.5 * forward(*inputs, **more)
    return layer


def without_class_token(layer):
    """Its shape is (B, N, D) and nothing else."""

    def hook(module, inputs, output):
        assert output.ndim == 3
        return torch.cat([0.1 * output[:, :1], output[:, 1:]], 1)

    layer.register_forward_hook(hook)
    return layer


CHANGES = {"subclass": LowRank, "wrapper": Wrapper, "parametrization": parametrized, "hook": hooked}
#: Linear layers of a block and behind it: model, name, what is done to it.
LINEAR = [
    *[("vit", f"blocks.1.{name}", kind) for name in ("attn.qkv", "attn.proj", "mlp.fc1") for kind in CHANGES],
    *[("dinov3", f"blocks.0.{name}", kind) for name in ("attn.qkv", "attn.proj", "mlp.fc2") for kind in CHANGES],
    *[(model, "head", kind) for model in ("vit", "vit, votes", "dinov3", "pooled") for kind in CHANGES],
    *[("distilled", "head_dist", kind) for kind in CHANGES],
    *[("cnn", "fc", kind) for kind in CHANGES],
    *[("swin", "head.fc", kind) for kind in CHANGES],
]
WHOLE = [
    *[("vit", name, hooked) for name in ("blocks.0", "blocks.0.attn", "blocks.0.drop_path1", "patch_drop", "norm")],
    *[("vit, votes", name, hooked) for name in ("blocks.1", "fc_norm", "blocks.1.norm1")],
    *[("dinov3", name, hooked) for name in ("blocks.0", "blocks.0.attn", "norm", "rope")],
    *[("vit", name, without_class_token) for name in ("blocks.0.mlp", "blocks.0.norm1", "norm")],
    *[("vit", name, replaced_forward) for name in ("blocks.0", "blocks.0.attn", "blocks.1.mlp")],
    *[("pooled", name, hooked) for name in ("blocks.1.attn", "norm")],
]


def create(kind):
    name, options = MODELS[kind]
    return network(name, 5, 0.1, **options)


def change(backbone, name, function):
    parent, _, child = name.rpartition(".")
    setattr(backbone.get_submodule(parent), child, function(backbone.get_submodule(name)))


@torch.no_grad()
def check(model, x):
    """v(N) = f, Σφ = f − v(∅), and no coalition's value depends on its neighbours."""
    count = len(x)
    present = torch.rand(count, 3, model.players, generator=torch.Generator().manual_seed(3)) < 0.5
    present[:, 0], present[:, 1] = True, False
    bits = fk.pack_bits(present)
    expected = model.backbone(x)
    values, null = model.coalition_values(x, bits), model.null_value()
    alone = torch.cat([model.coalition_values(x, bits[:, m : m + 1].contiguous()) for m in range(3)], 1)
    joint, explanation = model.joint(x, bits), model.explain(x, "all")
    scale = 1 + expected.abs().max()
    for found, wanted in (
        (values[:, 0], expected),
        (values[:, 1], null.expand(count, -1)),
        (alone, values),
        (joint.values, values),
        (joint.logits, expected),
        (explanation.logits, expected),
        (explanation.values.sum(1), expected - null),
    ):
        assert (found - wanted).abs().max() <= 1e-4 * scale
    return values


@cache
def plain_values(kind):
    size = SIZES.get(kind, 32)
    return check(with_shares(fv.convert(create(kind), img_size=size)), images(2, size))


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("kind", "name", "how"), LINEAR)
def test_adapted_linear_layers(kind, name, how, is_late):
    backbone, size = create(kind), SIZES.get(kind, 32)
    model = with_shares(fv.convert(backbone, img_size=size)) if is_late else None
    change(backbone, name, CHANGES[how])
    model = model or with_shares(fv.convert(backbone.eval(), img_size=size))
    assert (check(model.eval(), images(2, size)) - plain_values(kind)).abs().max() > 1e-3


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(("kind", "name", "how"), WHOLE)
def test_hooks_and_replaced_forwards(kind, name, how, is_late):
    backbone = create(kind)
    model = with_shares(fv.convert(backbone)) if is_late else None
    change(backbone, name, how)
    check(model or with_shares(fv.convert(backbone)), images(2, SIZES.get(kind, 32)))


def test_hooks_that_come_and_go(monkeypatch, caplog):
    """Halving the first block moved no coalition's value; the log says once why it does now."""
    monkeypatch.setattr(_log, "_said", set())
    backbone, x = create("dinov3"), images(2)
    model = with_shares(fv.convert(backbone))
    plain = check(model, x)
    handle = backbone.blocks[0].register_forward_hook(lambda module, inputs, output: 0.5 * output)
    with caplog.at_level(logging.WARNING):
        halved = check(model, x)
        check(model, x)
    assert not model.game.packs
    (record,) = caplog.records
    assert "hooks on a EvaBlock" in record.message
    assert (halved - plain).abs().max() > 1e-3
    handle.remove()
    assert model.game.packs
    assert torch.equal(check(model, x), plain)


def test_hooks_on_every_module():
    backbone, x = create("vit"), images(2)
    model = with_shares(fv.convert(backbone))
    handle = register_module_forward_hook(
        lambda module, inputs, output: 0.9 * output if isinstance(module, nn.Linear) else None
    )
    try:
        assert not model.game.packs
        check(model, x)
    finally:
        handle.remove()
    with FlopCounterMode(display=False):  # whose hooks on every module only count
        assert model.game.packs


def test_attention_dropout_that_comes_later():
    backbone = create("vit")
    model = fv.convert(backbone)
    backbone.blocks[0].attn.attn_drop.p = 0.1
    assert not model.game.packs


@pytest.mark.parametrize("kind", ["vit", "cnn", "swin"])
@torch.no_grad()
def test_hooks_on_the_model_itself_are_refused(kind):
    """They see the logits, which coalitions are made of parts for."""
    backbone, x = create(kind), images(2, SIZES.get(kind, 32))
    model = fv.convert(backbone, img_size=SIZES.get(kind, 32)).eval()
    handle = backbone.register_forward_hook(lambda module, inputs, output: 0.5 * output)
    bits = fk.sample_coalitions(2, 2, model.players, seed=0)
    for call in (lambda: model.explain(x), lambda: model.coalition_values(x, bits), lambda: model.joint(x, bits)):
        with pytest.raises(fv.UnsupportedModelError, match=r"hooks of its own.*Remove them"):
            call()
    handle.remove()
    model.explain(x)
    backbone.forward_head = lambda features: features
    with pytest.raises(fv.UnsupportedModelError, match=r"another `forward_head`"):
        model.explain(x)


@torch.no_grad()
def test_what_neither_packing_nor_masks_know_is_refused():
    x = images(2)
    for kind, name in (("vit", "blocks"), ("pooled", "attn_pool"), ("vit, votes", "head_drop")):
        backbone = create(kind)
        model = fv.convert(backbone).eval()
        change(backbone, name, hooked)
        with pytest.raises(fv.UnsupportedModelError, match=r"removal='cell'"):
            model.coalition_values(x, fk.sample_coalitions(2, 2, model.players, seed=0))
        pixel = fv.convert(backbone).eval()
        assert pixel.removal == "cell"
        everybody = fk.pack_bits(torch.ones(2, 1, pixel.players, dtype=torch.bool))
        assert (pixel.coalition_values(x, everybody)[:, 0] - backbone(x)).abs().max() <= 1e-5


def test_a_classifier_that_is_not_linear_is_refused():
    for function in (
        lambda layer: nn.Sequential(layer, nn.Tanh()),
        lambda layer: nn.Sequential(nn.BatchNorm1d(32), layer),
        lambda layer: nn.Sequential(nn.AvgPool1d(99), layer),
        lambda layer: ClassifierHead(32, 5),
    ):
        backbone = create("vit, votes")
        change(backbone, "head", function)
        with pytest.raises(fv.UnsupportedModelError, match="no linear classifier"):
            fv.convert(backbone.eval())
    backbone = create("vit, votes")
    model = fv.convert(backbone).eval()
    backbone.head.register_forward_hook(lambda module, inputs, output: output.tanh())
    with pytest.raises(fv.UnsupportedModelError, match="no linear classifier"):
        model.explain(images(2))


def test_a_distilled_model_in_distilled_training_is_refused():
    backbone = create("distilled")
    model = fv.convert(backbone)
    backbone.set_distilled_training(True)
    bits = fk.sample_coalitions(2, 2, model.players, seed=0)
    model.eval().explain(images(2))
    with pytest.raises(fv.UnsupportedModelError, match=r"set_distilled_training\(False\)"):
        model.train().joint(images(2), bits)


def test_gradients_reach_an_adapter():
    """The votes of an adapted classifier move it, and the frozen layer beside it stays."""
    backbone = create("vit, votes")
    change(backbone, "head", LowRank)
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_("head.down" in name or "head.up" in name)
    model = fv.convert(backbone, head="votes").train()
    bits = fk.sample_coalitions(2, 2, model.players, seed=0)
    features, logits, values, _ = model.joint(images(2), bits)
    (values.sin().sum() + model.regression_loss(features, logits, bits, values, model.null_value())).backward()
    assert backbone.head.down.grad.abs().sum() > 0
    assert backbone.head.weight.grad is None


class Mixing(nn.Module):
    """An MLP that adds the tokens' mean, times 0 before training."""

    def __init__(self, base):
        super().__init__()
        self.base, self.scale = base, nn.Parameter(torch.zeros(32))

    def forward(self, x):
        return self.base(x) + self.scale * x.mean(1, keepdim=True)


def test_blocks_that_mix_tokens_outside_of_attention():
    """Absent tokens would act on present ones past any mask: found at initialisation, where the mixing is 0."""
    backbone = create("vit")
    model = fv.convert(backbone).eval()
    change(backbone, "blocks.1.mlp", Mixing)
    with pytest.raises(fv.UnsupportedModelError, match="mix tokens outside of their attention"):
        model.coalition_values(images(2), fk.sample_coalitions(2, 2, model.players, seed=0))
    with pytest.raises(fv.UnsupportedModelError, match="mix tokens outside of their attention"):
        fv.convert(backbone, removal="token")
    assert fv.convert(backbone).removal == "cell"
    assert not backbone.blocks[1].mlp.scale.any()
