import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from vision_transformers import fused_attention

import fastshap_vision as fv
from fastshap_vision._runtime import packed_sdpa as module
from fastshap_vision._runtime.packed_sdpa import cpu_attention


@pytest.fixture
def served(monkeypatch):
    """The numbers of rows that were attended to as a packed batch."""
    rows = []
    packed_attention = module.packed_attention

    def spy(qkv, *arguments, **options):
        rows.append(qkv.shape[0])
        return packed_attention(qkv, *arguments, **options)

    monkeypatch.setattr(module, "packed_attention", spy)
    return rows


def inputs(generator, dtype=torch.bfloat16, shape=(3, 2, 17, 16)):
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("scale", [None, 0.1])
def test_equals_attention_in_float64(generator, served, scale):
    leaves, cotangent = inputs(generator), torch.randn(3, 2, 17, 16, generator=generator).bfloat16()
    with cpu_attention(leaves[0]):
        out = scaled_dot_product_attention(*leaves, scale=scale)
    found = [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]
    assert served == [3 * 17]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out = scaled_dot_product_attention(*exact, scale=scale)
    expected = [out.detach(), *torch.autograd.grad(out, exact, cotangent.double())]
    plain = scaled_dot_product_attention(*leaves, scale=scale)
    plain = [plain.detach(), *torch.autograd.grad(plain, leaves, cotangent)]
    for ours, theirs, truth in zip(found, plain, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        assert (ours - truth).norm() <= 2 * (theirs - truth).norm() + torch.finfo(ours.dtype).eps * truth.norm()


def test_other_attention_stays_as_it_is(generator, served):
    query, key, value = inputs(generator)
    other = [
        lambda: scaled_dot_product_attention(*inputs(generator, torch.float32)),
        lambda: scaled_dot_product_attention(*inputs(generator, shape=(3, 2, 17, 12))),
        lambda: scaled_dot_product_attention(query, key, value, is_causal=True),
        lambda: scaled_dot_product_attention(query, key, value, attn_mask=torch.ones(17, 17, dtype=torch.bool)),
        lambda: scaled_dot_product_attention(query, key, value, None, 0.5),
        lambda: scaled_dot_product_attention(query, key[:, :, :5], value[:, :, :5]),
        lambda: scaled_dot_product_attention(query[:0], key[:0], value[:0]),
    ]
    with cpu_attention(query):
        for attend in other:
            attend()
    assert served == []


def model(**options):
    size = {"embed_dim": 32, "depth": 1, "num_heads": 2}
    with fused_attention(True):
        return fv.SelfExplainingClassifier("vit_tiny_patch16_224", 5, img_size=64, model_kwargs=size, **options)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        (fv.JointObjective(coalitions=2, masked_task_weight=1.0), [16, 16]),  # the blocks before the shares
        (fv.JointObjective(coalitions=2), [17, 16, 16]),
        (fv.TaskObjective(), [17]),
    ],
    ids=["joint", "v(S) without gradient", "task"],
)
def test_dense_attention_of_a_step_uses_it(generator, served, objective, rows):
    images = torch.randn(4, 3, 64, 64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        objective(model(head_depth=2), images, torch.arange(4)).loss.backward()
    assert served == [4 * count for count in rows]


def test_explanations_do_not(generator, served):
    with torch.autocast("cpu", torch.bfloat16):
        model().explain(torch.randn(2, 3, 64, 64, generator=generator))
    assert served == []


@pytest.mark.parametrize("masked_task_weight", [0.0, 1.0])
@pytest.mark.parametrize("kind", [fv.TaskObjective, fv.JointObjective])
def test_checkpointed_blocks_keep_their_attention(generator, served, kind, masked_task_weight):
    """What is computed again must be what was computed."""
    options = {"coalitions": 2, "regression_ramp": (0.0, 0.0), "masked_task_weight": masked_task_weight}
    objective = kind(**options) if kind is fv.JointObjective else kind()
    checkpointed = model(head_depth=0)
    checkpointed.set_grad_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(checkpointed, torch.randn(4, 3, 64, 64, generator=generator), torch.arange(4)).loss
    loss.backward()
    assert served == []
