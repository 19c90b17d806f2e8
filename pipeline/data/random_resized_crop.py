"""torchvision's RandomResizedCrop and RandomHorizontalFlip as pure functions.

Invariant: box and flip depend only on (seed, epoch, sample, image size). Boxes have the distribution of
torchvision.transforms.RandomResizedCrop on the stored image: ten tries with the area uniform in `scale` and
the aspect ratio log-uniform in `ratio`, then the largest central box with an allowed ratio.
"""

import numpy as np

from pipeline.data.philox import Purpose, random_bits

TRIES = 10


def draw_crop_boxes(
    seed: int,
    epoch: np.ndarray,
    sample_id: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Draw one crop box for each sample.

    Args:
        epoch, sample_id: (n,).
        sizes: (n, 2) width and height of the images in pixels.
        scale: range of the box's share of the image area. ratio: range of width / height.

    Returns:
        int64 (n, 4): x, y, width and height in pixels, inside the image.
    """
    draws = random_bits(seed, Purpose.CROP, epoch, sample_id, 2 * TRIES + 2) * 2.0**-32
    image_w, image_h = np.asarray(sizes, np.int64).T
    area = (image_w * image_h)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    log_ratio = np.log(ratio)
    aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[:, TRIES : 2 * TRIES])
    tried_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= image_w[:, None]) & (tried_h > 0) & (tried_h <= image_h[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(first))
    any_fits = fits[rows, first]

    image_ratio = image_w / image_h
    tall, wide = image_ratio < min(ratio), image_ratio > max(ratio)
    central_w = np.where(wide, np.rint(image_h * max(ratio)).astype(np.int64), image_w)
    central_h = np.where(tall, np.rint(image_w / min(ratio)).astype(np.int64), image_h)

    w = np.where(any_fits, tried_w[rows, first], central_w)
    h = np.where(any_fits, tried_h[rows, first], central_h)
    x = np.where(any_fits, np.floor(draws[:, -2] * (image_w - w + 1)).astype(np.int64), (image_w - w) // 2)
    y = np.where(any_fits, np.floor(draws[:, -1] * (image_h - h + 1)).astype(np.int64), (image_h - h) // 2)
    return np.stack([x, y, w, h], axis=1)


def draw_flips(seed: int, epoch: np.ndarray, sample_id: np.ndarray) -> np.ndarray:
    """Draw for each sample whether it is flipped horizontally, bool (n,), with probability 1/2."""
    return random_bits(seed, Purpose.FLIP, epoch, sample_id, 1)[:, 0] >> np.uint32(31) == 1
