import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from pipeline.data.random_resized_crop import crop_boxes, flips
from pipeline.recipe.sections import resize_of

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def boxes(width, height, count, scale=SCALE, ratio=RATIO, seed=0):
    sizes = np.tile([[width, height]], (count, 1))
    return crop_boxes(seed, np.zeros(count, int), np.arange(count), sizes, scale, ratio)


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**63 - 1))
def test_a_box_lies_inside_its_image(width, height, seed):
    x, y, w, h = boxes(width, height, 50, seed=seed).T
    assert (x >= 0).all() and (y >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (x + w <= width).all() and (y + h <= height).all()


def kolmogorov_smirnov(first, second):
    """The largest distance between two empirical distribution functions."""
    grid = np.union1d(first, second)
    cdfs = [np.searchsorted(np.sort(side), grid, side="right") / len(side) for side in (first, second)]
    return np.abs(cdfs[0] - cdfs[1]).max()


def test_the_law_of_the_boxes_is_torchvisions():
    torch.manual_seed(0)
    count = 4000
    for width, height in [(500, 375), (90, 640), (1600, 200), (33, 31)]:
        image = torch.empty(3, height, width)
        theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(count)])
        theirs = theirs[:, [1, 0, 3, 2]]  # top, left, height, width -> x, y, width, height
        ours = boxes(width, height, count)
        for column in range(4):
            # p = 1e-4 at n = m = 4000
            distance = kolmogorov_smirnov(ours[:, column], theirs[:, column])
            assert distance < 2.23 * np.sqrt(2 / count), (width, height, column, distance)


def test_an_image_too_long_for_any_box_gives_torchvisions_central_one():
    image = torch.empty(3, 10, 1000)
    top, left, height, width = RandomResizedCrop.get_params(image, (0.9, 1.0), RATIO)
    assert (boxes(1000, 10, 5, scale=(0.9, 1.0)) == [left, top, width, height]).all()


def test_half_of_the_samples_are_flipped():
    assert abs(flips(0, np.zeros(10000, int), np.arange(10000)).mean() - 0.5) < 0.02


@pytest.mark.parametrize(("size", "resize"), [(32, 36), (48, 54), (224, 256), (225, 225), (384, 384)])
def test_evaluation_resizes_as_mae_does(size, resize):
    assert resize_of(size) == resize
