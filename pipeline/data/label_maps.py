"""Label maps of semantic segmentation, placed on the canvas together with their images.

Invariant: a pixel of the canvas has the label of the stored pixel under its center, or IGNORED outside of the image.
Scale, position and flip are functions of (seed, epoch, sample) and of the label map.

The transforms and their distributions are mmsegmentation's for ADE20K: Resize, RandomCrop with cat_max_ratio, and
RandomFlip.
"""

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from pipeline.data.philox import Purpose, random_bits
from pipeline.data.placement import Placement, Target
from pipeline.data.random_resized_crop import draw_flips

IGNORED = 255
"""Label of pixels that neither training nor evaluation counts."""
LONG_SIDE_RATIO = 4
"""Limit of an image's longer side, in units of the wanted shorter side: (2048, 512) in the published settings."""
TRIES = 10


@dataclass(frozen=True)
class RandomScaleCrop:
    """Flip, resize by a random factor, and crop a square; the transform of training.

    The image is resized to a shorter side of `side` times the factor. If one class covers more than `cat_max_ratio` of
    a crop's labeled pixels, another crop is drawn, up to ten times.
    """

    seed: int
    side: int
    """Of the crop, in pixels."""
    scale: tuple[float, float]
    """Range of the factor."""
    cat_max_ratio: float
    flip: bool
    """Whether half of the images are flipped horizontally."""
    extension: str = "png"

    def __call__(
        self, annotation: np.ndarray, image_size: tuple[int, int], epoch: int, sample_id: int
    ) -> tuple[Placement, Target]:
        """Return placement and target: `labels`, uint8 (side, side), and `extent`, int64 (2,): width and height of the
        part of the canvas that the image covers. Raises ValueError if the label map does not belong to the image."""
        labels = decode_labels(annotation, image_size)
        item = np.array([sample_id])
        draws = random_bits(self.seed, Purpose.CROP, epoch, item, 1 + 2 * (TRIES + 1))[0] * 2.0**-32
        flip = self.flip and bool(draw_flips(self.seed, np.array([epoch]), item)[0])
        if flip:
            labels = labels[:, ::-1]
        low, high = self.scale
        width, height = rescaled_size(image_size, self.side, low + (high - low) * draws[0])
        rows, columns = nearest_indexes(labels.shape[0], height), nearest_indexes(labels.shape[1], width)
        tries = np.floor(draws[1:].reshape(-1, 2) * [max(height - self.side, 0) + 1, max(width - self.side, 0) + 1])
        y = x = 0
        crop = labels[:0]
        for number, (y, x) in enumerate(tries.astype(int).tolist()):
            crop = labels[rows[y : y + self.side, None], columns[x : x + self.side]]
            if number == TRIES or has_variety(crop, self.cat_max_ratio):
                break
        padded = np.full((self.side, self.side), IGNORED, np.uint8)
        padded[: crop.shape[0], : crop.shape[1]] = crop
        placement = Placement(image_size, (width, height), (x, y), (self.side, self.side), flip)
        return placement, {"labels": torch.from_numpy(padded), "extent": torch.tensor(placement.extent)}


@dataclass(frozen=True)
class ShorterSideResize:
    """Resize the whole image to a shorter side, with a longer side of at most LONG_SIDE_RATIO times that; the transform
    of evaluation. The target `labels`, uint8 (height, width), has the stored size."""

    side: int
    extension: str = "png"

    def __call__(
        self, annotation: np.ndarray, image_size: tuple[int, int], epoch: int, sample_id: int
    ) -> tuple[Placement, Target]:
        labels = decode_labels(annotation, image_size)
        return Placement(image_size, rescaled_size(image_size, self.side)), {"labels": torch.from_numpy(labels)}


def decode_labels(encoded: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Decode a label map: class numbers from 1 become labels from 0, and 0 becomes IGNORED; uint8 (height, width).

    Raises:
        ValueError: If the map is damaged, not 8-bit with one channel, or not as large as its image.
    """
    try:
        with Image.open(io.BytesIO(encoded.data), formats=["PNG"]) as image:
            if image.mode not in ("L", "P"):
                raise ValueError(f"its label map has mode {image.mode}, not 8-bit gray or palette")
            numbers = np.asarray(image)
    except (OSError, SyntaxError) as error:
        raise ValueError(f"its label map cannot be decoded ({error})") from error
    if numbers.shape[::-1] != tuple(image_size):
        raise ValueError(f"its label map is {numbers.shape[::-1]} px, the image {tuple(image_size)}")
    return numbers - np.uint8(1)  # 0 wraps around to 255


def rescaled_size(size: tuple[int, int], shorter: int, factor: float = 1.0) -> tuple[int, int]:
    """Return width and height after a resize that keeps the aspect ratio.

    The shorter side becomes `shorter` x `factor` pixels, unless the longer one would exceed LONG_SIDE_RATIO times that.
    """
    short_limit, long_limit = int(shorter * factor), int(LONG_SIDE_RATIO * shorter * factor)
    scale = min(long_limit / max(size), short_limit / min(size))
    width, height = (max(1, int(side * scale + 0.5)) for side in size)
    return width, height


def nearest_indexes(stored: int, resized: int) -> np.ndarray:
    """Return for each pixel of a resized axis the stored pixel under its center, int64 (resized,)."""
    return ((2 * np.arange(resized) + 1) * stored) // (2 * resized)


def has_variety(labels: np.ndarray, cat_max_ratio: float) -> bool:
    """Return whether a crop has several classes, none of which covers cat_max_ratio of its labeled pixels."""
    counts = np.bincount(labels.ravel(), minlength=IGNORED + 1)[:IGNORED]
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())
