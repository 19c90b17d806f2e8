"""Crops of a fixed size at a random or the central position, for MAE's Table 1 (e).

Invariant: a box depends only on (seed, epoch, sample, image size). Its side is the share of the image's shorter side
that evaluation crops, and its pixels are resized to the model's image size.
"""

import numpy as np

from pipeline.data.philox import Purpose, random_bits


def center_boxes(sizes: np.ndarray, crop_pct: float) -> np.ndarray:
    """Return the central square of images.

    Args:
        sizes: (n, 2) width and height of the images in pixels.
        crop_pct: Side of the square as a share of the shorter side, in (0, 1].

    Returns:
        int64 (n, 4): x, y, width and height in pixels.
    """
    sizes, side = _sides(sizes, crop_pct)
    return np.concatenate([(sizes - side) // 2, side, side], axis=1)


def draw_fixed_size_boxes(
    seed: int, epoch: np.ndarray, sample_id: np.ndarray, sizes: np.ndarray, crop_pct: float
) -> np.ndarray:
    """Draw a square of the size of `center_boxes` at a uniform position: int64 (n, 4)."""
    sizes, side = _sides(sizes, crop_pct)
    draws = random_bits(seed, Purpose.CROP, epoch, sample_id, 2) * 2.0**-32
    corner = np.floor(draws * (sizes - side + 1)).astype(np.int64)
    return np.concatenate([corner, side, side], axis=1)


def _sides(sizes: np.ndarray, crop_pct: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes and the side of each image's square, int64 (n, 1)."""
    sizes = np.asarray(sizes, np.int64)
    return sizes, np.maximum(1, np.rint(crop_pct * sizes.min(axis=1, keepdims=True))).astype(np.int64)
