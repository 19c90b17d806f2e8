"""Photometric distortion has mmsegmentation's distribution, and the HSV space of matplotlib."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

from pipeline.data.augment.photometric import NOISE_DIM, change_hue_and_saturation, distort

ORDER, BRIGHTNESS, CONTRAST, SATURATION, HUE = 0, 1, 2, 3, 4
STRENGTH = 4
"""Distance from the column that decides whether an operation is used to the one with its strength."""


def levels(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).float()


def noise(count: int, **values: float) -> torch.Tensor:
    """Return noise of images that are not distorted, except for columns by number, such as _1=0.3."""
    result = torch.full((count, NOISE_DIM), 0.9)
    for name, value in values.items():
        result[:, int(name[1:])] = value
    return result


def test_without_operations_images_are_unchanged():
    images = levels(4)
    assert torch.equal(distort(images, noise(4)), images)
    assert torch.equal(distort(images, noise(4, _0=0.1)), images)


@given(st.floats(0.5, 1.5), st.integers(-18, 17), st.integers(0, 1000))
def test_hue_and_saturation_are_those_of_hsv(factor, steps, seed):
    images = levels(2, seed)
    result = change_hue_and_saturation(images, torch.full((2,), factor), torch.full((2,), steps / 180))
    hsv = rgb_to_hsv(images.permute(0, 2, 3, 1).double().numpy() / 255)
    hsv[..., 0] = (hsv[..., 0] + steps / 180) % 1
    hsv[..., 1] = np.clip(hsv[..., 1] * factor, 0, 1)
    expected = torch.from_numpy(hsv_to_rgb(hsv)).permute(0, 3, 1, 2) * 255
    torch.testing.assert_close(result.double(), expected, atol=2e-3, rtol=0)


def test_brightness_and_contrast_have_their_ranges():
    images = torch.full((2, 3, 4, 4), 100.0)
    for strength, level in ((0.0, 68.0), (0.5, 100.0), (0.75, 116.0)):
        assert distort(images, noise(2, _1=0.1, _5=strength)).unique().tolist() == pytest.approx([level])
    for strength, level in ((0.0, 50.0), (0.5, 100.0), (0.9, 140.0)):
        assert distort(images, noise(2, _2=0.1, _6=strength)).unique().tolist() == pytest.approx([level], rel=1e-5)


def test_contrast_comes_before_or_after_the_colors():
    images = torch.tensor([200.0, 40.0, 100.0])[None, :, None, None]
    settings = {"_2": 0.1, "_6": 1.0, "_3": 0.1, "_7": 0.0}  # contrast 1.5, saturation 0.5
    first, last = (distort(images, noise(1, _0=order, **settings)).flatten().tolist() for order in (0.1, 0.9))
    assert first == pytest.approx([255.0, 157.5, 202.5], abs=1e-3)  # clipped at 255 before the colors change
    assert last == pytest.approx([255.0, 180.0, 225.0], abs=1e-3)


def test_levels_stay_in_range_and_rows_are_independent():
    generator = torch.Generator().manual_seed(0)
    images, draws = levels(64), torch.rand(64, NOISE_DIM, generator=generator)
    together = distort(images, draws)
    assert together.min() >= 0 and together.max() <= 255
    alone = torch.cat([distort(image[None], row[None]) for image, row in zip(images, draws, strict=True)])
    assert torch.equal(together, alone)
    unchanged = (together == images).flatten(1).all(1).float().mean()
    assert 0 < unchanged < 0.25  # a sixteenth is expected
