"""Sliding windows cover every pixel of an image of any size, and average where they overlap."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pipeline.evals.sliding_window import predict_classes, slide, window_starts

CONV = torch.randn(6, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def predict(images: torch.Tensor) -> torch.Tensor:
    """A model with a receptive field beyond a pixel, so that windows differ at their borders."""
    return F.conv2d(images, CONV, padding=1)


def random_image(height: int, width: int) -> torch.Tensor:
    return torch.randn(3, height, width, generator=torch.Generator().manual_seed(height + 1000 * width))


@given(st.integers(1, 2000), st.integers(1, 600), st.data())
def test_windows_cover_every_pixel_and_end_at_the_border(length, window, data):
    stride = data.draw(st.integers(1, window))
    starts = window_starts(length, window, stride)
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert starts[-1] + window == max(length, window)
    assert all(later - earlier <= stride for earlier, later in itertools.pairwise(starts))


def test_published_windows_of_ade20k():
    assert window_starts(512, 512, 341) == [0] and window_starts(683, 512, 341) == [0, 171]
    assert window_starts(1194, 512, 341) == [0, 341, 682] and window_starts(1195, 512, 341) == [0, 341, 682, 683]


@given(st.integers(5, 40), st.integers(5, 40), st.integers(1, 3))
@settings(max_examples=30)
def test_one_window_equals_a_single_pass(height, width, batch):
    image = random_image(height, width)
    result = slide(image, predict, window=40, stride=27, batch=batch)
    padded = F.pad(image, (0, 40 - width, 0, 40 - height))
    torch.testing.assert_close(result, predict(padded[None])[0, :, :height, :width])


@given(st.integers(3, 70), st.integers(3, 70), st.integers(1, 4), st.integers(5, 17))
@settings(max_examples=30)
def test_overlaps_are_averaged_for_odd_sizes(height, width, batch, stride):
    image, window = random_image(height, width), 17
    result = slide(image, predict, window, stride, batch)
    padded = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    total, counts = torch.zeros(6, *padded.shape[1:]), torch.zeros(padded.shape[1:])
    y = 0
    while True:
        y, x = min(y, padded.shape[1] - window), 0
        while True:
            x = min(x, padded.shape[2] - window)
            total[:, y : y + window, x : x + window] += predict(padded[None, :, y : y + window, x : x + window])[0]
            counts[y : y + window, x : x + window] += 1
            if x + window >= padded.shape[2]:
                break
            x += stride
        if y + window >= padded.shape[1]:
            break
        y += stride
    assert counts.min() >= 1
    torch.testing.assert_close(result, (total / counts)[:, :height, :width], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_classes", [1, 16, 17, 40])
def test_classes_are_the_argmax_of_resized_logits(num_classes):
    logits = torch.randn(num_classes, 9, 13)
    expected = F.interpolate(logits[None], size=(31, 22), mode="bilinear", align_corners=False)[0].argmax(0)
    assert torch.equal(predict_classes(logits, (31, 22)), expected)
