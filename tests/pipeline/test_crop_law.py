"""Crop boxes have the distribution of torchvision's RandomResizedCrop (Kolmogorov-Smirnov tests, seeded)."""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.data.random_resized_crop import draw_crop_boxes

COUNT = 4000
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SHAPES = [(500, 375), (375, 500), (256, 256), (96, 31), (400, 100), (100, 450), (40, 43), (33, 31), (1600, 200)]
"""Width and height. 400 x 100, 100 x 450 and 1600 x 200 often end in the central fallback."""


def ours(shape, scale=SCALE, ratio=RATIO, seed=0):
    sample_id = np.arange(COUNT)
    sizes = np.tile(shape, (COUNT, 1))
    return draw_crop_boxes(seed, np.zeros_like(sample_id), sample_id, sizes, scale, ratio)


def torchvisions(shape, scale=SCALE, ratio=RATIO):
    torch.manual_seed(1)
    image = torch.empty(1, shape[1], shape[0])
    boxes = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(COUNT)]
    return np.array(boxes)[:, [1, 0, 3, 2]]  # from top, left, height, width


def features(boxes, shape):
    x, y, w, h = boxes.T.astype(float)
    return {
        "area": w * h,
        "ratio": w / h,
        "x": (x + 0.5) / (shape[0] - w + 1),
        "y": (y + 0.5) / (shape[1] - h + 1),
        "right": x + w,
        "bottom": y + h,
    }


def p_values(one, other, shape):
    pairs = zip(features(one, shape).values(), features(other, shape).values(), strict=True)
    return [ks_2samp(a, b).pvalue for a, b in pairs]


@pytest.mark.parametrize("shape", SHAPES)
def test_boxes_have_torchvisions_distribution(shape):
    assert min(p_values(ours(shape), torchvisions(shape), shape)) > 1e-3


@pytest.mark.parametrize(("scale", "ratio"), [((0.08, 1.0), RATIO), ((0.35, 0.9), (0.5, 2.0)), ((1, 1), RATIO)])
def test_distribution_holds_for_other_ranges(scale, ratio):
    shape = (320, 240)
    assert min(p_values(ours(shape, scale, ratio), torchvisions(shape, scale, ratio), shape)) > 1e-3


@pytest.mark.parametrize("shape", [(1000, 90), (90, 1000)])
def test_fallback_is_torchvisions_central_box(shape):
    expected = torchvisions(shape)
    assert (expected == expected[0]).all() and (ours(shape) == expected[0]).all()


def reimplemented(shape, *, uniform_ratio=False, uniform_side=False, tries=10, corner=False):
    """RandomResizedCrop, optionally with a mistake."""
    random = np.random.default_rng(2)
    width, height = shape
    boxes = []
    for _ in range(COUNT):
        for _ in range(tries):
            share = random.uniform(*SCALE) if not uniform_side else random.uniform(*np.sqrt(SCALE)) ** 2
            ratio = random.uniform(*RATIO) if uniform_ratio else np.exp(random.uniform(*np.log(RATIO)))
            w, h = (round(np.sqrt(share * width * height * r)) for r in (ratio, 1 / ratio))
            if 0 < w <= width and 0 < h <= height:
                x, y = (0, 0) if corner else (random.integers(width - w + 1), random.integers(height - h + 1))
                break
        else:
            w, h = min(width, round(height * RATIO[1])), min(height, round(width / RATIO[0]))
            x, y = (width - w) // 2, (height - h) // 2
        boxes.append((x, y, w, h))
    return np.array(boxes)


@pytest.mark.parametrize(
    ("mistake", "shape"),
    [
        ({"uniform_ratio": True}, (500, 375)),
        ({"uniform_side": True}, (500, 375)),
        ({"tries": 5}, (400, 100)),
        ({"corner": True}, (500, 375)),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_wrong_distribution_fails_the_test(mistake, shape):
    reference = torchvisions(shape)
    assert min(p_values(reimplemented(shape), reference, shape)) > 1e-3
    assert min(p_values(reimplemented(shape, **mistake), reference, shape)) < 1e-4
