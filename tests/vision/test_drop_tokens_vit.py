"""Dropping tokens equals masking their attention keys with minus infinity in timm's own model."""

import pytest
import timm
import torch
from timm.layers import DropPath
from vision_transformers import SMALL, VISION_TRANSFORMERS, VOTING, added, create, images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision.games import packing

PLAYERS = 16


def coalitions(batch=3, number=4, seed=0):
    return fk.sample_coalitions(batch, number, PLAYERS, seed=seed)


def dense_values(vit, x, bits, votes=False):
    """v(S) by timm's own forward pass on every coalition, with absent keys at minus infinity."""
    present = fk.unpack_bits(bits, PLAYERS).flatten(0, 1)
    prefix = vit.num_prefix_tokens
    keys = torch.nn.functional.pad(present, (prefix, 0), value=True)
    mask = keys[:, None, None].expand(-1, 1, keys.shape[1], -1)
    tokens = vit.forward_features(x.repeat_interleave(bits.shape[1], 0), attn_mask=mask)
    patches, share = tokens[:, prefix:], present.sum(1, keepdim=True) / PLAYERS
    if votes or (vit.global_pool == "avg" and isinstance(vit.fc_norm, torch.nn.Identity)):
        weight, bias = fv.convert(vit).game.vote_weight()
        values = (vit.fc_norm(patches) * present.unsqueeze(2)).sum(1) / PLAYERS @ weight.T + share * bias
    elif vit.global_pool == "avg":
        values = vit.head(vit.fc_norm((patches * present.unsqueeze(2)).sum(1) / PLAYERS))
    elif vit.global_pool == "map":
        values = vit.head(vit.fc_norm(vit.attn_pool(patches, attn_mask=added(present)[:, None, None])))
    else:
        values = vit.forward_head(tokens)
    return values.unflatten(0, bits.shape[:2])


@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
@torch.no_grad()
def test_dropping_equals_dense_masking(kind):
    vit, x, bits = create(kind), images(), coalitions()
    values = fv.convert(vit).eval().coalition_values(x, bits)
    assert (values - dense_values(vit, x, bits)).abs().max() <= 1e-5


class FixedDropPath(torch.nn.Module):
    """Stochastic depth that drops the same sequences in every pass."""

    def __init__(self, seed, sequences=1000):
        super().__init__()
        self.kept = 2.0 * torch.randint(0, 2, (sequences,), generator=torch.Generator().manual_seed(seed))

    def forward(self, x):
        return x * self.kept[: len(x)].view(-1, *(1,) * (x.ndim - 1))


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
def test_gradients_equal_those_of_dense_masking(kind, head, monkeypatch):
    """Every parameter's, with stochastic depth, to 1e-4 of the gradient's norm."""
    vit, x, bits = create(kind), images(), coalitions()
    game = fv.convert(vit, head=head).train().game
    monkeypatch.setattr(packing, "TOKEN_BY_TOKEN", packing.TOKEN_BY_TOKEN | {FixedDropPath})
    for seed, block in enumerate(vit.blocks):
        block.drop_path1, block.drop_path2 = FixedDropPath(2 * seed), FixedDropPath(2 * seed + 1)

    def gradients(values):
        vit.zero_grad()
        values.sin().sum().backward()
        return {name: p.grad.clone() for name, p in vit.named_parameters() if p.grad is not None}

    assert game.packs
    values = game.values(x, fv.Coalitions(bits, game.players, paired=True))
    dense = dense_values(vit, x, bits, head == "votes")
    assert (values - dense).abs().max() <= 1e-5
    packed, expected = gradients(values), gradients(dense)
    whole = torch.cat([gradient.flatten() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        # A gradient that is nothing but rounding has no norm to be relative to.
        assert (packed[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * whole, name
    assert packed.keys() == expected.keys()


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # of timm's RmsNorm under autocast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
def test_mixed_precision_stays_near_full_precision(kind, dtype):
    model, x, bits = fv.convert(create(kind)).train(), images(), coalitions()

    def outputs_and_gradient(enabled):
        model.zero_grad()
        with torch.autocast("cpu", dtype, enabled=enabled):
            features, logits, values, _ = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
        (features.last.float().sin().mean() + logits.float().sin().mean() + values.float().sin().mean()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return [t.detach().float() for t in (features.last, logits, values, gradient)]

    for mixed, full in zip(outputs_and_gradient(True), outputs_and_gradient(False), strict=True):
        assert (mixed - full).norm() <= 0.05 * full.norm()


def test_explanation_blocks_are_as_wide_as_the_models_own():
    for kind in ("class token", "DINOv2 with SwiGLU", "AIMv2 (RMS norm, SwiGLU)"):
        vit = create(kind)
        block = fv.convert(vit).game.explanation_block(vit.embed_dim)
        assert block.mlp.fc2.in_features == vit.blocks[-1].mlp.fc2.in_features
        assert block(torch.zeros(2, PLAYERS, vit.embed_dim)).shape == (2, PLAYERS, vit.embed_dim)


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
def test_gradients_of_both_passes_agree(kind, head):
    """The joint packed pass moves every parameter as separate passes do."""
    vit, x, bits = create(kind), images(), coalitions()
    model = fv.convert(vit, head=head)

    def gradients(joint):
        model.zero_grad()
        if joint:
            features, logits, values, _ = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
        else:
            features, logits = model.game.features_and_logits(x)
            values = model.coalition_values(x, bits)
        (features.last.sin().sum() + logits.sin().sum() + values.sin().sum()).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    separate, joint = gradients(False), gradients(True)
    assert (joint - separate).norm() <= 1e-5 * separate.norm()


@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
def test_padding_changes_nothing(kind):
    """A batch padded to a known number of rows, by a little or by more than a sequence, in values and gradients."""
    model, x, bits = fv.convert(create(kind)), images(), fk.sample_coalitions(3, 3, PLAYERS, seed=0, paired=False)
    needed = int(fk.unpack_bits(bits, PLAYERS).sum()) + bits.shape[0] * bits.shape[1] * model.game.prefix

    def outputs_and_gradients(rows):
        model.zero_grad()
        features, logits, values, _ = model.joint(x, fv.Coalitions(bits, model.players, rows=rows))
        (features.last.sin().sum() + logits.sin().sum() + values.sin().sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return (
            features.last,
            logits,
            values,
            model.game.values(x, fv.Coalitions(bits, model.players, rows=rows)),
            gradient,
        )

    exact = outputs_and_gradients(None)
    for surplus in (0, 3, 50):
        for ours, unpadded in zip(outputs_and_gradients(needed + surplus), exact, strict=True):
            assert (ours - unpadded).norm() <= 1e-5 * unpadded.norm()


@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30, "random"])
@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
@torch.no_grad()
def test_removed_patches_never_change_a_value(kind, rubbish):
    model, x, bits = fv.convert(create(kind)).eval(), images(), coalitions()
    clean = model.coalition_values(x, bits)
    filling = torch.randn(x.shape[1:]) * 100 if rubbish == "random" else torch.full(x.shape[1:], rubbish)
    for m in range(bits.shape[1]):
        one = bits[:, m : m + 1].contiguous()
        spoiled = fk.mask_patches(x, one, model.grid, filling)
        assert torch.equal(model.coalition_values(spoiled, one)[:, 0], clean_alone(model, x, one))
    assert torch.isfinite(clean).all()


def clean_alone(model, x, one):
    return model.coalition_values(x, one)[:, 0]


@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
@torch.no_grad()
def test_null_and_grand_values(kind):
    vit, x = create(kind), images()
    model = fv.convert(vit).eval()
    nobody, everybody = (fk.pack_bits(torch.full((3, 1, PLAYERS), present)) for present in (False, True))
    null = model.null_value()
    if kind in VOTING:
        assert torch.equal(null, torch.zeros(7))
    assert (model.coalition_values(x, nobody)[:, 0] - null).abs().max() <= 1e-5
    assert (model.coalition_values(x, everybody)[:, 0] - vit(x)).abs().max() <= 1e-5


def test_stochastic_depth_drops_whole_sequences():
    """With a drop rate near 1 every block is skipped or scaled per sequence, never per batch."""
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=7, drop_path_rate=0.5, **SMALL)
    model, x = fv.convert(vit).train(), images(1).expand(64, -1, -1, -1)
    bits = fk.sample_coalitions(1, 2, PLAYERS, seed=0).expand(64, -1, -1)
    values = model.joint(x, fv.Coalitions(bits, model.players, paired=True)).values[:, 0]
    distinct = torch.unique((values * 1e4).round(), dim=0)
    assert 2 <= len(distinct) <= 2 * 2 * 2 * 2  # two residual branches in the two blocks that can drop
    vit.eval()
    values = model.eval().joint(x, bits).values[:, 0]
    torch.testing.assert_close(values, values[:1].expand_as(values))


@pytest.mark.parametrize("kind", ["class token", "registers, layer scale", "average pooling", "SigLIP"])
def test_gradient_checkpointing_keeps_less_and_changes_no_gradient(kind):
    model, x, bits = fv.convert(create(kind)).train(), images(), coalitions()
    model.backbone.blocks[1].drop_path1 = model.backbone.blocks[1].drop_path2 = DropPath(0.5)

    def gradients_and_bytes(enable):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        torch.manual_seed(0)
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _, logits, values, _ = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
        (logits.sin().sum() + values.sin().sum()).backward()
        size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        weights = sum(p.untyped_storage().nbytes() for p in model.parameters())
        return [p.grad for p in model.parameters() if p.grad is not None], size - weights

    plain, plain_bytes = gradients_and_bytes(False)
    checkpointed, checkpointed_bytes = gradients_and_bytes(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))
    assert checkpointed_bytes < 0.5 * plain_bytes


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "max"}, "global_pool='max'"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, "pool_include_prefix"),
        ("vit_tiny_patch16_224", {"patch_drop_rate": 0.1}, "patch_drop_rate"),
    ],
)
def test_unsupported_options_are_named(name, options, message):
    vit = timm.create_model(name, num_classes=7, **SMALL, **options)
    with pytest.raises(fv.UnsupportedModelError, match=message):
        fv.convert(vit, removal="token")


@pytest.mark.parametrize("kind", VISION_TRANSFORMERS)
def test_the_joint_pass_knows_the_value_of_nobody(kind):
    model, x = fv.convert(create(kind)), images(2)
    bits = fk.sample_coalitions(2, 4, model.players, seed=0)
    model.eval()
    null = model.joint(x, fv.Coalitions(bits, model.players, paired=True)).null
    takes_a_pass = not model.game.patches_vote and model.backbone.global_pool == "token"
    assert (null is not None) == takes_a_pass
    if null is not None:
        torch.testing.assert_close(null, model.null_value(), rtol=1e-5, atol=1e-5)
    assert model.joint(x[:0], bits[:0]).values.shape == (0, 4, model.num_classes)
