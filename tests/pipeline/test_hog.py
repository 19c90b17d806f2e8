"""HOG targets against a slow implementation of the definition."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.methods.targets.hog import hog_features


def slow_hog(image: np.ndarray, patch_size: int) -> np.ndarray:
    """Compute the features of one image (C, H, W) in float64, pixel by pixel."""
    channels, height, width = image.shape
    padded = np.pad(image.astype(np.float64), ((0, 0), (1, 1), (1, 1)), mode="reflect")
    window = np.exp(-0.5 * ((np.arange(16) - 7.5) / 8) ** 2)
    cells = np.zeros((channels, 9, height // 8, width // 8))
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                around = padded[c, y : y + 3, x : x + 3]
                dx = around[:, 0] @ [1, 2, 1] - around[:, 2] @ [1, 2, 1]
                dy = around[0] @ [1, 2, 1] - around[2] @ [1, 2, 1]
                angle = math.atan2(dx, dy) / math.pi * 9
                weight = math.hypot(dx, dy) * window[y % 16] * window[x % 16]
                cells[c, math.floor(angle) % 9, y // 8, x // 8] += weight
    cells /= np.maximum(np.sqrt((cells**2).sum(axis=1, keepdims=True)), 1e-300)
    side = patch_size // 8
    return np.stack(
        [
            cells[:, :, row : row + side, column : column + side].ravel()
            for row in range(0, height // 8, side)
            for column in range(0, width // 8, side)
        ]
    )


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**16), patch_size=st.sampled_from([8, 16]))
def test_features_equal_the_definition(seed, patch_size):
    image = torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    features = hog_features(image, patch_size)
    assert features.shape == (2, 32 * 16 // patch_size**2, 27 * (patch_size // 8) ** 2)
    for one, ours in zip(image, features, strict=True):
        assert np.allclose(ours, slow_hog(one.numpy(), patch_size), atol=1e-9)


def test_features_ignore_offset_and_scale():
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    assert torch.allclose(hog_features(3 * image - 1, 16), hog_features(image, 16), atol=1e-9)


def test_an_edge_has_its_orientation():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 4:] = 1.0  # a vertical edge inside the left cells
    histogram = hog_features(image, 8).view(4, 9)
    assert histogram[0].argmax() == histogram[2].argmax()
    assert (histogram[0] > 0).sum() == 1
    assert torch.equal(histogram[1], torch.zeros(9))


def test_cells_must_fit_into_patches():
    with pytest.raises(ValueError, match="patch_size"):
        hog_features(torch.zeros(1, 3, 28, 28), 14)
