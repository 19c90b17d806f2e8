"""Augmentations on tensors: Pillow's and timm's pixels, the papers' laws."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from pipeline.augment import rand_augment
from pipeline.data.random import Purpose, uniform

FILL = torch.tensor([124.0, 116.0, 104.0])
TIMMS = dict(zip(rand_augment.OPERATIONS, auto_augment._RAND_INCREASING_TRANSFORMS, strict=True))


def numbers(count: int, width: int, epoch: int = 0) -> torch.Tensor:
    return torch.from_numpy(uniform(0, Purpose.MASK, epoch, np.arange(count), width))


@pytest.fixture(scope="module")
def pictures(photographs) -> list[Image.Image]:
    """Photographs of 64 x 48 px, and flat ones."""
    paths = sorted(photographs.rglob("*.jp*g"))[:10]
    found = [Image.open(path).convert("RGB").resize((64, 48)) for path in paths]
    return [*found, Image.new("RGB", (64, 48), (7, 7, 7)), Image.new("RGB", (64, 48), (255, 0, 128))]


def as_levels(pictures: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(p, np.float32) for p in pictures]).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("name", rand_augment.OPERATIONS)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strength", [0.0, 0.37, 0.9, 0.99])
def test_an_operation_gives_timms_pixels(pictures, name, sign, strength):
    op = auto_augment.AugmentOp(
        TIMMS[name],
        prob=1.0,
        magnitude=10 * strength,
        hparams={
            "img_mean": tuple(int(value) for value in FILL),
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    chance, random.random = random.random, lambda: 0.0 if sign == 1 else 0.9  # all that timm draws here
    try:
        theirs = as_levels([op(picture) for picture in pictures])
    finally:
        random.random = chance
    count = len(pictures)
    operation = torch.full((count,), rand_augment.OPERATIONS.index(name))
    strengths, signs = torch.full((count,), strength), torch.full((count,), float(sign))
    ours = rand_augment.apply(as_levels(pictures), operation, strengths, signs, FILL)
    assert (ours == ours.floor()).all() and ours.min() >= 0 and ours.max() <= 255
    different = (ours - theirs).abs()
    print(different.max(), (different > 0).float().mean())
    assert different.mean() < 0.02 and (different > 1).float().mean() < 1e-3
