"""Random erasing (Zhong et al., "Random Erasing Data Augmentation", 2020, https://arxiv.org/abs/1708.04896),
timm's law with one rectangle of normal noise a pixel, which MAE fine-tunes with."""

import math

import torch

AREA = (0.02, 1 / 3)
"""Of the image."""
ASPECT = (0.3, 1 / 0.3)
TRIES = 10
NOISE_DIM = 1 + 2 * TRIES + 2 + 2
WORD = 0xFFFFFFFF


def erase(images: torch.Tensor, noise: torch.Tensor, probability: float) -> torch.Tensor:
    """images (B, 3, H, W) float32, normalised, noise (B, NUMBERS) -> the same, a rectangle of some erased."""
    height, width = images.shape[-2:]
    happens, area, aspect, place, key = noise.split([1, TRIES, TRIES, 2, 2], dim=1)
    area = (AREA[0] + (AREA[1] - AREA[0]) * area) * (height * width)
    low, high = map(math.log, ASPECT)
    aspect = (low + (high - low) * aspect).exp()
    h, w = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (h < height) & (w < width)
    first = fits.byte().argmax(dim=1, keepdim=True)
    h, w = h.gather(1, first), w.gather(1, first)
    top = (place[:, :1] * (height - h + 1)).floor()
    left = (place[:, 1:] * (width - w + 1)).floor()
    erased = (happens < probability) & fits.any(dim=1, keepdim=True)
    box = inside(top, top + h, height)[:, :, None] & inside(left, left + w, width)[:, None, :]
    return torch.where((box & erased[:, :, None])[:, None], normal(key, images.shape[1:]), images)


def inside(start: torch.Tensor, end: torch.Tensor, length: int) -> torch.Tensor:
    """start, end (B, 1) -> bool (B, length): which places lie in [start, end)."""
    at = torch.arange(length, device=start.device)
    return (at >= start) & (at < end)


def normal(key: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Normal numbers (B, *shape), float32: a hash of each key (B, 2), in [0, 1), and the place."""
    place = torch.arange(math.prod(shape), device=key.device)
    first, second = (key * 2**24).long()[:, :, None].unbind(1)
    bits = _mixed(_mixed(place + first * 0x9E3779B1) ^ second)
    radius = (-2 * ((bits + 1) * 2.0**-32).log()).sqrt()
    angle = 2 * math.pi * (_mixed(bits + 0x632BE5AB) * 2.0**-32)
    return (radius * angle.cos()).view(len(key), *shape)


def _mixed(bits: torch.Tensor) -> torch.Tensor:
    """MurmurHash3's finaliser: 32-bit words, in int64, to words that look random."""
    bits = bits & WORD
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & WORD
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & WORD
    return bits ^ (bits >> 16)
