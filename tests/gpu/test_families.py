"""Transformers beyond timm's `VisionTransformer` on a CUDA device: values of the CPU, and no waiting for the device."""

import pytest
import torch

pytest.importorskip("timm")

import test_drop_tokens_eva
import test_mask_attention
import test_mask_cells_tokens
from dispatch import no_waiting
from vision_transformers import images

import fastshap_kernels as fk
import fastshap_vision as fv
from fastshap_kernels import testing

pytestmark = pytest.mark.gpu

KINDS = [
    *((test_drop_tokens_eva, kind) for kind in test_drop_tokens_eva.EVAS),
    *((test_mask_attention, kind) for kind in test_mask_attention.MASKED),
    *((test_mask_cells_tokens, kind) for kind in ("swin_tiny_patch4_window7_224", "cait_xxs24_224")),
]


@pytest.fixture(autouse=True)
def _plain_pytorch(monkeypatch):
    """Not every operator of PyTorch has a deterministic version, which `_poisoned_memory` asks for; no TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    with testing.plain_pytorch():
        yield


@pytest.mark.parametrize(("family", "kind"), KINDS, ids=[kind for _, kind in KINDS])
def test_joint_pass_is_that_of_the_cpu_and_never_waits(family, kind):
    size = test_mask_cells_tokens.FAMILIES[kind][1] if family is test_mask_cells_tokens else 32
    model, x = fv.convert(family.create(kind), img_size=size).eval(), images(size=size)
    bits = fk.sample_coalitions(3, 4, model.players, seed=0)
    with torch.no_grad():
        expected = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
    model, x, bits = model.cuda(), x.cuda(), bits.cuda()
    model.joint(x, fv.Coalitions(bits, model.players, paired=True)).values.sum().backward()
    with no_waiting():
        found = model.joint(x, fv.Coalitions(bits, model.players, paired=True))
        found.values.sum().backward()
    for ours, reference in zip(found[:3], expected[:3], strict=True):
        assert (ours.cpu() - reference).norm() <= 1e-3 * reference.norm()
