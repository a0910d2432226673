"""Dropping an Eva's tokens equals masking their attention keys with minus infinity in timm's own model."""

import pytest
import torch
from vision_transformers import TINY, added, images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games.drop_tokens_eva import EvaGame

PLAYERS = 16
EVAS = {
    "EVA": ("eva_giant_patch14_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "EVA-02, class token": ("eva02_tiny_patch14_224", {"global_pool": "token", "init_values": 0.5}),
    "EVA-02, inner norms": ("eva02_base_patch14_224", {"scale_attn_inner": True, "qk_norm": True}),
    "DINOv3": ("vit_small_patch16_dinov3", {"init_values": 0.5}),
    "DINOv3, class token": ("vit_small_patch16_dinov3", {"global_pool": "token", "init_values": 0.5}),
    "DINOv3, biases": ("vit_small_patch16_dinov3_qkvb", {"global_pool": "token", "init_values": 0.5}),
    "DINOv3, one image size": ("vit_small_plus_patch16_dinov3", {"dynamic_img_size": False, "use_fc_norm": True}),
    "Perception Encoder": ("vit_pe_core_tiny_patch16_384", {}),
    "Perception Encoder, no prefix": ("vit_pe_core_tiny_patch16_384", {"class_token": False}),
    "positions of each head": ("vit_small_patch16_rope_mixed_224", {"init_values": 0.5}),
    "shared keys, MRoPE": (
        "vit_small_patch16_dinov3",
        {"attn_type": "rope", "num_kv_heads": 1, "qkv_fused": False, "rope_type": "mrope"},
    ),
}
#: Kinds whose own logits are a sum of votes.
VOTING = ("DINOv3", "shared keys, MRoPE")


def create(kind, **more):
    name, options = EVAS[kind]
    return network(name, noise=0.1, **(TINY | options | more))


def coalitions(number=4):
    return fk.sample_coalitions(3, number, PLAYERS, seed=0)


def dense_values(eva, x, bits):
    """v(S) by timm's forward pass with absent keys at minus infinity."""
    present = fk.unpack_bits(bits, PLAYERS).flatten(0, 1)
    prefix = eva.num_prefix_tokens
    keys = torch.nn.functional.pad(present, (prefix, 0), value=True)[:, None, None]
    tokens = eva.forward_features(x.repeat_interleave(bits.shape[1], 0), attn_mask=keys)
    if eva.global_pool == "avg":
        pooled = (tokens[:, prefix:] * present.unsqueeze(2)).sum(1) / PLAYERS
        if isinstance(eva.fc_norm, torch.nn.Identity):
            values = pooled @ eva.head.weight.T + eva.head.bias * present.sum(1, keepdim=True) / PLAYERS
        else:
            values = eva.head(eva.fc_norm(pooled))
    elif eva.global_pool == "map":
        values = eva.head(eva.fc_norm(eva.attn_pool(tokens, attn_mask=added(keys))))
    else:
        values = eva.forward_head(tokens)
    return values.unflatten(0, bits.shape[:2])


@pytest.mark.parametrize("kind", EVAS)
def test_dropping_equals_dense_masking(kind):
    """Values to 1e-5, and the gradient of every parameter to 1e-4 of its norm."""
    eva, x, bits = create(kind), images(), coalitions()
    model = fv.convert(eva).eval()
    assert type(model.game) is EvaGame
    weight = torch.randn(3, 4, 7, generator=torch.Generator().manual_seed(3))
    names, parameters = zip(*eva.named_parameters(), strict=True)

    def gradients(values):
        return torch.autograd.grad((values * weight).sum(), parameters, allow_unused=True, materialize_grads=True)

    packed, dense = model.coalition_values(x, bits), dense_values(eva, x, bits)
    assert (packed - dense).abs().max() <= 1e-5
    ours, theirs = gradients(packed), gradients(dense)
    rounding = 1e-7 * torch.cat([gradient.flatten() for gradient in theirs]).norm()
    for name, our, their in zip(names, ours, theirs, strict=True):
        assert (our - their).norm() <= 1e-4 * their.norm() + rounding, name


@pytest.mark.parametrize("kind", EVAS)
@torch.no_grad()
def test_joint_pass_efficiency_and_removed_content(kind):
    eva, x, bits = create(kind), images(), coalitions()
    model = with_shares(fv.convert(eva))
    nobody, everybody = (fk.pack_bits(torch.full((3, 1, PLAYERS), present)) for present in (False, True))
    null, values = model.null_value(), model.coalition_values(x, bits)
    assert torch.equal(null, torch.zeros(7)) is (kind in VOTING)
    assert (model.coalition_values(x, nobody)[:, 0] - null).abs().max() <= 1e-5
    assert (model.coalition_values(x, everybody)[:, 0] - eva(x)).abs().max() <= 1e-5
    phi, logits = model.shapley_values(x)
    assert (phi.sum(1) - (logits - null)).abs().max() <= 1e-5
    joint = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
    features, _ = model.game.features_and_logits(x)
    for found, expected in zip((joint.features.last, *joint[1:3]), (features.last, logits, values), strict=True):
        assert (found - expected).abs().max() <= 1e-5
    for m in range(bits.shape[1]):
        one = bits[:, m : m + 1].contiguous()
        spoiled = fk.mask_patches(x, one, model.grid, torch.full(x.shape[1:], float("nan")))
        assert (model.coalition_values(spoiled, one)[:, 0] - values[:, m]).abs().max() <= 1e-5


@pytest.mark.parametrize("kind", ["EVA-02", "DINOv3", "positions of each head"])
def test_rotary_augmentation_is_drawn_once_a_pass(kind):
    """In training the coordinates move, alike for the image and for the coalition of all its patches."""
    model = fv.convert(create(kind, rope_rescale_coords=2.0)).eval()
    x, everybody = images(), fk.pack_bits(torch.ones(3, 1, PLAYERS, dtype=torch.bool))
    fixed = [model.joint(x, everybody) for _ in range(2)]
    model.train()
    moved = [model.joint(x, everybody) for _ in range(2)]
    assert torch.equal(fixed[0].values, fixed[1].values)
    assert (moved[0].values - moved[1].values).abs().max() > 1e-4
    for one in (*fixed, *moved):
        assert torch.allclose(one.values[:, 0], one.logits, atol=1e-5)


def test_joint_pass_compiles_whole():
    """No graph break, checkpointing included; mixed precision stays close."""
    eva, x, bits = create("DINOv3"), images(), coalitions()
    model = fv.convert(eva).train()
    eager = model.joint(x, fv.Coalitions(bits, model.players, paired=True)).values
    eva.set_grad_checkpointing(True)
    compiled = torch.compile(
        lambda x, bits: model.game.joint(x, fv.Coalitions(bits, model.players, paired=True)).values,
        fullgraph=True,
        backend="aot_eager",
    )
    values = compiled(x, bits)
    assert torch.allclose(values, eager, atol=1e-5)
    values.sum().backward()
    assert eva.blocks[0].attn.proj.weight.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model.joint(x, fv.Coalitions(bits, model.players, paired=True)).values
    assert (mixed.float() - eager).norm() <= 0.05 * eager.norm()


def test_saves_and_loads(tmp_path):
    """The rotary table is no weight."""
    model = fv.convert(create("DINOv3")).eval()
    model.save_pretrained(tmp_path)
    again = fv.SelfExplainingClassifier.from_pretrained(tmp_path).eval()
    x, bits = images(), coalitions()
    assert torch.equal(again.coalition_values(x, bits), model.coalition_values(x, bits))
    assert not [name for name in model.state_dict() if "rotary" in name]


@torch.no_grad()
def test_the_view_is_what_the_model_sees():
    """Patches of 14 pixels cover 28 of 32: what lies beyond changes nothing, what lies within does."""
    model, x = fv.convert(create("EVA-02", patch_size=14)).eval(), images()
    assert (model.grid, model.game.view, model.game.input_size) == ((2, 2), (28, 28), (3, 32, 32))
    beyond, within = x.clone(), x.clone()
    beyond[:, :, 28:], beyond[:, :, :, 28:] = 5.0, 5.0
    within[:, :, 27, 27] = 5.0
    assert torch.equal(model(beyond), model(x))
    assert not torch.allclose(model(within), model(x))
    assert fv.convert(create("EVA-02")).game.view == (32, 32)
