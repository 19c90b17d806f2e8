"""How a sample is cut: torchvision's RandomResizedCrop and RandomHorizontalFlip as pure functions; and how
much of an image MAE's evaluation looks at.

Invariant: box and flip depend on (seed, epoch, sample, image size) alone. The law of the boxes is
torchvision.transforms.RandomResizedCrop's on the true size of the stored image: ten tries with the area
uniform in `scale` and the aspect ratio log-uniform in `ratio`, then the largest central box whose ratio is
allowed.
"""

import numpy as np

from pipeline.data.philox import Purpose, random_bits

TRIES = 10


def crop_boxes(
    seed: int,
    epoch: np.ndarray,
    sample: np.ndarray,
    sizes: np.ndarray,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> np.ndarray:
    """Boxes (x, y, width, height) in pixels, int64 (n, 4), inside images of `sizes` (n, 2): width, height.

    epoch, sample: (n,). scale: share of the area, from and to; ratio: width / height, from and to.
    """
    draws = random_bits(seed, Purpose.CROP, epoch, sample, 2 * TRIES + 2) * 2.0**-32
    image_w, image_h = np.asarray(sizes, np.int64).T
    area = (image_w * image_h)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[:, :TRIES])
    log_ratio = np.log(ratio)
    aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * draws[:, TRIES : 2 * TRIES])
    tried_w = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    tried_h = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    fits = (tried_w > 0) & (tried_w <= image_w[:, None]) & (tried_h > 0) & (tried_h <= image_h[:, None])
    first = fits.argmax(axis=1)
    rows = np.arange(len(first))
    found = fits[rows, first]

    image_ratio = image_w / image_h
    tall, wide = image_ratio < min(ratio), image_ratio > max(ratio)
    central_w = np.where(wide, np.rint(image_h * max(ratio)).astype(np.int64), image_w)
    central_h = np.where(tall, np.rint(image_w / min(ratio)).astype(np.int64), image_h)

    w = np.where(found, tried_w[rows, first], central_w)
    h = np.where(found, tried_h[rows, first], central_h)
    x = np.where(found, np.floor(draws[:, -2] * (image_w - w + 1)).astype(np.int64), (image_w - w) // 2)
    y = np.where(found, np.floor(draws[:, -1] * (image_h - h + 1)).astype(np.int64), (image_h - h) // 2)
    return np.stack([x, y, w, h], axis=1)


def flips(seed: int, epoch: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """Whether each sample is mirrored, bool (n,), true for one half."""
    return random_bits(seed, Purpose.FLIP, epoch, sample, 1)[:, 0] >> np.uint32(31) == 1
