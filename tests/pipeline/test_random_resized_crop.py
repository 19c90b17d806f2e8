import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.random_resized_crop import draw_crop_boxes, draw_flips
from pipeline.recipe.sections import eval_resize_size


@given(st.integers(1, 4000), st.integers(1, 4000), st.integers(0, 2**63 - 1))
def test_box_is_inside_its_image(width, height, seed):
    sizes = np.tile([[width, height]], (50, 1))
    boxes = draw_crop_boxes(seed, np.zeros(50, int), np.arange(50), sizes, (0.2, 1.0), (3 / 4, 4 / 3))
    x, y, w, h = boxes.T
    assert (x >= 0).all() and (y >= 0).all() and (w > 0).all() and (h > 0).all()
    assert (x + w <= width).all() and (y + h <= height).all()


def test_half_of_the_samples_are_flipped():
    assert abs(draw_flips(0, np.zeros(10000, int), np.arange(10000)).mean() - 0.5) < 0.02


@pytest.mark.parametrize(("size", "resize"), [(32, 36), (48, 54), (224, 256), (225, 225), (384, 384)])
def test_evaluation_resize_is_maes(size, resize):
    assert eval_resize_size(size) == resize
