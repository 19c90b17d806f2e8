"""RandAugment (Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", 2020, https://arxiv.org/abs/1909.13719), as timm's "rand-m9-mstd0.5-inc1" has it, which MAE fine-tunes
with.

Two layers; in each an image takes one of fifteen operations, and with probability one half it is applied. The
pixels are Pillow's. All operations are one of three kinds, so a batch goes through each kind once, with every
image's own parameters: a warp (bicubic), a table of levels for each channel, a blend with a grey or smoothed
version of the image.
"""

import math

import torch
from torch.nn import functional as F

LAYERS = 2
PROBABILITY = 0.5
STRONGEST = 10.0
NOISE_PER_LAYER = 5
NOISE_DIM = LAYERS * NOISE_PER_LAYER
OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "rotate",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
NOTHING = len(OPERATIONS)
LEVELS = 256


def rand_augment(
    images: torch.Tensor, noise: torch.Tensor, magnitude: float, deviation: float, fill: torch.Tensor
) -> torch.Tensor:
    """levels (B, 3, H, W) float32, whole numbers from 0 to 255, noise (B, NUMBERS) -> the same, augmented.

    magnitude: the mean strength, 0 to 10, which varies by a normal `deviation`. fill (3,): the level of what
    comes in from outside the image.
    """
    for numbers in noise.split(NOISE_PER_LAYER, dim=1):
        which, happens, radius, angle, sign = numbers.unbind(1)
        operation = (which * len(OPERATIONS)).long()
        operation = torch.where(happens <= PROBABILITY, operation, NOTHING)
        normal = (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()
        strength = ((magnitude + deviation * normal) / STRONGEST).clamp(0, 1)
        images = apply(images, operation, strength, torch.where(sign > 0.5, -1.0, 1.0), fill)
    return images


def apply(
    images: torch.Tensor,
    operation: torch.Tensor,
    strength: torch.Tensor,
    sign: torch.Tensor,
    fill: torch.Tensor,
) -> torch.Tensor:
    """One operation an image. operation (B,): positions in OPERATIONS, NOTHING leaves the image as it is;
    strength (B,) from 0 to 1; sign (B,) 1 or -1: the direction, where the operation has two."""
    signed = sign * strength
    factor = (1 + 0.9 * signed).clamp(min=0.1)  # of the four that enhance
    images = _warp(images, _matrix(operation, signed, images.shape[-2:]), fill)
    images = _look_up(images, _table(images, operation, strength, factor))
    return _blend(images, operation, factor)


def _is(operation: torch.Tensor, name: str) -> torch.Tensor:
    return operation == OPERATIONS.index(name)


def _matrix(operation: torch.Tensor, signed: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """(B, 2, 3): from a pixel of the result to its place in the image, (x, y, 1) to (x, y)."""
    height, width = size
    one, zero = torch.ones_like(signed), torch.zeros_like(signed)
    angle = torch.where(_is(operation, "rotate"), -math.radians(30) * signed, zero)
    cos, sin = angle.cos(), angle.sin()
    shear_x = torch.where(_is(operation, "shear_x"), 0.3 * signed, zero)
    shear_y = torch.where(_is(operation, "shear_y"), 0.3 * signed, zero)
    shift_x = torch.where(_is(operation, "translate_x"), 0.45 * width * signed, zero)
    shift_y = torch.where(_is(operation, "translate_y"), 0.45 * height * signed, zero)
    x, y = width / 2, height / 2  # the centre of a rotation
    rows = (
        (cos * one, sin + shear_x, x - cos * x - sin * y + shift_x),
        (shear_y - sin, cos * one, y + sin * x - cos * y + shift_y),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _warp(images: torch.Tensor, matrix: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Pillow's bicubic transform: Keys' kernel with a = -1, borders repeated, rounded down."""
    count, channels, height, width = images.shape
    device = images.device
    x = torch.arange(width, device=device) + 0.5
    y = torch.arange(height, device=device)[:, None] + 0.5
    m = matrix[:, :, :, None, None]
    x, y = (m[:, i, 0] * x + m[:, i, 1] * y + m[:, i, 2] for i in (0, 1))  # (B, H, W)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    left, top = (x - 0.5).floor(), (y - 0.5).floor()
    dx, dy = (x - 0.5 - left)[:, None], (y - 0.5 - top)[:, None]
    flat = images.flatten(2)

    def row(j: int) -> torch.Tensor:
        at = (top + j).clamp(0, height - 1) * width
        taps = [at + (left + i).clamp(0, width - 1) for i in range(-1, 3)]
        index = [tap.long().view(count, 1, -1).expand(-1, channels, -1) for tap in taps]
        return _cubic([flat.gather(2, i).view_as(images) for i in index], dx)

    result = _cubic([row(j) for j in range(-1, 3)], dy).clamp(0, LEVELS - 1).floor()
    return torch.where(inside[:, None], result, fill.view(1, channels, 1, 1))


def _cubic(values: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    """Between the second and the third of four neighbours, at d in [0, 1)."""
    a, b, c, e = values
    return b + d * ((c - a) + d * (2 * (a - b) + c - e + d * (b - a - c + e)))


def _table(
    images: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """(B, 3, 256): the level that each level becomes."""
    i = torch.arange(LEVELS, device=images.device, dtype=torch.float32)
    ones = torch.ones((), device=images.device).expand(images.flatten(2).shape)
    counts = torch.zeros(*images.shape[:2], LEVELS, device=images.device)
    counts = counts.scatter_add(2, images.flatten(2).long(), ones)
    s = strength[:, None, None]
    low_bits = 2 ** (4 + (4 * s).floor())  # of 4 - floor(4 s) bits kept
    threshold = LEVELS - (LEVELS * s).floor()
    added = (110 * s).floor()
    grey = (_luma(images).mean((1, 2), dtype=torch.float64) + 0.5).floor().float()[:, None, None]
    f = factor[:, None, None]
    tables = {
        "auto_contrast": _stretched(counts, i),
        "equalize": _equalized(counts, i),
        "invert": LEVELS - 1 - i,
        "posterize": (i / low_bits).floor() * low_bits,
        "solarize": torch.where(i < threshold, i, LEVELS - 1 - i),
        "solarize_add": torch.where(i < 128, i + added, i),
        "contrast": grey + f * (i - grey),
        "brightness": f * i,
    }
    table = i.expand(*images.shape[:2], LEVELS)
    for name, entries in tables.items():
        table = torch.where(_is(operation, name)[:, None, None], entries, table)
    return table.clamp(0, LEVELS - 1).floor()


def _stretched(counts: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """From the darkest to the brightest level there is, to all levels."""
    low, high = ((counts > 0) * torch.stack([LEVELS - i, i + 1])[:, None, None]).amax(3, keepdim=True)
    low, high = LEVELS - low, high - 1
    # In float64, as Pillow: a level must not fall below a whole number by rounding.
    scale = (LEVELS - 1) / (high - low).double().clamp(min=1)
    return torch.where(high > low, (i * scale - low * scale).trunc().float(), i)


def _equalized(counts: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """Each level about as often as every other."""
    brightest = ((counts > 0) * (i + 1)).argmax(dim=2, keepdim=True)
    total = counts.sum(2, keepdim=True)
    step = ((total - counts.gather(2, brightest)) / (LEVELS - 1)).floor()
    before = counts.cumsum(2) - counts
    spread = (((step / 2).floor() + before).double() / step.clamp(min=1)).floor().float()
    return torch.where(step > 0, spread, i)


def _look_up(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _blend(images: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Colour: away from or towards grey. Sharpness: away from or towards the smoothed image."""
    color, sharp = (_is(operation, name)[:, None, None, None] for name in ("color", "sharpness"))
    other = torch.where(color, _luma(images)[:, None], _smoothed(images))
    blended = (other + factor[:, None, None, None] * (images - other)).clamp(0, LEVELS - 1).floor()
    return torch.where(color | sharp, blended, images)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """(B, H, W): ITU-R 601-2, in Pillow's whole numbers."""
    r, g, b = images.long().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).float()


def _smoothed(images: torch.Tensor) -> torch.Tensor:
    """Pillow's SMOOTH; the border stays."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    inner = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None])  # whole numbers, so exact
    inner = (inner.view(*images.shape[:2], *inner.shape[-2:]) / 13 + 0.5).floor()
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = inner
    return result
