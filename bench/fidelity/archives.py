"""CIFAR-10 as the experiment reads it: cifar10_train.npz and cifar10_test.npz, archives of JPEG files.

`jpeg` (uint8) holds the files end to end, the i-th from `offsets[i]` to `offsets[i + 1]`; `labels` their classes, whose
names are `classes`.
"""

from __future__ import annotations

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torchvision import transforms

import fastshap_vision as fv
from fastshap_vision.data.datasets import ArrayImages
from fastshap_vision.images.decode import decode

ARRAYS = ("jpeg", "offsets", "labels", "classes")


def load(folder: Path, split: str, augment: bool = False) -> ArrayImages:
    """The "train" or the "test" images; where `augment`, cropped with padding and flipped at random.

    Every image is decoded once: a training run reads each of them many times.

    Raises:
        ValueError: for an archive that is not there, is damaged, or holds something else.
    """
    path = folder / f"cifar10_{split}.npz"
    if not path.is_file():
        raise ValueError(f"There is no archive {str(path)!r}. Pass as --data the folder that holds it.")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            jpeg, offsets, labels, classes = (archive[name] for name in ARRAYS)
        images = [decode(io.BytesIO(jpeg[start:stop]), "RGB") for start, stop in pairwise(offsets.tolist())]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    except Exception as error:  # zipfile, zlib, numpy and Pillow raise errors of many kinds on damaged files
        raise ValueError(f"The archive {str(path)!r} must hold {', '.join(ARRAYS)}, but: {error}") from error
    if len(pixels) != len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(
            f"The archive {str(path)!r} holds {len(pixels)} images, {len(labels)} labels from {labels.min()} to "
            f"{labels.max()} and the names of {len(classes)} classes, which do not fit together."
        )
    size = tuple(pixels.shape[2:])
    crop_and_flip = transforms.Compose([transforms.RandomCrop(size, padding=4), transforms.RandomHorizontalFlip()])
    return ArrayImages(
        pixels,
        torch.from_numpy(labels.astype(np.int64)),
        [str(name) for name in classes],
        fv.Preprocessing((3, *size), IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, crop_pct=1.0),
        largest=255,
        augment=crop_and_flip if augment else None,
    )
