"""Models that packing does not know mask the attention to absent tokens."""

import logging

import pytest
import torch
from test_drop_tokens_eva import dense_values as eva_values
from test_drop_tokens_vit import dense_values as vit_values
from timm.models.eva import Eva
from vision_transformers import TINY, images, network, with_shares

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_vision import _log
from fastshap_vision.games.mask_attention import MaskedAttention

PLAYERS = 16
MASKED = {
    "norm behind": (
        "vit_base_patch16_rpn_224",
        {"init_values": 0.5, "class_token": True, "global_pool": "token"},
        "ResPostBlock",
    ),
    "parallel scaling, average": ("vit_pwee_patch16_reg1_gap_256", {"fc_norm": False}, "ParallelScalingBlock"),
    "differential, attention pooling": (
        "vit_dpwee_patch16_reg1_gap_256",
        {"global_pool": "map", "reg_tokens": 0},
        "DiffParallelScalingBlock",
    ),
    "parallel things": ("vit_small_patch16_18x2_224", {"global_pool": "avg"}, "ParallelThingsBlock"),
    "attention dropout": ("deit_tiny_distilled_patch16_224", {"attn_drop_rate": 0.1}, "attn_drop_rate"),
    "Eva, norm behind": ("eva02_tiny_patch14_224", {"use_post_norm": True, "global_pool": "token"}, "EvaBlockPostNorm"),
    "Eva, norm behind, attention pooling": (
        "vit_pe_core_tiny_patch16_384",
        {"use_post_norm": True},
        "EvaBlockPostNorm",
    ),
    "Eva, positions of each head": (
        "vit_small_patch16_rope_mixed_224",
        {"attn_drop_rate": 0.1, "init_values": 0.5},
        "attn_drop_rate",
    ),
}


def create(kind):
    name, options, _ = MASKED[kind]
    return network(name, noise=0.1, **TINY, **options)


def coalitions(number=4):
    return fk.sample_coalitions(3, number, PLAYERS, seed=0)


@pytest.mark.parametrize("kind", MASKED)
@torch.no_grad()
def test_values_are_those_of_masked_keys(kind, caplog, monkeypatch):
    monkeypatch.setattr(_log, "_said", set())
    backbone, x, bits = create(kind), images(), coalitions()
    with caplog.at_level(logging.INFO, "fastshap_vision"):
        model = fv.convert(backbone).eval()
        fv.convert(backbone)
    assert type(model.game) is MaskedAttention
    assert model.removal == "token"
    (record,) = caplog.records  # said once
    assert record.levelno == logging.WARNING
    assert MASKED[kind][2] in record.message
    assert "is masked instead" in record.message
    expected = (eva_values if isinstance(backbone, Eva) else vit_values)(backbone, x, bits)
    assert (model.coalition_values(x, bits) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("head", ["shares", "votes"])
@pytest.mark.parametrize("kind", MASKED)
@torch.no_grad()
def test_joint_pass_efficiency_and_removed_content(kind, head):
    backbone, x, bits = create(kind), images(), coalitions()
    model = with_shares(fv.convert(backbone, head=head))
    nobody, everybody = (fk.pack_bits(torch.full((3, 1, PLAYERS), present)) for present in (False, True))
    null, values = model.null_value(), model.coalition_values(x, bits)
    phi, logits = model.shapley_values(x)
    assert (model.coalition_values(x, nobody)[:, 0] - null).abs().max() <= 1e-5
    assert (model.coalition_values(x, everybody)[:, 0] - logits).abs().max() <= 1e-5
    assert (phi.sum(1) - (logits - null)).abs().max() <= 1e-5
    for found, expected in zip(model.joint(x, bits)[1:3], (logits, values), strict=True):
        assert (found - expected).abs().max() <= 1e-5
    for m in range(bits.shape[1]):
        one = bits[:, m : m + 1].contiguous()
        spoiled = fk.mask_patches(x, one, model.grid, torch.full(x.shape[1:], float("nan")))
        assert (model.coalition_values(spoiled, one)[:, 0] - values[:, m]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_masked_and_packed_agree(name):
    """Where both are possible: values to 1e-5, gradients to 1e-4 of their norm, gradient checkpointing included."""
    backbone = network(name, **TINY, init_values=0.5).train()
    x, bits = images(), coalitions()
    packed, masked = fv.convert(backbone).game, MaskedAttention(backbone, votes=False)
    backbone.set_grad_checkpointing(True)

    def pass_of(game):
        backbone.zero_grad()
        values = game.joint(x, fv.Coalitions(bits, game.players)).values
        values.sin().sum().backward()
        return values, torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None])

    (values, gradient), (expected, reference) = pass_of(packed), pass_of(masked)
    assert (values - expected).abs().max() <= 1e-5
    assert (gradient - reference).norm() <= 1e-4 * reference.norm()


def test_blocks_without_a_mask_are_named():
    class Plain(torch.nn.Module):
        def forward(self, x):
            return x

    backbone = network("vit_tiny_patch16_224", **TINY)
    backbone.blocks = torch.nn.Sequential(Plain())
    with pytest.raises(fv.UnsupportedModelError, match=r"Plain.*no attn_mask"):
        fv.convert(backbone, removal="token")
