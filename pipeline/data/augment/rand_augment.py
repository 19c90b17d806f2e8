"""RandAugment (Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search space",
2020, https://arxiv.org/abs/1909.13719), as timm's "rand-m9-mstd0.5-inc1", which MAE's fine-tuning uses.

Each of two layers draws one of fifteen operations for an image and applies it with probability 1/2. The pixels
are Pillow's. Every operation is one of three kinds: a warp (bicubic), a lookup table of levels for each channel,
or a blend with a gray or smoothed image. A batch passes through each kind once, with parameters for each image.
"""

import math

import torch
from torch.nn import functional as F

LAYERS = 2
PROBABILITY = 0.5
MAX_MAGNITUDE = 10.0
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
IDENTITY = len(OPERATIONS)
LEVELS = 256


def rand_augment(
    images: torch.Tensor, noise: torch.Tensor, magnitude: float, magnitude_std: float, fill: torch.Tensor
) -> torch.Tensor:
    """Augment images (B, 3, H, W), float32 of integer levels from 0 to 255, given noise (B, NOISE_DIM).

    Args:
        magnitude: mean magnitude, 0 to 10; `magnitude_std` is the standard deviation of its normal noise.
        fill: (3,) level of pixels from outside the image.
    """
    for layer_noise in noise.split(NOISE_PER_LAYER, dim=1):
        choice, draw, radius, angle, direction = layer_noise.unbind(1)
        operation = (choice * len(OPERATIONS)).long()
        operation = torch.where(draw <= PROBABILITY, operation, IDENTITY)
        normal = (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()
        strength = ((magnitude + magnitude_std * normal) / MAX_MAGNITUDE).clamp(0, 1)
        sign = torch.where(direction > 0.5, -1.0, 1.0)
        images = apply_operations(images, operation, strength, sign, fill)
    return images


def apply_operations(
    images: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor, sign: torch.Tensor, fill: torch.Tensor
) -> torch.Tensor:
    """Apply one operation to each image: operation (B,) are indexes of OPERATIONS or IDENTITY, strength (B,) is
    from 0 to 1, and sign (B,) is 1 or -1, the direction of operations that have two."""
    signed = sign * strength
    factor = (1 + 0.9 * signed).clamp(min=0.1)  # of color, contrast, brightness and sharpness
    images = _warp(images, _warp_matrix(operation, signed, images.shape[-2:]), fill)
    images = _look_up(images, _level_table(images, operation, strength, factor))
    return _blend(images, operation, factor)


def _is(operation: torch.Tensor, name: str) -> torch.Tensor:
    return operation == OPERATIONS.index(name)


def _warp_matrix(operation: torch.Tensor, signed: torch.Tensor, size: torch.Size) -> torch.Tensor:
    """Return matrices (B, 2, 3) that map (x, y, 1) of the result to (x, y) in the image."""
    height, width = size
    one, zero = torch.ones_like(signed), torch.zeros_like(signed)
    angle = torch.where(_is(operation, "rotate"), -math.radians(30) * signed, zero)
    cos, sin = angle.cos(), angle.sin()
    shear_x = torch.where(_is(operation, "shear_x"), 0.3 * signed, zero)
    shear_y = torch.where(_is(operation, "shear_y"), 0.3 * signed, zero)
    shift_x = torch.where(_is(operation, "translate_x"), 0.45 * width * signed, zero)
    shift_y = torch.where(_is(operation, "translate_y"), 0.45 * height * signed, zero)
    x, y = width / 2, height / 2  # the center of the rotation
    rows = (
        (cos * one, sin + shear_x, x - cos * x - sin * y + shift_x),
        (shear_y - sin, cos * one, y + sin * x - cos * y + shift_y),
    )
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _warp(images: torch.Tensor, matrix: torch.Tensor, fill: torch.Tensor) -> torch.Tensor:
    """Apply Pillow's bicubic transform: Keys' kernel with a = -1, replicated border, rounded down."""
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

    def interpolate_row(j: int) -> torch.Tensor:
        at = (top + j).clamp(0, height - 1) * width
        taps = [at + (left + i).clamp(0, width - 1) for i in range(-1, 3)]
        index = [tap.long().view(count, 1, -1).expand(-1, channels, -1) for tap in taps]
        return _cubic([flat.gather(2, i).view_as(images) for i in index], dx)

    result = _cubic([interpolate_row(j) for j in range(-1, 3)], dy).clamp(0, LEVELS - 1).floor()
    return torch.where(inside[:, None], result, fill.view(1, channels, 1, 1))


def _cubic(values: list[torch.Tensor], d: torch.Tensor) -> torch.Tensor:
    """Interpolate between the second and the third of four neighbors, at d in [0, 1)."""
    a, b, c, e = values
    return b + d * ((c - a) + d * (2 * (a - b) + c - e + d * (b - a - c + e)))


def _level_table(
    images: torch.Tensor, operation: torch.Tensor, strength: torch.Tensor, factor: torch.Tensor
) -> torch.Tensor:
    """Return the new level of each level, (B, 3, 256)."""
    i = torch.arange(LEVELS, device=images.device, dtype=torch.float32)
    ones = torch.ones((), device=images.device).expand(images.flatten(2).shape)
    counts = torch.zeros(*images.shape[:2], LEVELS, device=images.device)
    counts = counts.scatter_add(2, images.flatten(2).long(), ones)
    s = strength[:, None, None]
    step = 2 ** (4 + (4 * s).floor())  # keeps 4 - floor(4 s) bits
    threshold = LEVELS - (LEVELS * s).floor()
    added = (110 * s).floor()
    gray = (_luma(images).mean((1, 2), dtype=torch.float64) + 0.5).floor().float()[:, None, None]
    f = factor[:, None, None]
    tables = {
        "auto_contrast": _stretch(counts, i),
        "equalize": _equalize(counts, i),
        "invert": LEVELS - 1 - i,
        "posterize": (i / step).floor() * step,
        "solarize": torch.where(i < threshold, i, LEVELS - 1 - i),
        "solarize_add": torch.where(i < 128, i + added, i),
        "contrast": gray + f * (i - gray),
        "brightness": f * i,
    }
    table = i.expand(*images.shape[:2], LEVELS)
    for name, entries in tables.items():
        table = torch.where(_is(operation, name)[:, None, None], entries, table)
    return table.clamp(0, LEVELS - 1).floor()


def _stretch(counts: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """Map the range from the darkest to the brightest level to all levels."""
    low, high = ((counts > 0) * torch.stack([LEVELS - i, i + 1])[:, None, None]).amax(3, keepdim=True)
    low, high = LEVELS - low, high - 1
    # In float64, as Pillow: rounding must not move a level below an integer.
    scale = (LEVELS - 1) / (high - low).double().clamp(min=1)
    return torch.where(high > low, (i * scale - low * scale).trunc().float(), i)


def _equalize(counts: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """Make all levels about equally frequent."""
    brightest = ((counts > 0) * (i + 1)).argmax(dim=2, keepdim=True)
    total = counts.sum(2, keepdim=True)
    step = ((total - counts.gather(2, brightest)) / (LEVELS - 1)).floor()
    before = counts.cumsum(2) - counts
    spread = (((step / 2).floor() + before).double() / step.clamp(min=1)).floor().float()
    return torch.where(step > 0, spread, i)


def _look_up(images: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return table.gather(2, images.flatten(2).long()).view_as(images)


def _blend(images: torch.Tensor, operation: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Color: blend with gray. Sharpness: blend with the smoothed image."""
    color, sharp = (_is(operation, name)[:, None, None, None] for name in ("color", "sharpness"))
    other = torch.where(color, _luma(images)[:, None], _smooth(images))
    blended = (other + factor[:, None, None, None] * (images - other)).clamp(0, LEVELS - 1).floor()
    return torch.where(color | sharp, blended, images)


def _luma(images: torch.Tensor) -> torch.Tensor:
    """Convert to luma (B, H, W): ITU-R 601-2 in Pillow's integer arithmetic."""
    r, g, b = images.long().unbind(1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).float()


def _smooth(images: torch.Tensor) -> torch.Tensor:
    """Apply Pillow's SMOOTH filter; the border is kept."""
    kernel = torch.ones(3, 3, device=images.device)
    kernel[1, 1] = 5
    inner = F.conv2d(images.flatten(0, 1)[:, None], kernel[None, None])  # integers, so exact
    inner = (inner.view(*images.shape[:2], *inner.shape[-2:]) / 13 + 0.5).floor()
    result = images.clone()
    result[:, :, 1:-1, 1:-1] = inner
    return result
