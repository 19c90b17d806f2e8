"""Sliding-window inference: logits of an image of any size from a model of one input size.

Invariant: the windows cover every pixel, and a pixel's logits are the mean over the windows that contain it. An image
is predicted alone, so its result does not depend on other images or ranks.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

CHUNK_CLASSES = 16
"""Classes whose logits `predict_classes` resizes at a time."""


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Return the first pixels of the windows along an axis, as mmsegmentation: the last one ends at the border."""
    count = max(0, length - window + stride - 1) // stride + 1
    return [max(0, min(number * stride, length - window)) for number in range(count)]


def window_corners(height: int, width: int, window: int, stride: int) -> list[tuple[int, int]]:
    """Return y and x of the first pixel of each window of an image."""
    return [(y, x) for y in window_starts(height, window, stride) for x in window_starts(width, window, stride)]


def slide(
    image: torch.Tensor, predict: Callable[[torch.Tensor], torch.Tensor], window: int, stride: int, batch: int = 1
) -> torch.Tensor:
    """Return the mean logits (C, H, W) of an image (3, H, W).

    Args:
        predict: Maps (n, 3, window, window) to logits (n, C, window, window).
        stride: Pixels between windows, at most `window`.
        batch: Windows to predict at a time.
    """
    height, width = image.shape[-2:]
    # An image smaller than the window is padded with the mean color, like a crop in training.
    image = F.pad(image, (0, max(0, window - width), 0, max(0, window - height)))
    corners = window_corners(height, width, window, stride)
    total, counts = None, image.new_zeros(image.shape[-2:])
    for first in range(0, len(corners), batch):
        part = corners[first : first + batch]
        logits = predict(torch.stack([image[:, y : y + window, x : x + window] for y, x in part]))
        if total is None:
            total = logits.new_zeros(logits.shape[1], *image.shape[-2:])
        for (y, x), values in zip(part, logits, strict=True):
            total[:, y : y + window, x : x + window] += values
            counts[y : y + window, x : x + window] += 1
    assert total is not None
    return (total / counts)[:, :height, :width]


def predict_classes(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Return the most likely class of each pixel, int64 (H, W), of logits (C, h, w) resized to (H, W) = size.

    Logits are resized for a few classes at a time: those of 150 classes for a large photograph would take gigabytes.
    """
    best = torch.full(size, float("-inf"), device=logits.device)
    classes = torch.zeros(size, dtype=torch.long, device=logits.device)
    for first in range(0, len(logits), CHUNK_CLASSES):
        part = logits[None, first : first + CHUNK_CLASSES]
        values, indexes = F.interpolate(part, size=size, mode="bilinear", align_corners=False)[0].max(dim=0)
        classes = torch.where(values > best, indexes + first, classes)
        best = torch.maximum(best, values)
    return classes
