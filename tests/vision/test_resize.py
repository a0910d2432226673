"""Pictures that torch resizes: faster, and nearly the images that timm makes of them."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import fastshap_vision as fv
from fastshap_vision.images.decode import as_viewed
from fastshap_vision.images.normalise import Normalised

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture(mode="RGB", seed=0):
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    return coarse.resize((90, 64), Image.Resampling.BICUBIC).convert(mode)


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_pixels_differ_by_little(crop_mode, interpolation):
    crop = {"crop_pct": 0.9, "crop_mode": crop_mode, "interpolation": interpolation}
    preprocessing = fv.Preprocessing((3, 48, 48), MEAN, STD, **crop)
    exact, fast = (preprocessing.transform(resize=resize)(picture()) for resize in ("pillow", "torch"))
    levels = (255 * (preprocessing.restore(fast) - preprocessing.restore(exact))).round().abs()
    assert fast.shape == exact.shape
    assert levels.max() <= 2
    # torch's kernels of bytes are of AVX2; others round otherwise.
    assert (levels > 0).float().mean() < (0.3 if torch.backends.cpu.get_cpu_capability() == "DEFAULT" else 0.02)
    assert torch.equal(exact, create_transform((3, 48, 48), mean=MEAN, std=STD, **crop)(picture()))


def test_pixels_are_normalised_in_a_copy():
    pixels = torch.arange(256, dtype=torch.uint8).expand(3, 1, -1)
    found = Normalised((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))(pixels)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)))
    assert torch.equal(found, (pixels.float().div(255) - mean) / std)
    assert repr(Normalised((0.5,), (0.25,))) == "Normalised(mean=[0.5], std=[0.25])"


def test_a_picture_that_needs_no_change_is_not_copied():
    image = picture()
    assert as_viewed(image, "RGB") is image
    before = image.tobytes()
    fv.Preprocessing((3, 64, 90), MEAN, STD).transform()(image).zero_()
    assert image.tobytes() == before


@pytest.mark.parametrize("name", ["folder", "torch/image_folder"])
def test_data_are_resized_as_asked(tmp_path, name):
    for split in ("train", "val"):
        (tmp_path / split / "one").mkdir(parents=True)
        picture().save(tmp_path / split / "one" / "0.jpg")
    options = {"data_dir": tmp_path, "image_size": 48}
    exact, fast = (fv.load_dataset(name, "test", resize=resize, **options)[0][0] for resize in ("pillow", "torch"))
    assert not torch.equal(exact, fast)
    assert torch.allclose(exact, fast, atol=2.5 / 255 / 0.22)
    augmented = []
    for resize in ("pillow", "torch"):
        torch.manual_seed(0)
        random.seed(0)
        augmented.append(fv.load_dataset(name, "train", resize=resize, **options)[0][0])
    assert torch.equal(*augmented)


def test_what_torch_can_not_is_refused():
    with pytest.raises(ValueError, match=r"`resize` must be one of 'pillow', 'torch'"):
        fv.load_dataset("folder", "test", resize="opencv")
    for change in ({"interpolation": "lanczos"}, {"crop_mode": "border"}):
        asked = fv.Preprocessing((3, 48, 48), MEAN, STD, **change)
        with pytest.raises(ValueError, match=rf"`resize` must be 'pillow' for .*{next(iter(change.values()))}"):
            fv.load_dataset("folder", "test", resize="torch", preprocessing=asked)
