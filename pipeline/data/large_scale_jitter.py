"""Large-scale jitter (Ghiasi et al. 2021) as in detectron2: flip, resize by a random factor, crop or pad to a square.

Invariant: a placement depends only on (seed, epoch, sample, image size). It has the distribution of detectron2's
RandomFlip, ResizeScale and FixedSizeCrop, which crops at the same relative position in x and y.
"""

import numpy as np

from pipeline.data.philox import Purpose, random_bits
from pipeline.data.placement import Placement


def jitter(
    seed: int,
    epoch: int,
    sample_id: int,
    stored: tuple[int, int],
    side: int,
    scale: tuple[float, float],
    flip: bool = True,
) -> Placement:
    """Draw the placement of one image.

    Args:
        epoch, sample_id: Keys of the random numbers.
        stored: Width and height of the image in pixels.
        side: Of the canvas, in pixels.
        scale: Range of the longer side after the resize, relative to the canvas; uniform.
        flip: Whether to flip half of the images.
    """
    numbers = random_bits(seed, Purpose.CROP, epoch, sample_id, 2) * 2.0**-32
    factor = (scale[0] + (scale[1] - scale[0]) * numbers[0]) * side / max(stored)
    size = tuple(max(1, int(np.rint(length * factor))) for length in stored)
    corner = tuple(int(np.rint(max(0, length - side) * numbers[1])) for length in size)
    flipped = flip and bool(random_bits(seed, Purpose.FLIP, epoch, sample_id, 1)[0] >> np.uint32(31))
    return Placement(stored, (size[0], size[1]), (corner[0], corner[1]), (side, side), flipped)


def fit(stored: tuple[int, int], side: int) -> Placement:
    """Return the placement for evaluation: the longer side fills the canvas (detectron2's ResizeShortestEdge)."""
    width, height = (max(1, int(length * side / max(stored) + 0.5)) for length in stored)
    return Placement(stored, (width, height), canvas=(side, side))
