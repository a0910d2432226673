"""The coalitions of a convolutional network on a CUDA device."""

import copy
from contextlib import nullcontext

import pytest
import torch

import fastshap_kernels as fk

pytest.importorskip("timm")

from dispatch import no_waiting
from torch._dynamo.testing import CompileCounterWithBackend
from vision_transformers import create, images

from fastshap_vision import Coalitions
from fastshap_vision.games.mask_cells_cnn import CellRemoval

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("removal", ["cell", "stem"])
@torch.no_grad()
def test_the_convolutional_path_compiles_whole(removal):
    """Under mixed precision: one compilation, near the CPU's float32 values, and nothing waits for the device."""
    backbone, x = create("resnet18"), images(size=64)
    expected = CellRemoval(backbone, False, (3, 64, 64), removal)
    ours = CellRemoval(copy.deepcopy(backbone).cuda(), False, (3, 64, 64), removal)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(ours.values, fullgraph=True, backend=counter)
    x_device = x.cuda()
    for seed in range(3):
        bits = fk.sample_coalitions(3, 4, ours.players, seed=seed)
        bits_device = bits.cuda()
        # The first call compiles.
        with torch.autocast("cuda", torch.bfloat16), no_waiting() if seed else nullcontext():
            values = compiled(x_device, bits_device)
            eager = ours.values(x_device, Coalitions(bits_device, ours.players))
        theirs = expected.values(x, Coalitions(bits, expected.players))
        for mine in (values, eager):
            assert (mine.float().cpu() - theirs).norm() <= 0.05 * theirs.norm()
    assert counter.frame_count == 1
