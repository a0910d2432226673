import torch

import fastshap_kernels as fk


def test_mask_patches(compare):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 224, 224, generator=generator)
    present = torch.rand(8, 8, 196, generator=generator) < 0.5
    bits = fk.pack_bits(present)
    masks = present.view(64, 1, 14, 14).repeat_interleave(16, 2).repeat_interleave(16, 3).float()
    shape = "B 8, M 8, 3x224x224, P 196, float32"
    compare(
        "mask_patches",
        shape,
        lambda: fk.mask_patches(images, bits, (14, 14)),
        lambda: images.repeat_interleave(8, 0) * masks,
        against="repeat_interleave, multiply by a ready pixel mask",
        bar=3.0,
    )


def test_mask_patches_against_a_copy(compare):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 224, 224, generator=generator)
    bits = fk.pack_bits(torch.rand(8, 8, 196, generator=generator) < 0.5)
    tiled = torch.randn(64, 3, 224, 224, generator=generator)
    compare(
        "mask_patches",
        "B 8, M 8, 3x224x224, P 196, float32",
        lambda: fk.mask_patches(images, bits, (14, 14)),
        lambda: tiled.clone(),
        against="a copy of the same bytes",
        bar=0.5,
    )
