"""The law of the boxes is torchvision's RandomResizedCrop: Kolmogorov and Smirnov cannot tell them apart.

Everything is seeded, so the test says the same every time; wrong laws show that it would say otherwise.
"""

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from torchvision.transforms import RandomResizedCrop

from pipeline.data.random_resized_crop import crop_boxes

COUNT = 4000
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
SHAPES = [(500, 375), (375, 500), (256, 256), (96, 31), (400, 100), (100, 450), (40, 43)]
"""Width and height. 400 x 100 and 100 x 450 often end in the central fallback."""


def ours(shape, scale=SCALE, ratio=RATIO, seed=0):
    sample = np.arange(COUNT)
    return crop_boxes(seed, np.zeros_like(sample), sample, np.tile(shape, (COUNT, 1)), scale, ratio)


def theirs(shape, scale=SCALE, ratio=RATIO):
    torch.manual_seed(1)
    image = torch.empty(1, shape[1], shape[0])
    boxes = [RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(COUNT)]
    return np.array(boxes)[:, [1, 0, 3, 2]]  # from top, left, height, width


def features(boxes, shape):
    """What is compared, each with a law of its own."""
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
def test_area_ratio_and_place_follow_torchvisions_law(shape):
    assert min(p_values(ours(shape), theirs(shape), shape)) > 1e-3


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), RATIO), ((0.35, 0.9), (0.5, 2.0)), ((1, 1), RATIO)]
)
def test_so_they_do_with_other_ranges(scale, ratio):
    shape = (320, 240)
    assert min(p_values(ours(shape, scale, ratio), theirs(shape, scale, ratio), shape)) > 1e-3


@pytest.mark.parametrize("shape", [(1000, 90), (90, 1000)])
def test_where_no_try_can_fit_the_box_is_the_central_one(shape):
    expected = theirs(shape)
    assert (expected == expected[0]).all() and (ours(shape) == expected[0]).all()


def sampled(shape, *, uniform_ratio=False, uniform_side=False, tries=10, corner=False):
    """RandomResizedCrop written anew, with a mistake in it if one is asked for."""
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
def test_a_wrong_law_is_found_out(mistake, shape):
    reference = theirs(shape)
    assert min(p_values(sampled(shape), reference, shape)) > 1e-3
    assert min(p_values(sampled(shape, **mistake), reference, shape)) < 1e-4
