"""Photometric distortion (Howard 2013; Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016,
https://arxiv.org/abs/1512.02325), with the distributions of mmsegmentation's PhotoMetricDistortion.

Brightness, contrast, saturation and hue are each changed with probability 1/2, contrast either before or after
saturation and hue. Levels are not rounded between the steps, as they are there.
"""

import torch

BRIGHTNESS = 32.0
"""Largest change, of 255 levels."""
CONTRAST = SATURATION = (0.5, 1.5)
HUE = 18
"""Largest rotation of the hue, in steps of 2 degrees."""
NOISE_DIM = 9


def distort(images: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Distort images (B, 3, H, W), float32 levels from 0 to 255, given noise (B, NOISE_DIM)."""
    order, use, strength = noise.split([1, 4, 4], dim=1)
    used = (use < 0.5).unbind(1)
    brightness, contrast, saturation, hue = strength.unbind(1)
    images = _select(used[0], (images + _column((2 * brightness - 1) * BRIGHTNESS)).clamp(0, 255), images)
    factor = _column(torch.where(used[1], _between(contrast, CONTRAST), 1.0))
    is_first = _column(order[:, 0] < 0.5)
    images = torch.where(is_first, (images * factor).clamp(0, 255), images)
    saturation_factor = torch.where(used[2], _between(saturation, SATURATION), 1.0)
    steps = torch.where(used[3], (hue * 2 * HUE).floor() - HUE, 0.0)
    images = _select(used[2] | used[3], change_hue_and_saturation(images, saturation_factor, steps / 180), images)
    return torch.where(is_first, images, (images * factor).clamp(0, 255))


def change_hue_and_saturation(images: torch.Tensor, factor: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """Multiply the saturation of images (B, 3, H, W) by factor (B,), up to 1, and rotate the hue by turns (B,).

    Saturation and hue are those of the HSV color space.
    """
    red, green, blue = images.unbind(1)
    value, low = images.amax(1), images.amin(1)
    chroma = (value - low).clamp(min=1e-6)
    sector = torch.where(
        value == red,
        (green - blue) / chroma,
        torch.where(value == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    sector = sector + 6 * turns[:, None, None]  # of the color circle, in sixths
    new_chroma = torch.minimum((value - low) * factor[:, None, None], value)
    offsets = torch.arange(5.0, 0.0, -2.0, device=images.device)[None, :, None, None]
    distance = (offsets + sector[:, None]).remainder(6)
    share = torch.minimum(distance, 4 - distance).clamp(0, 1)
    return value[:, None] - new_chroma[:, None] * share


def _between(uniform: torch.Tensor, bounds: tuple[float, float]) -> torch.Tensor:
    low, high = bounds
    return low + (high - low) * uniform


def _column(values: torch.Tensor) -> torch.Tensor:
    return values[:, None, None, None]


def _select(used: torch.Tensor, changed: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return torch.where(_column(used), changed, images)
